"""CL-VISTA as it is published: names without suffix, answers by place, and nothing that is left out without a word."""

import json
import shutil

import pytest

from mllm_keeplora.checks.run import check_run
from mllm_keeplora.config import load_config
from mllm_keeplora.data.loading import load_benchmark
from mllm_keeplora.data.media.images import Looks
from mllm_keeplora.errors import UserError
from tests.support.clips import write_clip

TASKS = ("Counting", "Space", "Traffic", "Movie", "GUI", "Science", "Sports", "STAR")
SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with all tasks, four questions each. Read only."""
    root = tmp_path_factory.mktemp("CL-VISTA")
    benchmark = load_benchmark(load_config("mini_dcl", ["benchmark=cl_vista", f"data_root={root}", "domains=null"]))
    made = {end: write_clip(root / f"any{end}", frames=9, codec="mpeg4") for end in SUFFIXES}
    for name, part in benchmark.domains.items():
        (root / name / "clips").mkdir(parents=True)
        for number, end in enumerate(SUFFIXES):
            shutil.copy(made[end], root / name / f"clips/v.{number}{end}")
        talk = [{"from": "human", "value": "<video>\nHow many?"}, {"from": "gpt", "value": "2"}]
        train = [
            {"video": f"{name}/clips/v.{number}{end}", "conversations": talk} for number, end in enumerate(SUFFIXES)
        ]
        asked = [
            {"video_name": f"{name}/clips/v.{number}", "question": "How many?", "question_id": number}
            for number in range(4)
        ]
        for file, rows in (
            (part.train, train),
            (part.test, asked),
            (part.references, [{"answer": str(n)} for n in range(4)]),
        ):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(json.dumps(rows))
    return root


def loaded(root, *changes):
    return load_benchmark(
        load_config("mini_dcl", ["benchmark=cl_vista", f"data_root={root}", "domains=null", *changes])
    )


def test_the_shipped_benchmark_reads_the_published_layout(published):
    benchmark = loaded(published)
    assert tuple(benchmark.domains) == TASKS
    for name in TASKS:
        train, test = benchmark.train_records(name), benchmark.test_records(name)
        assert [media.path.suffix for record in test for media in record.media] == list(SUFFIXES)
        assert [record.answer for record in test] == ["0", "1", "2", "3"]
        assert list(Looks().faults([*train, *test])) == []
        assert {record.media[0].video.frames for record in (*train, *test)} == {8}
    assert "Space" not in loaded(published, "domains=without_space").domains


def test_answers_of_another_number_belong_to_other_questions(published, tmp_path):
    root = shutil.copytree(published, tmp_path / "copy")
    answers = root / "STAR/json_row/test_answers_2k.json"
    answers.write_text(json.dumps([{"answer": "0"}] * 3))
    with pytest.raises(UserError, match=r"test_answers_2k\.json has 3 answers for 4 questions; they go by place"):
        loaded(root).test_records("STAR")
    answers.write_text(json.dumps([{"answer": "0"}] * 3 + [{"text": "0"}]))
    with pytest.raises(UserError, match=r"record 3: answer 3 of .* must be \{answer: text\}, got"):
        loaded(root).test_records("STAR")


def test_a_question_without_its_clip_is_told_and_not_left_out(published, tmp_path):
    root = shutil.copytree(published, tmp_path / "copy")
    (root / "GUI/clips/v.2.mov").unlink()
    records = loaded(root).test_records("GUI")
    assert len(records) == 4
    [fault] = Looks().faults(records)
    assert "test_questions_2k.json record 2: video 'GUI/clips/v.2' does not exist in " in fault


def test_rows_of_replay_may_show_clips_of_other_tasks(published, tmp_path):
    root = shutil.copytree(published, tmp_path / "copy")
    path = root / "STAR/json_row/train_data_25k.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, {**rows[0], "video": "Movie/clips/v.0.mp4"}]))
    assert list(Looks().faults(loaded(root).train_records("STAR"))) == []


def test_a_check_says_once_that_a_judge_is_needed(published):
    config = load_config("mini_dcl", ["benchmark=cl_vista", f"data_root={published}", "domains=null"])
    [told] = [note for note in check_run(config, look_inside=False).notes if "cannot be graded" in note]
    assert told.startswith(f"{', '.join(TASKS)}: vista_judge cannot be graded offline: ")
