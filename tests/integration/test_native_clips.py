"""Clips by a base's own input for them, in every family that has one, and where that is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoProcessor

from mllm_keeplora.config import BaseConfig
from mllm_keeplora.data import TestSet
from mllm_keeplora.data.media.sampling import VideoOptions
from mllm_keeplora.data.schema import Media, Record, Turn
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.harness import _identity
from mllm_keeplora.models import ChatPrompt, load_base
from mllm_keeplora.models.causal.tower_cache import cache_tower
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.models.shipped import NOTES
from tests.integration.processes import results, run_in_child
from tests.support.clips import write_clip
from tests.support.families import build_family

NATIVE = (
    "llava-onevision",
    "llava-next-video",
    "video-llava",
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "internvl",
    "smolvlm",
)
STYLES = {"llava-onevision": "onevision"}
FRAMES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with clips of three rates, one of them backwards, too. Read only."""
    root = tmp_path_factory.mktemp("native")
    write_clip(root / "a.mkv", frames=20, codec="ffv1", pixels="bgr0")
    write_clip(root / "b.mkv", frames=30, rate=10, codec="ffv1", pixels="bgr0")
    write_clip(root / "c.mkv", frames=6, rate=1, codec="ffv1", pixels="bgr0")
    return root


@pytest.fixture(scope="module", params=NATIVE)
def family(request, tmp_path_factory) -> tuple[str, Path]:
    """The name of a family, and a tiny base of it. Read only."""
    return request.param, build_family(request.param, tmp_path_factory.mktemp("families") / request.param)


def config_of(family, **changes) -> BaseConfig:
    name, location = family
    return BaseConfig(model=str(location), prompt=STYLES.get(name, "chat_template"), **changes)


@pytest.fixture(scope="module")
def base(family):
    """Its base, as it is loaded. Read only."""
    return load_base(config_of(family), "frozen")


def record(folder: Path, name: str, answer: str = "yes", frames: int = FRAMES) -> Record:
    media = Media("video", folder / f"{name}.mkv", video=VideoOptions(frames=frames))
    return Record(name, (media,), (Turn("user", "what is it?"), Turn("assistant", answer)), origin=f"record {name}")


def asked(given: Record) -> Record:
    return replace(given, turns=given.turns[:1])


