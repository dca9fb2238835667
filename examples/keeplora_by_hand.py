"""KeepLoRA on two domains, by hand: load, keep, and for each domain probe, open, train, keep more, merge, ask.

Usage: python examples/keeplora_by_hand.py [BASE DATA DATA] [--lr 8e-3 ...]
BASE is a LLaVA in transformers' format, DATA a folder of MLLM-DCL's layout. What is learnt is what `mllm-keeplora run`
learns (tests/integration/test_examples.py). Equations are those of KeepLoRA, arXiv 2601.19659; they hold for every
linear layer y = x W^T on its own, W of shape (d_out, d_in).
"""

import argparse
import hashlib
import json
import math
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, get_cosine_schedule_with_warmup

from mllm_keeplora import linalg
from mllm_keeplora.mini.write import ensure_mini_dcl

SETTINGS = {"rank": 16, "alpha": 32.0, "samples": 128, "energy_weights": 0.6, "energy_features": 0.99}
TRAINING = {"lr": 8e-3, "epochs": 1, "batch": 32, "warmup": 0.05, "seed": 0, "answer_tokens": 8}
parser = argparse.ArgumentParser()
parser.add_argument("base", nargs="?", default=Path(linalg.__file__).parents[1] / "assets" / "tiny_llava")
parser.add_argument("data", nargs="*", type=Path)
for name, value in {**SETTINGS, **TRAINING}.items():
    parser.add_argument(f"--{name}", type=type(value), default=value)
args = parser.parse_args()
args.data = args.data or [ensure_mini_dcl() / "RS", ensure_mini_dcl() / "Med"]  # drawn at first use
scale = args.alpha / args.rank

# -- load: a frozen model; what learns are the linear layers of its language model and of its projector ----------------
model = AutoModelForImageTextToText.from_pretrained(args.base, dtype=torch.float32).requires_grad_(False).eval()
processor = AutoProcessor.from_pretrained(args.base)
parts = ("model.language_model.", "model.multi_modal_projector.")
layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(parts)}
linears = torch.nn.ModuleList(layers.values())


def text_of(turns, open_end=False):
    """A conversation as the chat template puts it, the picture before its first question."""
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[0]["content"].insert(0, {"type": "image"})
    return processor.apply_chat_template(messages, add_generation_prompt=open_end, tokenize=False)


def inputs_of(folder, records, texts, side):
    """Model inputs (b, t) of texts and their records' pictures."""
    pictures = [[Image.open(folder / record["image"]).convert("RGB")] for record in records]
    how = {"padding": True, "padding_side": side, "add_special_tokens": False, "return_tensors": "pt"}
    return processor(text=texts, images=pictures, **how)


def training_batch(folder, records):
    """Model inputs of conversations, and their labels: -100 everywhere but on the answers."""
    roles = {"human": "user", "gpt": "assistant"}
    talks = [[(roles[t["from"]], t["value"].replace("<image>\n", "")) for t in r["conversations"]] for r in records]
    inputs = inputs_of(folder, records, [text_of(talk) for talk in talks], "right")
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, talk in enumerate(talks):
        starts = [text_of(talk[:i], open_end=i % 2 == 1) for i in range(1, len(talk) + 1)]  # up to each turn's end
        ends = [len(ids) for ids in processor.tokenizer(starts, add_special_tokens=False)["input_ids"]]
        more = int(inputs["attention_mask"][row].sum()) - ends[-1]  # a picture is one token of the text alone
        for question, answer in zip(ends[::2], ends[1::2], strict=True):
            labels[row, question + more : answer + more] = inputs["input_ids"][row, question + more : answer + more]
    return inputs, labels


def token_losses(inputs, labels):
    """Cross entropy (n,) of every token of an answer, and the number (n,) of the record that it belongs to."""
    rows, before = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    logits = model(**inputs).logits[rows, before]
    return torch.nn.functional.cross_entropy(logits, labels[rows, before + 1], reduction="none"), rows


def add_branch(A, B, layer, inputs, output):  # y + alpha / r B A x
    return output + inputs[0] @ A.T @ B.T * scale


