"""The drawn domains: determinism, known words, balance, a picture for every fact."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from mllm_keeplora.mini import ad, draw, fin, general, med, rs, sci
from mllm_keeplora.mini.draw import COLORS, SHAPES, TEXTURES, Canvas, digit_mask, photo_patch
from mllm_keeplora.mini.general_scenes import CHANNELS
from mllm_keeplora.mini.vocabulary import CHARACTERS, SPECIAL_TOKENS, WORDS, vocabulary

MODULES = {"general": general, "rs": rs, "med": med, "ad": ad, "sci": sci, "fin": fin}
DOMAINS = {name: module for name, module in MODULES.items() if name != "general"}


def samples(module, count, held_out=False):
    return [module.sample(np.random.default_rng((3, i)), held_out=held_out) for i in range(count)]


@pytest.mark.parametrize("name", MODULES)
def test_same_seed_gives_same_picture_and_questions(name):
    first, again = samples(MODULES[name], 5), samples(MODULES[name], 5)
    assert [s.image.tobytes() for s in first] == [s.image.tobytes() for s in again]
    assert [(s.qas, s.facts) for s in first] == [(s.qas, s.facts) for s in again]


@pytest.mark.parametrize("name", MODULES)
def test_pictures_are_small_rgb_and_all_different(name):
    pictures = [s.image for s in samples(MODULES[name], 30)]
    assert {(p.mode, p.size) for p in pictures} == {("RGB", (64, 64))}
    assert len({p.tobytes() for p in pictures}) == 30


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("held_out", [False, True])
def test_every_word_is_in_the_vocabulary(name, held_out):
    known = set(WORDS) | set(CHARACTERS)
    used = set()
    for sample in samples(MODULES[name], 150, held_out):
        for _, question, answer in sample.qas:
            assert question.endswith(" ?") and question == question.lower()
            assert 1 <= len(answer.split()) <= 3 and answer.replace(" ", "").isalnum()
            used |= {*question.split(), *answer.split()}
        used |= {word for fact in sample.facts for word in fact.split()}
    assert used <= known, sorted(used - known)


def test_vocabulary_has_no_duplicates_and_starts_with_the_special_tokens():
    tokens = vocabulary()
    assert len(tokens) == len(set(tokens))
    assert tuple(tokens[: len(SPECIAL_TOKENS)]) == SPECIAL_TOKENS


@pytest.mark.parametrize("name", DOMAINS)
def test_domain_has_five_to_nine_types_with_two_to_seven_answers(name):
    answers = defaultdict(Counter)
    for sample in samples(DOMAINS[name], 400):
        for kind, _, answer in sample.qas:
            answers[kind][answer] += 1
    assert 5 <= len(answers) <= 9
    for kind, counts in answers.items():
        assert 2 <= len(counts) <= 7, kind


@pytest.mark.parametrize("name", MODULES)
def test_a_question_text_stands_for_one_type_and_has_one_answer_per_picture(name):
    kinds = {}
    for sample in samples(MODULES[name], 150):
        texts = [question for _, question, _ in sample.qas]
        assert len(texts) == len(set(texts))
        for kind, question, _ in sample.qas:
            assert kinds.setdefault(question, kind) == kind


def test_general_cells_are_within_their_channels():
    cells = np.stack([s.cells for s in samples(general, 150)])
    assert cells.shape == (150, len(CHANNELS), 8, 8)
    for channel, size in enumerate(CHANNELS.values()):
        assert cells[:, channel].max() < size


def test_general_never_shows_a_domain():
    domain_questions = {q for module in DOMAINS.values() for s in samples(module, 100) for _, q, _ in s.qas}
    general_questions = {q for s in samples(general, 300) for _, q, _ in s.qas}
    assert not domain_questions & general_questions


@pytest.mark.parametrize("kind", SHAPES)
def test_every_shape_leaves_ink(kind):
    canvas = Canvas((0, 0, 0))
    canvas.shape(kind, 32, 32, 10, COLORS["red"])
    pixels = np.asarray(canvas.finish(np.random.default_rng(0), noise=0))
    assert 60 < (pixels[..., 0] > 100).sum() < 500


@pytest.mark.parametrize("kind", TEXTURES)
def test_every_texture_fills_its_region_only(kind):
    canvas = Canvas((0, 0, 0))
    canvas.texture(32, 0, 32, kind, (200, 0, 0), (0, 0, 200), np.random.default_rng(0))
    pixels = np.asarray(canvas.finish(np.random.default_rng(0), noise=0)).astype(int)
    assert (pixels[:32, 32:].sum(-1) > 100).all()
    assert pixels[:, :31].sum() == 0 and pixels[33:].sum() == 0


def test_unknown_shape_and_texture_are_refused():
    with pytest.raises(ValueError, match="shape must be one of"):
        Canvas((0, 0, 0)).shape("blob", 1, 1, 1, (0, 0, 0))
    with pytest.raises(ValueError, match="texture must be one of"):
        Canvas((0, 0, 0)).texture(0, 0, 8, "woolly", (0, 0, 0), (0, 0, 0), np.random.default_rng(0))


def test_digits_of_training_and_test_do_not_overlap(monkeypatch):
    targets = np.arange(1797) % 10
    images = np.where(np.arange(1797)[:, None, None] < 1400, 1.0, 10.0) * np.ones((1797, 8, 8))
    monkeypatch.setattr(draw, "_digits", lambda: (images, targets))

    def middle(held_out):
        masks = [digit_mask(np.random.default_rng(i), i % 10, 30, held_out) for i in range(200)]
        return {mask.getpixel((30, 30)) for mask in masks}

    assert max(middle(False)) < 40 and middle(True) == {220}


def test_training_digits_vary_and_held_out_ones_stay_as_written():
    def masks(held_out):
        drawn = {digit_mask(np.random.default_rng(i), 3, 30, held_out).tobytes() for i in range(400)}
        return len(drawn)

    assert masks(False) > 390 > 60 > masks(True)


def test_photographs_of_training_and_test_do_not_overlap():
    patch = photo_patch(np.random.default_rng(0), 32, True)
    assert patch.size == (64, 64)
    assert patch.tobytes() != photo_patch(np.random.default_rng(0), 32, False).tobytes()


def test_a_choice_between_two_objects_does_not_depend_on_who_is_named_first():
    answers, count = {}, 0
    for number, sample in enumerate(samples(general, 300)):
        for kind, question, answer in sample.qas:
            if kind not in ("left or right", "above or below", "bigger", "longer"):
                continue
            which, named = question.removesuffix(" ?").split(" , ")
            colours = tuple(sorted(named.removeprefix("the ").split(" or the ")))
            assert answer in colours
            assert answers.setdefault((number, which, colours), answer) == answer
            count += 1
    assert count > 300
    opposite = {"left": "right", "above": "below"}
    pairs = [
        (answer, answers.get((number, which.replace(word, other), colours)))
        for (number, which, colours), answer in answers.items()
        for word, other in opposite.items()
        if which.endswith(word)
    ]
    assert len(pairs) > 50 and all(one != other for one, other in pairs)
