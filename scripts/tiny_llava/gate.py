"""How well a base answers general questions, by real greedy generation through its processor."""

from __future__ import annotations

import torch
from PIL import Image

from .corpus import held_out_general


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
        images = [Image.fromarray(p) for p in pictures[start : start + batch_size]]
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
        outputs = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answers += processor.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [a.strip() for a in answers]


def general_gate(model, processor, count: int = 1000) -> dict[str, float]:
    """Exact match in percent on held-out general questions, overall ("all") and per question type."""
    records = held_out_general(count)
    answers = greedy_answers(model, processor, [r[0] for r in records], [r[2] for r in records])
    right: dict[str, list[bool]] = {}
    for (_, kind, _, gold), answer in zip(records, answers, strict=True):
        right.setdefault("all", []).append(answer == gold)
        right.setdefault(kind, []).append(answer == gold)
    return {kind: 100 * sum(marks) / len(marks) for kind, marks in right.items()}
