"""How `tiny-clip` is built: what it must not see, a loss that knows equal texts, a build that stops and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
THINGS = ("dog", "cat", "red apple", "house", "grinning face", "car", "tree", "hammer", "star", "fish")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture
def corpus(tmp_path):
    """Ten things in two designs, four clip arts, digits and scenes, all noise."""
    from tiny_clip.corpus import Caption, Corpus
    from tiny_clip.processing import vocabulary

    drawn = [
        Caption(thing, (thing,), (thing,), "kind", design, True) for design in ("twemoji", "fluent") for thing in THINGS
    ]
    drawn += [Caption(f"clip {i}", ("thing",), (), "clip", "office", True) for i in range(4)]
    drawn += [Caption(f"digit {i}", ("one", "1"), (), "digit", "digits", False) for i in range(4)]
    drawn += [
        Caption(f"scene {i}", ("a star left", "white background"), (), "scene", "scenes", False) for i in range(16)
    ]
    folder = tmp_path / "corpus"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (len(drawn), 64, 64, 4), np.uint8)
    np.save(folder / "pixels.npy", pixels)
    (folder / "captions.json").write_text(json.dumps([vars(caption) for caption in drawn]))
    (folder / "words.json").write_text(json.dumps(vocabulary(["dog", "cat", "apple", "a", "picture", "of"])))
    return Corpus(folder)


def packages_of(folder, clips):
    """Make a folder of packages with five emoji of five groups, and empty clip arts."""
    rows = [
        ("1F1EB-1F1F7", "flag: France", "flags", "country-flag"),
        ("1F355", "pizza", "food-drink", "food-prepared"),
        ("1F415", "dog", "animals-nature", "animal-mammal"),
        ("1F3FB", "light skin tone", "component", "skin-tone"),
        ("2764-FE0F", "red heart", "smileys-emotion", "heart"),
    ]
    keys = ("hexcode", "annotation", "group", "subgroups")
    table = [{**dict(zip(keys, row, strict=True)), "tags": row[1], "skintone": ""} for row in rows]
    (folder / "openmoji/data").mkdir(parents=True)
    (folder / "openmoji/data/openmoji.json").write_text(json.dumps(table))
    for name in clips:
        path = folder / "openclipart-png/usr/share/openclipart/png" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_flags_and_the_folders_of_clips_are_not_learnt_from(tmp_path):
    from mini_mtil.names import CLIPS, FLAGS
    from tiny_clip.corpus import DESIGNS, clips_of, emoji_of

    inside = [f"{folder}/{place}.png" for folders in CLIPS.values() for folder in folders for place in ("a", "below/b")]
    inside += [f"{FLAGS}/europe/france.png", "unsorted/flag_of_spain.png", "special/White_Flag.png"]
    outside = ["animals/dinosaurs/rex.png", "shapes/starship.png", "office/pen.png", "signs_and_symbols/stop.png"]
    packages = packages_of(tmp_path, [*inside, *outside])
    assert sorted(f"{folder}/{path.name}" for folder, path in clips_of(packages)) == sorted(outside)
    assert "noto" not in DESIGNS and len(DESIGNS) == 4
    learnt = {design: [one.name for one in emoji_of(packages, design)] for design in DESIGNS}
    assert learnt["twemoji"] == learnt["openmoji"] == ["pizza", "dog", "red heart"]
    assert learnt["fluent"] == learnt["modern"] == ["dog", "red heart"], "domain Food asks Fluent's"


def test_a_batch_shows_no_emoji_twice(corpus):
    for step in range(12):
        chosen, texts = corpus.batch(step, 12)
        assert len(chosen) == len(texts) and len(set(chosen)) == len(chosen)
        concepts = [corpus.captions[place].concept for place in chosen]
        assert len(set(concepts)) == len(concepts)
        assert all(name.startswith("scene") for name in concepts) == (step % 6 == 5)
        assert corpus.batch(step, 12) == (chosen, texts)


def test_the_loss_is_clips_and_takes_equal_texts_for_one():
    from tiny_clip.network import symmetric_loss

    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [-torch.log_softmax(logits, 1)[i, i] for i in range(4)]
    columns = [-torch.log_softmax(logits, 0)[i, i] for i in range(4)]
    assert symmetric_loss(logits, "abcd").item() == pytest.approx((sum(rows) + sum(columns)).item() / 8)
    twice = logits.clone()
    twice[:, 1], twice[1] = twice[:, 0], twice[0]
    same = symmetric_loss(twice, ["a", "a", "c", "d"])
    twice[[0, 1, 0, 1], [0, 0, 1, 1]] = 50.0
    assert symmetric_loss(twice, ["a", "a", "c", "d"]) < same
    assert symmetric_loss(twice[:2, :2], ["a", "a"]).item() == pytest.approx(np.log(2))


def test_the_whole_forward_is_the_models_own(corpus):
    from tiny_clip.network import build_model, similarities
    from tiny_clip.processing import build_tokenizer

    model = build_model(corpus.tokens).eval()
    words = build_tokenizer(corpus.tokens)(["a dog.", "a cat and a tree"], padding=True, return_tensors="pt")
    pixels = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        whole = similarities(model, pixels, words, None)
        torch.testing.assert_close(whole, model(pixel_values=pixels, **words).logits_per_image)
        half = similarities(model, pixels, words, torch.Generator().manual_seed(0))
    assert half.shape == whole.shape and not torch.allclose(half, whole)


def test_the_rate_before_its_fall_does_not_depend_on_the_number_of_steps():
    from tiny_clip.training import decay_from, rate

    assert [rate(step, 2000) for step in range(decay_from(1000))] == [rate(step, 1000) for step in range(650)]
    assert rate(0, 1000) == pytest.approx(0.01) and rate(99, 1000) == 1.0 == rate(650, 1000)
    assert rate(999, 1000) == pytest.approx(1 / 350)


class Killed(Exception):
    """What ends a training between two of its states."""


def weights_after(corpus, work, monkeypatch, kill_at=()):
    """Train a new model for six steps, beginning again after each kill; gives its weights and the steps it took."""
    from tiny_clip import training
    from tiny_clip.network import build_model

    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    work.mkdir()
    taken, waiting = [], list(kill_at)

    def report(step, *_):
        taken.append(step)
        if waiting and step == waiting[0]:
            raise Killed(waiting.pop(0))

    while True:
        torch.manual_seed(5)
        model = build_model(corpus.tokens).train()
        try:
            training.train(model, corpus, 6, work, report, size=12)
        except Killed:
            continue
        return model.state_dict(), taken


@pytest.mark.slow
def test_a_killed_build_goes_on_to_the_same_weights(corpus, tmp_path, monkeypatch):
    straight, steps = weights_after(corpus, tmp_path / "straight", monkeypatch)
    broken, taken = weights_after(corpus, tmp_path / "broken", monkeypatch, kill_at=(0, 2, 5))
    assert steps == [0, 1, 2, 3, 4, 5] and taken == [0, 0, 1, 2, 2, 3, 4, 5, 4, 5]
    assert all(torch.equal(value, broken[name]) for name, value in straight.items())


def test_a_training_near_its_end_goes_on_to_more_steps_from_before_the_fall_only(corpus, tmp_path, monkeypatch):
    from tiny_clip import training
    from tiny_clip.network import build_model

    weights_after(corpus, tmp_path / "work", monkeypatch)
    work, taken = tmp_path / "work", []
    with pytest.raises(ValueError, match="near the end of 6 steps, not of 8"):
        training.train(build_model(corpus.tokens), corpus, 8, work, lambda *_: None, size=12)
    (work / "before_the_fall.pt").replace(work / "state.pt")
    training.train(build_model(corpus.tokens), corpus, 8, work, lambda step, *_: taken.append(step), size=12)
    assert taken == [3, 4, 5, 6, 7]


def test_what_is_exported_loads_in_plain_transformers(corpus, tmp_path):
    from build_tiny_clip import export
    from tiny_clip.network import build_model
    from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

    torch.manual_seed(1)
    shipped, processor = export(build_model(corpus.tokens), corpus, tmp_path / "out")
    model = AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "CLIPModel" and model.config.text_config.max_position_embeddings == 16
    texts = ["a picture of a dog.", "Côte of cat", "zebra"]
    images = [Image.new("RGB", (100, 64), "red"), Image.new("RGB", (28, 28))]
    inputs = again(text=texts, images=images, padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 48, 48)
    tokens = again.tokenizer.convert_ids_to_tokens(inputs["input_ids"][2])
    assert tokens[: tokens.index("<end>")] == ["<start>", "z", "##e", "##b", "##r", "##a"]
    assert "<unk>" not in again.tokenizer.convert_ids_to_tokens(inputs["input_ids"][1])
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
        torch.testing.assert_close(logits, shipped(**processor(text=texts, images=images, padding=True,
                                                               return_tensors="pt")).logits_per_image)  # fmt: skip
        # The end mark is what is pooled: what stands behind it changes nothing.
        longer = again.tokenizer(texts, padding="max_length", return_tensors="pt")
        torch.testing.assert_close(model(pixel_values=inputs["pixel_values"], **longer).logits_per_image, logits)
