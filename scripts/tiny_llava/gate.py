"""How well a base answers the general test set of `mini_dcl`, by real greedy generation through its processor."""

from __future__ import annotations

import json

import torch
from PIL import Image

from mllm_keeplora.mini import ensure_mini_dcl


@torch.no_grad()
def greedy_answers(model, processor, pictures: list, questions: list[str], batch_size: int = 64) -> list[str]:
    """Greedy answers to one question per picture."""
    model.eval()
    answers = []
    for start in range(0, len(questions), batch_size):
        messages = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}]
            for q in questions[start : start + batch_size]
        ]
        texts = [processor.apply_chat_template(m, add_generation_prompt=True) for m in messages]
        images = pictures[start : start + batch_size]
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
        outputs = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answers += processor.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [a.strip() for a in answers]


def general_gate(model, processor, count: int | None = None) -> dict[str, tuple[float, int]]:
    """Exact match on the general test set, overall ("all") and per question type.

    Args:
        count: the first so many questions; None for all.

    Returns:
        Question type -> (percent, number of questions).
    """
    folder = ensure_mini_dcl() / "general"
    records = json.loads((folder / "test.json").read_text())[:count]
    pictures = [Image.open(folder / record["image"]).convert("RGB") for record in records]
    answers = greedy_answers(model, processor, pictures, [record["text"] for record in records])
    right: dict[str, list[bool]] = {}
    for record, answer in zip(records, answers, strict=True):
        for kind in ("all", record["type"]):
            right.setdefault(kind, []).append(answer == record["answer"])
    return {kind: (100 * sum(marks) / len(marks), len(marks)) for kind, marks in right.items()}
