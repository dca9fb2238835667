"""Miniatures of the public benchmarks: a few records per domain in the exact published folders and formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

TRAIN, TEST = 6, 4


def write_mllm_dcl(root: Path) -> None:
    """RS/{images, train.json, test.json} and so on; test questions without image marks."""
    golds = {
        "RS": ["Yes", "between 0 and 10"],
        "Med": ["no"],
        "AD": ["Going ahead."],
        "Sci": ["A"],
        "Fin": ["Yes", "B"],
    }
    for name, answers in golds.items():
        prefix = "AI2D_" if name == "Sci" else ""
        picture = _pictures(root / name / "images", prefix)
        talks = [_talk("Is there a road?", answers[i % len(answers)]) for i in range(TRAIN)]
        _write(root / name / "train.json", [
            {"question_id": str(i), "image": f"images/{picture(i)}", **talk} for i, talk in enumerate(talks)
        ])  # fmt: skip
        _write(root / name / "test.json", [
            {"question_id": str(i), "image": f"images/{picture(i)}", "text": "Is there a road?",
             "answer": answers[i % len(answers)]}
            for i in range(TEST)
        ])  # fmt: skip


def write_ucit(root: Path) -> None:
    """Six tasks; image paths relative to the root; captions have COCO annotations beside their questions."""
    tasks = {
        "ImageNet-R": "train.json", "ArxivQA": "train_4w.json", "VizWiz-caption": "train.json", "IconQA": "train.json",
        "CLEVR-Math": "train_4w.json", "Flickr30k-cap": "train_brief_4w.json",
    }  # fmt: skip
    for task, train in tasks.items():
        picture = _pictures(root / task / "pictures")
        answer = "a red square on the left" if task.endswith(("cap", "caption")) else "red"
        _write(root / task / train, [
            {"id": str(i), "image": f"./{task}/pictures/{picture(i)}", **_talk("What is shown?", answer)}
            for i in range(TRAIN)
        ])  # fmt: skip
        _write(root / task / "test_3000.json", [
            {"question_id": str(i), "image": f"./{task}/pictures/{picture(i)}", "text": "What is shown?",
             "answer": answer}
            for i in range(TEST)
        ])  # fmt: skip
        if "cap" in task:
            captions = [(i + 1, f"{answer} {word}") for i in range(TEST) for word in ("here", "in the picture")]
            _write(root / task / "val_coco_type_3000.json", {
                "images": [{"id": i + 1} for i in range(TEST)],
                "annotations": [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)],
            })  # fmt: skip


def write_mllm_acl(root: Path) -> None:
    """Four abilities, tested on public sets in folders of their own; two of them without a gold answer."""
    tests = {"OCR": "OCR_test", "Math": "Math_test", "VP": "CV-Benchv2", "APP": "APP_test"}
    for name, test in tests.items():
        picture, tested = _pictures(root / name / "images"), _pictures(root / test / "images")
        _write(root / name / "train.json", [
            {"id": str(i), "image": f"images/{picture(i)}", **_talk("What is written?", "red")} for i in range(TRAIN)
        ])  # fmt: skip
        golds = {"OCR": {"answer": ["red", "RED"]}, "VP": {"answer": "2"}}.get(name, {})
        _write(root / test / "test.json", [
            {"question_id": str(i), "image": f"images/{tested(i)}", "text": "What is written?", **golds}
            for i in range(TEST)
        ])  # fmt: skip


def write_coin(root: Path) -> None:
    """Eight tasks of instructions below Instruction_Type1; pictures in their own folders below the root."""
    tasks = {
        "ScienceQA": ("test", "A"), "TextVQA": ("val", "red"), "ImageNet": ("test", "red"), "GQA": ("test", "left"),
        "VizWiz": ("val", "red"), "Grounding": ("test", "[0.10,0.20,0.50,0.60]"), "VQAv2": ("val", "left"),
        "OCR-VQA": ("test", "red"),
    }  # fmt: skip
    for task, (split, answer) in tasks.items():
        picture = _pictures(root / task / "images")
        folder = root / "Instruction_Type1" / task
        _write(folder / "train.json", [
            {"id": str(i), "image": f"./{task}/images/{picture(i)}", **_talk("What is it?", answer)}
            for i in range(TRAIN)
        ])  # fmt: skip
        gold = {"answer_bbox": answer, "size": [32, 32]} if task == "Grounding" else {"answer": answer}
        _write(folder / f"{split}.json", [
            {"question_id": str(i), "image": f"./{task}/images/{picture(i)}", "text": "What is it?", **gold}
            for i in range(TEST)
        ])  # fmt: skip
    humans = [{"question_id": i, "answers": ["red"] * 7 + ["dark red", "maroon", "blue"]} for i in range(TEST)]
    _write(root / "TextVQA" / "TextVQA_0.5.1_val.json", {"data": humans})


MINIATURES: dict[str, Callable[[Path], None]] = {
    "mllm_dcl": write_mllm_dcl,
    "ucit": write_ucit,
    "mllm_acl": write_mllm_acl,
    "coin": write_coin,
}


def _talk(question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns}


def _pictures(folder: Path, prefix: str = "") -> Callable[[int], str]:
    """Three pictures, none of them square; a name for any number."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        Image.new("RGB", (48 + 8 * number, 32), (60 * number, 90, 200)).save(folder / f"{prefix}{number}.png")
    return lambda number: f"{prefix}{number % 3}.png"


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