def add_features(moments, layer, inputs):
    x = inputs[0]  # the projector's are patches of pictures; all others are tokens, of which padding does not count
    moments.update(x[is_token] if x.shape[:2] == is_token.shape else x.flatten(0, -2))


# -- keep the main input directions of every pre-trained weight, W = U S V^T: Q = V[:, :p], Eq. (1) --------------------
Q = {name: linalg.principal_subspace(layer.weight, args.energy_weights) for name, layer in layers.items()}
kept = {name: linalg.Basis.from_columns(columns) for name, columns in Q.items()}
learnt = []  # A and B of each domain
for index, folder in enumerate(args.data, start=1):
    records = json.loads((folder / "train.json").read_text())
    count = min(args.samples, len(records))
    some = [records[i * len(records) // count] for i in range(count)]  # evenly spread
    probes = [training_batch(folder, some[i : i + args.batch]) for i in range(0, count, args.batch)]

    # -- probe: G, the mean gradient of the records' losses at the weights before this domain, Eq. (2) -----------------
    linears.requires_grad_(True)
    for inputs, labels in probes:
        losses, rows = token_losses(inputs, labels)
        (losses / rows.bincount()[rows]).sum().backward()  # a record's loss is the mean over its answers' tokens
    G = {name: layer.weight.grad / count for name, layer in layers.items()}
    linears.requires_grad_(False).zero_grad()

    # -- open: G - G Q Q^T = U S V^T, A = V[:, :r]^T, Eqs. (3), (4); B = 0, Eq. (5b): nothing changes yet --------------
    A = {name: linalg.top_residual_directions(G[name], kept[name], args.rank) for name in layers}
    B = {name: torch.zeros(layer.out_features, len(A[name]), requires_grad=True) for name, layer in layers.items()}
    branches = [each.register_forward_hook(partial(add_branch, A[name], B[name])) for name, each in layers.items()]

    # -- train B alone: since A Q = 0, whatever B learns, the change B A is blind to all that is kept ------------------
    trained = [each for each in B.values() if each.numel()]
    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0.0)
    steps = math.ceil(len(records) / args.batch) * args.epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(steps * args.warmup), steps)
    seed = hashlib.sha256(f"{args.seed}/{index:02d}_{folder.name}/train".encode()).digest()[:4]  # as a run seeds it
    for epoch in range(args.epochs):
        dice = torch.Generator().manual_seed((int.from_bytes(seed, "big") >> 1) + epoch)
        for chosen in torch.randperm(len(records), generator=dice).split(args.batch):
            token_losses(*training_batch(folder, [records[i] for i in chosen]))[0].mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    # -- keep more: the fewest directions of the features X outside Q that hold their energy, Eqs. (8)-(10) ------------
    moments = {name: linalg.MomentAccumulator(layer.in_features, torch.float64) for name, layer in layers.items()}
    looks = [each.register_forward_pre_hook(partial(add_features, moments[name])) for name, each in layers.items()]
    for inputs, _ in probes:
        is_token = inputs["attention_mask"].bool()
        with torch.no_grad():
            model(**inputs)
    for name in layers:
        kept[name].grow(moments[name], args.energy_features)

    # -- merge: W + alpha / r B A, Eq. (7); the branch is gone, the model as large and as fast as before ---------------
    for hook in branches + looks:
        hook.remove()
    for name, layer in layers.items():
        layer.weight += scale * (B[name].detach() @ A[name])
    learnt.append((A, B))

    # -- ask: the share of test questions of each domain so far that are answered word for word ------------------------
    for asked in args.data[:index]:
        questions, right = json.loads((asked / "test.json").read_text()), 0
        for some in [questions[i : i + args.batch] for i in range(0, len(questions), args.batch)]:
            inputs = inputs_of(asked, some, [text_of([("user", each["text"])], True) for each in some], "left")
            written = model.generate(**inputs, max_new_tokens=args.answer_tokens, do_sample=False)
            answers = processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(a.strip().lower() == each["answer"].lower() for a, each in zip(answers, some, strict=True))
        print(f"after {folder.name}: {100 * right / len(questions):.1f} % of {asked.name}")
