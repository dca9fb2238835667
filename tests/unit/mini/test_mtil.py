"""The small benchmark of real pictures: what is unpacked, what its YAML says of it, a domain that needs a package."""

import hashlib
import json
import sys
from collections import Counter
from importlib import resources
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mllm_keeplora.config import load_config, read_yaml
from mllm_keeplora.data import loading
from mllm_keeplora.errors import UserError
from mllm_keeplora.mini import mtil

BENCHMARKS = resources.files("mllm_keeplora.configs") / "benchmarks"
PARTS = ("Digits", "Silhouettes", "Flags", "Food", "Textiles", "Clips", "Scripts", "general")
SHIPPED = "81fabb5bb42c"  # of all rows and of all pictures' pixels


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return mtil.ensure_mini_mtil(tmp_path_factory.mktemp("cache"))


def rows(root, name, split):
    return [json.loads(line) for line in (root / name / f"{split}.jsonl").read_text().splitlines()]


def parts_of(benchmark):
    """Every domain and suite, with its splits that have a file."""
    values = read_yaml(BENCHMARKS / f"{benchmark}.yaml")
    for name, part in {**values["domains"], **values["suites"]}.items():
        yield name, part, [split for split in ("train", "validation", "test") if split in part]


def digest_of(root):
    total = hashlib.sha256()
    for path in sorted(each for each in root.rglob("*") if each.is_file()):
        total.update(path.relative_to(root).as_posix().encode())
        is_picture = path.suffix == ".png"
        total.update(Image.open(path).convert("RGB").tobytes() if is_picture else path.read_bytes())
    return total.hexdigest()[:12]


def test_what_is_unpacked_is_what_the_pinned_digest_stands_for(root):
    assert digest_of(root) == SHIPPED


def test_the_benchmark_counts_what_is_unpacked(root):
    found = list(parts_of("mini_mtil"))
    assert [name for name, _, _ in found] == list(PARTS)
    for name, part, splits in found:
        classes = json.loads((root / part["classes"]).read_text())
        counted = {"classes": len(set(classes)), **{split: len(rows(root, name, split)) for split in splits}}
        assert counted == part["counts"] and len(classes) == counted["classes"]
        assert all(part[split] == f"{name}/{split}.jsonl" for split in splits)
        assert len(part["prompts"]) == 1 and part["prompts"][0].count("{}") == 1
        shown = {split: Counter(row["label"] for row in rows(root, name, split)) for split in splits}
        assert set(chain.from_iterable(shown.values())) <= set(classes)
        if name != "general":
            assert all(set(counts) == set(classes) for counts in shown.values())


def test_no_picture_of_a_domain_is_in_two_splits(root):
    for name, _, splits in parts_of("mini_mtil"):
        seen, ids = {}, set()
        for split in splits:
            for row in rows(root, name, split):
                assert set(row) == {"id", "image", "label"} and row["id"] not in ids
                ids.add(row["id"])
                with Image.open(root / name / row["image"]) as picture:
                    assert picture.size in {(28, 28), (48, 48)}
                    pixels = picture.convert("RGB").tobytes()
                assert seen.setdefault(pixels, (split, row["label"])) == (split, row["label"]), row


def test_the_second_order_begins_with_what_the_base_knows_least():
    orders = read_yaml(BENCHMARKS / "mini_mtil.yaml")["orders"]
    assert orders["order1"][-1] == orders["order2"][0] == "Scripts"
    assert sorted(orders["order1"]) == sorted(orders["order2"]) == sorted(set(PARTS) - {"general"})


def test_the_archive_is_unpacked_once_with_progress(tmp_path):
    calls = []
    folder = mtil.ensure_mini_mtil(tmp_path, lambda done, total: calls.append((done, total)))
    assert calls == [(i, len(calls)) for i in range(1, len(calls) + 1)]
    assert len(calls) == sum(each.is_file() for each in folder.rglob("*")) > 9000
    assert mtil.ensure_mini_mtil(tmp_path, lambda *_: pytest.fail("unpacked twice")) == folder
    assert [each.name for each in tmp_path.iterdir()] == [folder.name]


def test_the_notice_names_every_part_and_ships_beside_the_archive():
    notice = (resources.files("mllm_keeplora") / "assets/mini_mtil/NOTICE.md").read_text()
    assert all(f"| {name} |" in notice for name in PARTS)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mtil, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"domain Cells .* elpv-dataset.*'mllm-keeplora\[mini-mtil\]'"):
        mtil.ensure_mini_mtil_cells(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(loading.GENERATORS, "mini_dcl", "mllm_keeplora.mini.mtil:ensure_mini_mtil_cells")
    with pytest.raises(UserError, match="benchmark mini_dcl: domain Cells needs"):
        loading.load_benchmark(load_config("mini_dcl"))


def test_the_eighth_domain_is_read_from_its_package(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images, shares = rng.integers(0, 256, (1700, 60, 60), np.uint8), rng.integers(0, 4, 1700) / 3
    module = SimpleNamespace(load_dataset=lambda: (images, shares, None))
    monkeypatch.setitem(sys.modules, "elpv_dataset", SimpleNamespace(utils=module))
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", module)
    monkeypatch.setattr(mtil, "find_spec", lambda _: True)
    root = mtil.ensure_mini_mtil_cells(tmp_path)
    found = {name: (part, splits) for name, part, splits in parts_of("mini_mtil_cells")}
    assert {*found} == {*PARTS, "Cells"}
    part, splits = found["Cells"]
    assert {split: len(rows(root, "Cells", split)) for split in splits} | {"classes": 4} == part["counts"]
    known = {
        Image.fromarray(image).resize((48, 48), Image.Resampling.LANCZOS).tobytes(): share
        for image, share in zip(images, shares, strict=True)
    }
    for row in chain.from_iterable(rows(root, "Cells", split) for split in splits):
        with Image.open(root / "Cells" / row["image"]) as picture:
            share = known.pop(picture.tobytes())
        assert (
            row["label"] == ["no defect", "a doubtful defect", "a likely defect", "a certain defect"][round(share * 3)]
        )


@pytest.mark.parametrize("name", PARTS[:-1])
def test_both_benchmarks_have_the_same_seven_domains(name):
    one, other = (dict((each, part) for each, part, _ in parts_of(b)) for b in ("mini_mtil", "mini_mtil_cells"))
    assert one[name] == other[name]