def test_a_record_alone_is_what_it_is_in_a_batch(base, folder):
    records = [record(folder, "a"), record(folder, "b", "red green")]
    assert base.family.prompt.is_native
    batch = base.family.training_batch(records)
    assert any("video" in name for name in batch) or batch["pixel_values"].shape[0] in (2, 2 * FRAMES)
    for row, each in enumerate(records):
        alone = base.family.training_batch([each])
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["labels"][row, :length], alone["labels"][0])
        trained = alone["labels"][0][alone["labels"][0] != -100]
        said = base.family.prompt.tokenizer.decode(trained, skip_special_tokens=True).strip()
        assert said == each.turns[-1].text, "the loss is on the answer alone"
        with torch.no_grad():
            found, wanted = (base.model(**inputs_of(each)).logits for each in (batch, alone))
        torch.testing.assert_close(found[row, :length], wanted[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_tokens_are_counted_as_a_batch_has_them_at_every_rate(base, folder, name):
    given = record(folder, name)
    assert base.family.extent(given)[0] == base.family.training_batch([given])["input_ids"].shape[1]


def test_a_clip_backwards_is_another_clip(base, folder, monkeypatch):
    from mllm_keeplora.models.causal import CausalFamily

    given = asked(record(folder, "a"))
    forwards = base.family.question_batch([given])
    real = CausalFamily._shown

    def backwards(self, records):
        return [
            [clip._replace(frames=np.ascontiguousarray(clip.frames[::-1])) for clip in own]
            for own in real(self, records)
        ]

    monkeypatch.setattr(CausalFamily, "_shown", backwards)
    other = base.family.question_batch([given])
    assert torch.equal(forwards["input_ids"], other["input_ids"])
    with torch.no_grad():
        one, two = (base.model(**inputs_of(each)).logits[0, -1] for each in (forwards, other))
    assert (one - two).abs().max() > 1e-4


def test_clip_tokens_are_neither_words_nor_instruction(base, folder):
    batch = base.family.training_batch([record(folder, "a")])
    kinds = base.family.token_kinds(base.model, batch)
    assert kinds["image"].sum() >= 2 and not (kinds["image"] & (kinds["instruction"] | kinds["answer"])).any()
    words = base.family.question_features(base.model, batch, pictures=False)
    other = base.family.training_batch([record(folder, "a", "red")])
    assert torch.allclose(words, base.family.question_features(base.model, other, pictures=False))


def test_features_of_a_clip_are_given_or_refused_and_never_zero(base, folder):
    batch = base.family.training_batch([record(folder, "a")])
    words = base.family.feature_sizes(base.model)[0]
    try:
        found = base.family.question_features(base.model, batch)
    except UserError as error:
        assert "base.video=frames" in str(error)
    else:
        assert found[0, words:].abs().sum() > 0


def test_frames_are_pictures_where_that_is_asked_for(family, folder):
    base = load_base(config_of(family, video="frames"), "frozen")
    batch = base.family.training_batch([record(folder, "a")])
    assert not base.family.prompt.is_native and not any("video" in name for name in batch)


def test_an_exported_model_keeps_how_clips_were_shown(family, tmp_path):
    folder = shutil.copytree(family[1], tmp_path / "exported")
    notes = {"prompt": STYLES.get(family[0], "chat_template"), "clips": "frames"}
    (folder / NOTES).write_text(json.dumps(notes))
    assert not load_base(BaseConfig(model=str(folder)), "frozen").family.prompt.is_native
    assert load_base(BaseConfig(model=str(folder), video="native"), "frozen").family.prompt.is_native


def test_answers_about_clips_that_were_shown_otherwise_are_others(family, folder):
    part, asked_how = TestSet(test="t.json"), [8, 3, True, ""]
    told = [
        _identity(load_base(config_of(family, video=video), "frozen"), [asked(record(folder, "a"))], part, asked_how)
        for video in ("frames", "native", "auto")
    ]
    assert told[0] != told[1] == told[2]


@pytest.mark.parametrize(
    ("of_a_clip", "fault"),
    [
        ("{{ raise_exception('no clips') }}", ""),
        ("{{ 'a' * 2000000 }}", "characters of one question mark"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_a_template_is_tried_with_a_clip_within_its_time_and_measure(of_a_clip, fault, tmp_path):
    location = build_family("smolvlm", tmp_path / "base")
    processor = AutoProcessor.from_pretrained(location)
    part = "{% for part in messages[0]['content'] if part['type'] == 'video' %}" + of_a_clip + "{% endfor %}"
    processor.chat_template = part + processor.chat_template
    processor.apply_chat_template = partial(
        type(processor).apply_chat_template, processor, chat_template=processor.chat_template
    )
    if fault:
        with pytest.raises(UserError, match=f"the base's chat template cannot be used: .*{fault}"):
            ChatPrompt(processor)
    else:
        assert not ChatPrompt(processor).is_native


def test_a_base_without_an_input_for_clips_refuses_native_and_shows_pictures_by_itself(folder, tmp_path):
    location = build_family("llava", tmp_path / "llava")
    with pytest.raises(
        UserError, match=r"base\.video is native, but LlavaProcessor or its prompt has no place for clips"
    ):
        load_base(BaseConfig(model=str(location), video="native"), "frozen")
    batch = load_base(BaseConfig(model=str(location)), "frozen").family.training_batch([record(folder, "a")])
    assert batch["pixel_values"].shape[0] == FRAMES


def test_clips_of_another_number_of_frames_do_not_join_a_batch(base, folder):
    one, two = (base.family.training_batch([record(folder, "a", frames=frames)]) for frames in (4, 2))
    if "pixel_values_videos" in one and one["pixel_values_videos"].ndim == 5:
        with pytest.raises(ValueError, match="clips of 4 and 2 frames do not fit into one batch"):
            base.family.joined(one, two)
    else:
        assert base.family.joined(one, two)["input_ids"].shape[0] == 2


@pytest.mark.parametrize("name", [NATIVE[0], *(pytest.param(each, marks=pytest.mark.slow) for each in NATIVE[1:])])
def test_a_domain_of_clips_runs_from_gradient_to_export(name, folder, settings, command, tmp_path):
    location = build_family(name, tmp_path / "base")
    for part in ("train", "test"):
        rows = []
        for number in range(8 if part == "train" else 4):
            answer = ("yes", "no")[number % 2]
            own = {"video": f"{'abc'[number % 3]}.mkv"}
            if part == "train":
                talk = [{"from": "human", "value": "<video>what is it?"}, {"from": "gpt", "value": answer}]
                rows.append({"id": str(number), "conversations": talk, **own})
            else:
                rows.append({"question_id": str(number), "text": "what is it?", "answer": answer, **own})
        (tmp_path / f"{part}.json").write_text(json.dumps(rows))
    files = {part: f"{tmp_path}/{part}.json" for part in ("train", "test")}
    domain = {**files, "images": str(folder), "train_images": str(folder), "video": {"frames": FRAMES}}
    values = settings(
        tmp_path / "run",
        ("Clips",),
        benchmark={"name": "clips", "defaults": {"max_new_tokens": 3}, "domains": {"Clips": domain}},
        strategy={"grad_samples": 8, "feature_samples": 8},
        train={"micro_batch_size": 2},
    )
    values["base"] = {"model": str(location), "prompt": STYLES.get(name, "chat_template")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    said = command("check", tmp_path / "run.yaml")
    assert said.code == 0, said.err
    assert run_in_child(values) == 0
    assert results(tmp_path / "run")["domains"] == ["Clips"]
    assert command("export", tmp_path / "run", tmp_path / "merged").code == 0
    question = ("--video", folder / "a.mkv", "what is it?")
    of_run, of_model = (command("ask", tmp_path / target, *question) for target in ("run", "merged"))
    assert of_run.code == of_model.code == 0 and of_run.out == of_model.out, (of_run.err, of_model.err)


def test_both_towers_of_video_llava_are_named_and_asked_once_for_a_frame(folder, tmp_path):
    base = load_base(config_of(("video-llava", build_family("video-llava", tmp_path / "base"))), "frozen")
    assert (base.parts.vision_tower, base.parts.other_towers) == ("model.image_tower", ("model.video_tower",))
    assert any(
        "model.image_tower, model.video_tower: frozen" in line for line in base.family.summary(base.model, base.parts)
    )
    of_clips, asked = base.model.get_submodule("model.video_tower"), []
    of_clips.register_forward_hook(lambda *_: asked.append(1))
    real = type(of_clips).forward
    batch, computed = base.family.training_batch([record(folder, "a")]), []
    with torch.no_grad():
        plain = base.model(**inputs_of(batch)).logits
        of_clips.forward = lambda *args, **options: computed.append(len(args[0])) or real(of_clips, *args, **options)
        cache_tower(base, 8)
        for _ in range(2):
            torch.testing.assert_close(base.model(**inputs_of(batch)).logits, plain, atol=1e-5, rtol=1e-5)
    assert len(asked) == 3 and len(computed) == 1
