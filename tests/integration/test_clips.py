"""Records with clips: shown as pictures from check to answer, decoded once, refused where they are broken."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mllm_keeplora.config import BaseConfig
from mllm_keeplora.data.media.frames import FrameCache
from mllm_keeplora.data.media.images import read_image
from mllm_keeplora.data.media.sampling import VideoOptions
from mllm_keeplora.data.readers import read_train
from mllm_keeplora.models.base import load_base
from mllm_keeplora.report.page import strip
from tests.integration.processes import results, run_in_child
from tests.support.clips import number_of, write_clip

DRAWN = True  # a page shows strips of frames
FRAMES = 3
CLIPS = 12  # of both sets together


def write_clips(folder: Path) -> Path:
    """A domain of lossless clips, four frames long or five."""
    (folder / "clips").mkdir(parents=True)
    for part, count in (("train", 8), ("test", CLIPS - 8)):
        rows = []
        for number in range(count):
            name, place = f"clips/{part}{number}.mkv", ("left", "right")[number % 2]
            write_clip(folder / name, frames=4 + number % 2, codec="ffv1", pixels="bgr0", rate=4)
            if part == "train":
                talk = [{"from": "human", "value": "<video>\nwhere is the square ?"}, {"from": "gpt", "value": place}]
                rows.append({"id": f"{part}{number}", "video": name, "conversations": talk})
            else:
                question = {"text": "where is the square ?", "answer": place}
                rows.append({"question_id": f"{part}{number}", "video": name, **question})
        (folder / f"{part}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder with `Clips`, a domain. Read only."""
    return write_clips(tmp_path_factory.mktemp("clips") / "Clips").parent


@pytest.fixture(scope="module")
def config(clips, settings):
    """Function (output) -> the config of a run over the clips."""

    def build(output: Path, **changes) -> dict:
        parts = {"train": f"{clips}/Clips/train.json", "test": f"{clips}/Clips/test.json", "video": {"frames": FRAMES}}
        benchmark = {"name": "clips", "defaults": {"scorer": "exact", "max_new_tokens": 3}, "domains": {"Clips": parts}}
        return settings(output, ("Clips",), benchmark=benchmark, **changes)

    return build


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """A run over the clips, in which no clip is decoded twice. Read only."""
    output = tmp_path_factory.mktemp("runs") / "clips"
    again = ("mllm_keeplora.data.media.frames:read_clip", CLIPS + 1)
    assert run_in_child(config(output), kill=again) == 0
    return output


def test_a_sequence_learns_clips_and_answers_about_them(whole):
    assert results(whole)["domains"] == ["Clips"]
    rows = [json.loads(line) for line in (whole / "domains/01_Clips/predictions/Clips.jsonl").read_text().splitlines()]
    assert len(rows) == CLIPS - 8 and all("<video>" not in row["question"] for row in rows)


def test_a_second_run_decodes_nothing(whole, config, tmp_path):
    assert run_in_child(config(tmp_path / "run"), kill=("mllm_keeplora.data.media.frames:read_clip", 1)) == 0
    for name in ("predictions/Clips.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run/domains/01_Clips" / name).read_bytes() == (
            whole / "domains/01_Clips" / name
        ).read_bytes()


def test_the_page_shows_a_strip_of_frames(whole):
    encoded = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", (whole / "report.html").read_text())
    sizes = {Image.open(io.BytesIO(base64.b64decode(each))).size for each in encoded}
    assert (FRAMES * 50 - 2, 32 + 14) in sizes  # frames of 48 x 32, a gap, a line of seconds


def test_more_than_four_frames_stand_in_rows(clips):
    path = clips / "Clips/train.json"
    for frames, size in ((1, (48, 46)), (4, (198, 46)), (5, (198, 92)), (40, (198, 92))):
        media = read_train(path, path.parent, video=VideoOptions(frames=frames))[0].media[0]
        assert strip(media).size == size


def test_a_record_is_shown_with_the_seconds_of_its_frames(config, tmp_path, command):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config(tmp_path / "run")))
    said = command("check", tmp_path / "run.yaml", "--show", "Clips/1")
    assert said.code == 0 and "clip train1.mkv, frame 3 of 3 at 1.00 s: 48 x 32 pixels" in " ".join(said.out.split())


