"""The folder writer: layout, formats, balance, split hygiene, the cache."""

import hashlib
import json
from collections import Counter, defaultdict

import pytest
from PIL import Image

from mllm_keeplora.mini import ensure_mini_dcl, generator_hash, write_mini_dcl

TINY = {"train": 60, "val": 12, "test": 40, "general": 40, "anchors": 8}
DOMAINS = ("RS", "Med", "AD", "Sci", "Fin")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    write_mini_dcl(folder, TINY)
    return folder


def load(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", DOMAINS)
def test_layout_and_sizes(root, name):
    for split in ("train", "val", "test"):
        assert len(load(root / name / f"{split}.json")) == TINY[split]
    assert len(list((root / name / "images").iterdir())) == TINY["train"] + TINY["val"] + TINY["test"]


@pytest.mark.parametrize("path", [f"{name}/train.json" for name in DOMAINS] + ["general/anchors.json"])
def test_training_records_are_llava_conversations(root, path):
    records = load(root / path)
    assert len({r["question_id"] for r in records}) == len(records)
    for record in records:
        turns = record["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2) and 2 <= len(turns) <= 6
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(t["value"].count("<image>") for t in turns) == 1
        with Image.open((root / path).parent / record["image"]) as image:
            assert image.size == (64, 64)


@pytest.mark.parametrize("path", [f"{n}/{s}.json" for n in DOMAINS for s in ("val", "test")] + ["general/test.json"])
def test_test_records_hold_one_question_without_image_token(root, path):
    records = load(root / path)
    assert len({r["question_id"] for r in records}) == len(records)
    for record in records:
        assert set(record) == {"question_id", "image", "text", "answer", "type"}
        assert isinstance(record["answer"], str) and "<image>" not in record["text"]
        assert ((root / path).parent / record["image"]).is_file()


@pytest.mark.parametrize("name", DOMAINS)
def test_answers_are_balanced_so_that_guessing_scores_low(root, name):
    answers = defaultdict(Counter)
    for record in load(root / name / "train.json"):
        values = [t["value"].removeprefix("<image>\n") for t in record["conversations"]]
        for question, answer in zip(values[::2], values[1::2], strict=True):
            answers[question][answer] += 1
    test = load(root / name / "test.json")
    right = sum(answers[r["text"]].most_common(1)[0][0] == r["answer"] for r in test if answers[r["text"]])
    assert right / len(test) < 0.5
    for question, counts in answers.items():
        if sum(counts.values()) >= 12:
            assert max(counts.values()) <= 0.62 * sum(counts.values()), question


def test_pictures_of_a_domain_are_all_different(root):
    for name in DOMAINS:
        files = list((root / name / "images").iterdir())
        assert len({Image.open(f).tobytes() for f in files}) == len(files)


def test_writing_again_gives_the_same_bytes(root, tmp_path):
    write_mini_dcl(tmp_path / "again", TINY)
    first = sorted(p.relative_to(root) for p in root.rglob("*.*"))
    assert len(first) > 500
    for path in first:
        assert (root / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path


def test_cache_draws_once_and_reports_progress(tmp_path):
    sizes = {"train": 3, "val": 2, "test": 2, "general": 2, "anchors": 2}
    calls = []
    folder = ensure_mini_dcl(tmp_path, sizes, lambda done, total: calls.append((done, total)))
    assert folder.name == f"mini_dcl-{generator_hash(sizes)}"
    assert calls == [(i, 39) for i in range(1, 40)]
    assert ensure_mini_dcl(tmp_path, sizes, lambda *_: pytest.fail("drawn twice")) == folder
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_loser_of_a_race_takes_the_winners_folder(tmp_path):
    sizes = {"train": 2, "val": 1, "test": 1, "general": 1, "anchors": 1}

    def overtake(done, total):
        if done == total:
            winner = tmp_path / f"mini_dcl-{generator_hash(sizes)}"
            winner.mkdir()
            (winner / "mark").touch()

    folder = ensure_mini_dcl(tmp_path, sizes, overtake)
    assert (folder / "mark").exists() and [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_KEEPLORA_CACHE", str(tmp_path / "elsewhere"))
    sizes = {"train": 1, "val": 1, "test": 1, "general": 1, "anchors": 1}
    assert ensure_mini_dcl(sizes=sizes).parent == tmp_path / "elsewhere"


def test_hash_depends_on_sizes():
    assert generator_hash(TINY) != generator_hash({**TINY, "train": 61})


DRAWN_DATA = "ef9cfda293f4"  # of all pictures' pixels and all records of the shipped sizes


def digest_of_data(root):
    """Digest of what is drawn: records as they are, pictures by their pixels, whatever their files are packed with."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix == ".json":
            total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
        elif path.suffix == ".png":
            total.update(path.relative_to(root).as_posix().encode() + Image.open(path).convert("RGB").tobytes())
    return total.hexdigest()[:12]


@pytest.mark.slow
def test_the_shipped_data_are_those_that_their_pinned_name_stands_for(tmp_path):
    """Where this fails, what is drawn has changed: pin another name in `mini.write.DRAWN`, and this digest with it."""
    write_mini_dcl(tmp_path / "drawn")
    assert (generator_hash(), digest_of_data(tmp_path / "drawn")) == ("6036a136d0a5", DRAWN_DATA)
