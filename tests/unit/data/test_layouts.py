"""Published folders of MTIL's data sets are read as torchvision reads them, and split as MTIL splits them."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_keeplora.data.layouts import LAYOUTS, published, published_digest, published_rows
from mllm_keeplora.data.layouts.published import split_80_20
from mllm_keeplora.errors import UserError
from tests.support import mtil_trees
from tests.support.mtil_trees import TREES, classes_of, write_coop

# layout -> the domain of the tree, and the folder that the benchmark names
FOLDERS = {
    "aircraft": ("Aircraft", "fgvc-aircraft-2013b"),
    "caltech101": ("Caltech101", "caltech101"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "dtd": ("DTD", "dtd/dtd"),
    "eurosat": ("EuroSAT", "eurosat/2750"),
    "flowers102": ("Flowers", "flowers-102"),
    "food101": ("Food", "food-101"),
    "mnist": ("MNIST", "MNIST"),
    "oxford_pet": ("OxfordPet", "oxford-iiit-pet"),
    "stanford_cars": ("StanfordCars", "stanford_cars"),
    "sun397": ("SUN397", "SUN397"),
}


@pytest.fixture
def tree(tmp_path):
    """Function (layout) -> the folder of a miniature in that layout."""

    def write(layout):
        name, folder = FOLDERS[layout]
        TREES[name][0](tmp_path)
        return tmp_path / folder

    return write


def torchvisions(layout, root, split):
    """The same split as torchvision has it: pairs of picture (path or pixels) and name of the class."""
    from torchvision import datasets

    if layout in ("caltech101", "eurosat", "sun397"):
        kind = {"caltech101": datasets.Caltech101, "eurosat": datasets.EuroSAT, "sun397": datasets.SUN397}[layout]
        whole = kind(str(root))
        if layout == "caltech101":
            named = [
                (f"{whole.categories[y]}/image_{i:04d}.jpg", whole.categories[y])
                for i, y in zip(whole.index, whole.y, strict=True)
            ]
        elif layout == "eurosat":
            named = [(path, whole.classes[y]) for path, y in whole.samples]
        else:
            named = sorted(
                (str(path), whole.classes[y]) for path, y in zip(whole._image_files, whole._labels, strict=True)
            )
        sizes = [int(0.8 * len(named)), len(named) - int(0.8 * len(named))]
        parts = torch.utils.data.random_split(named, sizes, generator=torch.Generator().manual_seed(42))
        return list(parts[split == "test"])
    if layout == "oxford_pet":
        found = datasets.OxfordIIITPet(str(root), split="trainval" if split == "train" else "test")
        return [(str(path), found.classes[y]) for path, y in zip(found._images, found._labels, strict=True)]
    if layout == "stanford_cars":
        found = datasets.StanfordCars(str(root), split=split)
        return [(str(path), found.classes[y]) for path, y in found._samples]
    if layout == "flowers102":
        found = datasets.Flowers102.__new__(datasets.Flowers102)
        found._check_integrity = lambda: True  # of the published files' sums alone
        found.__init__(str(root), split=split)
        return [(str(path), str(y + 1)) for path, y in zip(found._image_files, found._labels, strict=True)]
    kinds = {"aircraft": datasets.FGVCAircraft, "dtd": datasets.DTD, "food101": datasets.Food101}
    found = kinds[layout](str(root), split=split)
    return [(str(path), found.classes[y]) for path, y in zip(found._image_files, found._labels, strict=True)]


def test_every_layout_has_a_miniature_here():
    assert set(FOLDERS) | {"coop"} == set(LAYOUTS)


@pytest.mark.parametrize("layout", sorted(set(FOLDERS) - {"mnist", "cifar100"}))
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_published_folder_is_read_as_torchvision_reads_it(layout, split, tree, tmp_path):
    folder = tree(layout)
    rows = list(published_rows(layout, folder, split))
    expected = torchvisions(layout, tmp_path, split)
    assert [row["label"] for row in rows] == [label for _, label in expected]
    for row, (path, _) in zip(rows, expected, strict=True):
        assert (folder / row["image"]).is_file() and (folder / row["image"]).as_posix().endswith(path)
        assert row["id"] == row["image"]
    counts = TREES[FOLDERS[layout][0]][1]
    assert len(rows) == counts[split] and len(published(layout, folder, split).labels) == counts["classes"]


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_read_compressed_or_not_as_pictures_without_loss(packed, tmp_path):
    from torchvision import datasets

    mtil_trees.write_mnist(tmp_path, packed=False)
    expected = datasets.MNIST(str(tmp_path), train=False)
    if packed:
        (tmp_path / "MNIST").rename(tmp_path / "plain")
        mtil_trees.write_mnist(tmp_path)
    rows = list(published_rows("mnist", tmp_path / "MNIST", "test"))
    assert [row["label"] for row in rows] == [str(int(label)) for label in expected.targets]
    for row, pixels in zip(rows, expected.data, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), pixels.numpy())
    assert rows[3]["id"] == "test/3"


def test_cifar100_is_read_as_pictures_without_loss(tree):
    folder = tree("cifar100")
    rows = list(published_rows("cifar100", folder, "train"))
    data = pickle.loads((folder / "train").read_bytes())["data"]
    assert [row["label"] for row in rows] == ["apple", "aquarium_fish"] * 2
    shown = np.asarray(Image.open(io.BytesIO(rows[1]["image"]["bytes"])))
    np.testing.assert_array_equal(shown, data[1].reshape(3, 32, 32).transpose(1, 2, 0))


class Marks:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_asks_for_anything_but_arrays_is_refused_and_runs_nothing(tree, tmp_path):
    folder = tree("cifar100")
    (folder / "test").write_bytes(pickle.dumps({"data": Marks(tmp_path / "mark"), "fine_labels": []}))
    with pytest.raises(UserError, match=r"test is not a readable pickle of CIFAR100: it asks for io.open"):
        list(published_rows("cifar100", folder, "test"))
    assert not (tmp_path / "mark").exists()


def test_a_split_is_that_of_random_split_with_seed_42():
    names = [f"n{i:02d}" for i in range(20)]
    parts = torch.utils.data.random_split(names, [16, 4], generator=torch.Generator().manual_seed(42))
    for split, part in zip(("train", "test"), parts, strict=True):
        assert split_80_20(names, split) == list(part)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(42)).tolist()
    assert split_80_20(names, "train") == [names[place] for place in order[:16]]


def test_a_split_of_coop_names_its_classes_by_number(tmp_path):
    write_coop(tmp_path, "images", "split_zhou_DescribableTextures.json", ["zigzagged", "banded"])
    path = tmp_path / "split_zhou_DescribableTextures.json"
    assert list(published("coop", path, "train").labels) == ["zigzagged", "banded"]
    rows = list(published_rows("coop", path, "validation"))
    assert rows[0] == {"id": "zigzagged/val0.jpg", "image": "zigzagged/val0.jpg", "label": "zigzagged"}
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "val": [["a.jpg", "0", "banded"]]}))
    with pytest.raises(UserError, match=r"val row 0 must be \[path, number, name\], got"):
        published("coop", path, "train")


@pytest.mark.parametrize(("layout", "split"), [("aircraft", "validation"), ("dtd", "validation"),
                                               ("flowers102", "validation")])  # fmt: skip
def test_what_has_validation_pictures_gives_them(layout, split, tree):
    folder = tree(layout)
    found, trained = (list(published_rows(layout, folder, each)) for each in (split, "train"))
    assert len(found) == len(trained) and not {row["id"] for row in found} & {row["id"] for row in trained}


@pytest.mark.parametrize("layout", sorted(set(FOLDERS) - {"aircraft", "dtd", "flowers102"}))
def test_what_has_no_validation_pictures_says_so(layout, tree):
    with pytest.raises(UserError, match="this layout has no validation split; known: test, train"):
        list(published_rows(layout, tree(layout), "validation"))


@pytest.mark.parametrize("layout", FOLDERS)
def test_a_folder_without_its_files_is_a_sentence(layout, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as told:
        list(published_rows(layout, tmp_path / "empty", "train"))
    assert str(tmp_path / "empty") in str(told.value)


@pytest.mark.parametrize(("layout", "file"), [
    ("flowers102", "setid.mat"), ("stanford_cars", "devkit/cars_train_annos.mat"), ("cifar100", "train"),
    ("mnist", "raw/train-images-idx3-ubyte.gz"), ("food101", "meta/train.json"),
])  # fmt: skip
def test_a_damaged_file_is_named(layout, file, tree):
    folder = tree(layout)
    (folder / file).write_bytes((folder / file).read_bytes()[:40])
    with pytest.raises(UserError) as told:
        list(published_rows(layout, folder, "train"))
    assert str(folder / file) in str(told.value)


@pytest.mark.parametrize("layout", FOLDERS)
def test_the_digest_of_a_split_tells_other_labels_and_pictures(layout, tree):
    folder = tree(layout)
    before = {split: published_digest(layout, folder, split) for split in ("train", "test")}
    assert before == {split: published_digest(layout, folder, split) for split in ("train", "test")}
    assert layout in ("cifar100", "mnist") or before["train"] != before["test"]  # these two have the same pictures here


def test_other_labels_have_another_digest(tree):
    folder = tree("aircraft")
    before = published_digest("aircraft", folder, "train")
    path = folder / "data/images_variant_train.txt"
    path.write_text(path.read_text().replace("0000000 707-320", "0000000 A300B4"))
    assert published_digest("aircraft", folder, "train") != before


def test_class_names_written_by_hand_belong_to_folders_in_their_order():
    assert len(classes_of("caltech101")) == 101 and classes_of("caltech101") == sorted(classes_of("caltech101"))
    assert classes_of("flowers102") == [str(number) for number in range(1, 103)]