def test_a_clip_is_asked_about(whole, clips, command):
    asked = ("ask", whole, "--video", clips / "Clips/clips/test0.mkv", "where is the square ?")
    said = command(*asked)
    assert said.code == 0 and said.out.strip()
    assert command(*asked[:-1], "<video> where is the square ?").out == said.out
    said = command(*asked[:-1], "<video> <video> where ?")
    assert said.code == 2 and "the question has 2 video marks, but 1 clips are given" in said.err
    said = command("ask", whole, "--video", clips / "Clips/test.json", "where ?")
    assert said.code == 2 and "test.json cannot be read: " in said.err and "Traceback" not in said.err


def test_frames_as_pictures_are_the_same_pictures_named_one_by_one(world, clips, tmp_path):
    base = load_base(BaseConfig(model=str(world / "base")), "frozen")
    path = clips / "Clips/train.json"
    records = read_train(path, path.parent, video=VideoOptions(frames=FRAMES))[:2]
    rows = json.loads(path.read_text())[:2]
    for row, record in zip(rows, records, strict=True):
        names = []
        for media in record.as_pictures().media:
            names.append(f"{row['id']}_{media.frame}.png")
            read_image(media).save(tmp_path / names[-1])
        row["images"] = names
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<video>", "<image>" * FRAMES)
        del row["video"]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    named = base.family.training_batch(read_train(tmp_path / "d.json", tmp_path))
    shown = base.family.training_batch(records)
    assert named.keys() == shown.keys() and all(torch.equal(named[key], shown[key]) for key in named)


def test_a_check_tells_every_broken_clip_at_once(config, clips, tmp_path, command):
    broken = write_clips(tmp_path / "Clips")
    (broken / "clips/train0.mkv").unlink()
    (broken / "clips/train1.mkv").write_bytes(b"")
    whole = (broken / "clips/train2.mkv").read_bytes()
    (broken / "clips/train2.mkv").write_bytes(whole[: len(whole) // 2])
    write_clip(broken / "clips/sound.mp4", picture=False, sound=True).rename(broken / "clips/train3.mkv")
    Image.new("RGB", (8, 8)).save(broken / "clips/train4.mkv", "PNG")
    values = config(tmp_path / "run")
    values["benchmark"]["domains"]["Clips"] |= {"train": f"{broken}/train.json", "test": f"{broken}/test.json"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    said = command("check", tmp_path / "run.yaml")
    assert said.code == 2 and "Traceback" not in said.err
    told = said.out + said.err
    for number, words in enumerate(["does not exist", "0 bytes", "", "holds no video stream", "is none of mov"]):
        assert any(f"train.json record {number}: video " in line and words in line for line in told.splitlines()), told


def test_a_check_counts_clips_that_are_shorter_or_of_a_rate_that_varies(config, tmp_path, command):
    clips = write_clips(tmp_path / "Clips")
    write_clip(clips / "clips/train0.mkv", frames=1)
    write_clip(clips / "clips/train1.mkv", frames=8, stamps=[0, 1, 2, 3, 4, 50, 75, 100])
    values = config(tmp_path / "run")
    values["benchmark"]["domains"]["Clips"] |= {"train": f"{clips}/train.json", "test": f"{clips}/test.json"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    said = command("check", tmp_path / "run.yaml")
    told = " ".join((said.out + said.err).split())
    assert said.code == 0 and "1 clips are shorter than the frames asked for" in told, told
    assert "1 clips are of a rate that varies" in told and "video.clock: time" in told


def test_a_record_that_is_too_long_is_told_how_many_frames_fit(config, tmp_path, command):
    values = config(tmp_path / "run")
    values["benchmark"]["domains"]["Clips"]["video"] = {"frames": 40}
    values["train"]["max_length"] = 100
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    said = command("check", tmp_path / "run.yaml")
    assert said.code == 2 and "or set `video: {frames: " in said.out + said.err, said


def test_an_exported_model_is_asked_as_the_run_showed_its_clips(whole, clips, command, tmp_path):
    assert command("export", whole, tmp_path / "merged").code == 0
    assert json.loads((tmp_path / "merged/mllm_keeplora.json").read_text())["video"]["frames"] == FRAMES
    asked = ("--video", clips / "Clips/clips/test0.mkv", "where is the square ?")
    assert command("ask", tmp_path / "merged", *asked).out == command("ask", whole, *asked).out


def test_frames_are_what_was_drawn(clips):
    path = clips / "Clips/train.json"
    record = read_train(path, path.parent, video=VideoOptions(frames=FRAMES))[0]
    shown = [number_of(np.asarray(read_image(media))) for media in record.as_pictures().media]
    assert shown == [0, 1, 3] == [number_of(frame) for frame in FrameCache(0).clip(record.media[0]).frames]
