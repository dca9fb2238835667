"""Make the bundled base model `tiny-llava`: draw its corpus, train it in two stages, gate it, write it.

Stops and continues at any time: the work folder holds the corpus and a state that is written every two minutes.

    python scripts/build_tiny_llava.py --work /path/to/work
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tiny_llava.corpus import Corpus
from tiny_llava.gate import general_gate
from tiny_llava.network import DenseHeads, build_model
from tiny_llava.processing import build_processor
from tiny_llava.stages import train_questions, train_tower

ASSETS = Path(__file__).resolve().parent.parent / "mllm_keeplora" / "assets" / "tiny_llava"
log = logging.getLogger("tiny_llava")

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# tiny-llava

A real but miniature `LlavaForConditionalGeneration` ({parameters:.2f} million parameters): a CLIP vision tower for
64 x 64 pictures, a two-layer projector and a Llama language model with a vocabulary of {vocabulary} tokens. It exists
so that continual instruction tuning can be shown and tested on a CPU without downloading anything. It knows nothing
beyond its drawings.

- **Data**: {pictures:,} drawn general pictures (shapes, textures, lines, bars, arrows, scikit-learn's hand-written
  digits, pieces of scikit-learn's two sample photographs) with questions, as many mosaics of digits and shapes for the
  tower, and text-only facts of the five miniature domains. No domain picture.
- **Training**: {tower_steps:,} steps of the tower on dense cell targets, then {question_steps:,} steps of everything on
  questions; {hours:.2f} hours on two shared CPU cores. Made by `scripts/build_tiny_llava.py`.
- **Prompt**: `<s> <image> user: what color is the circle ? assistant: red </s>`, written by the chat template.
- **Gates**: exact match of greedy answers of the bf16 weights as shipped on the {count} questions of `mini_dcl`'s
  general test set (digits and photographs that training never saw), in percent.
- **Licence**: Apache-2.0.

| question type | exact match | questions |
|---|---|---|
{gates}
"""


class Report:
    """Progress with an estimate of the time left, and a log line now and then."""

    def __init__(self, progress: Progress, output: Path | None, processor):
        self.progress, self.tasks, self.output, self.processor = progress, {}, output, processor

    def __call__(self, stage: str, step: int, steps: int, loss: float, note: str) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=steps, completed=step)
        self.progress.update(self.tasks[stage], completed=step + 1, description=f"{stage} loss {loss:.3f}")
        if step % 25 == 0 or step + 1 == steps:
            log.info("%s step %d/%d loss %.3f %s", stage, step, steps, loss, note)

    def checkpoint(self, model, step: int) -> None:
        """Write an intermediate model with the gate of a few questions; only process 0 does, the others wait."""
        if self.output is None:
            return
        gates = general_gate(model, self.processor, 300)
        model.train()
        log.info("step %d gate %s", step, " ".join(f"{k}={v:.0f}" for k, (v, _) in gates.items()))
        export(model, self.processor, self.output)


def export(model, processor, output: Path, card: str = "Intermediate state, to be replaced.\n") -> None:
    """Write bf16 safetensors, configs, processor and model card."""
    output.mkdir(parents=True, exist_ok=True)
    copy = build_model().to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(output)
    processor.save_pretrained(output)
    (output / "README.md").write_text(card)


def train(rank: int, options: argparse.Namespace) -> None:
    """One process of the training; process 0 reports, exports and gates."""
    level = logging.INFO if rank == 0 else logging.ERROR
    logging.basicConfig(filename=options.work / "train.log", level=level, format="%(asctime)s %(message)s")
    store = dist.FileStore(str(options.work / "rendezvous"), options.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.processes)
    torch.set_num_threads(options.threads)
    torch.manual_seed(5)
    corpus = Corpus(options.work / "corpus", options.pictures, num_twins=3000)
    log.info("corpus of %d pictures, %d question types", len(corpus), len(corpus.kinds))
    model, heads, processor = build_model().train(), DenseHeads(), build_processor()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=rank > 0) as progress:
        report = Report(progress, options.output if rank == 0 else None, processor)
        train_tower(model, heads, corpus, options.tower_steps, options.work, report)
        train_questions(model, heads, corpus, options.question_steps, options.work, report)
    if rank == 0:
        finish(model, processor, options)
    dist.destroy_process_group()


def finish(model, processor, options: argparse.Namespace) -> None:
    """Gate the weights as they ship (bf16) and write everything."""
    model = model.to(torch.bfloat16).float()
    gates = general_gate(model, processor)
    for kind, (value, count) in sorted(gates.items(), key=lambda item: -item[1][0]):
        Console().print(f"{kind:20s} {value:5.1f}  of {count}")
        log.info("final %s %.1f", kind, value)
    states = [torch.load(options.work / f"{stage}.0.pt", weights_only=True) for stage in ("tower", "questions")]
    card = CARD.format(
        parameters=model.num_parameters() / 1e6,
        vocabulary=len(processor.tokenizer),
        pictures=options.pictures,
        tower_steps=options.tower_steps,
        question_steps=options.question_steps,
        hours=sum(state["seconds"] for state in states) / 3600,
        count=gates["all"][1],
        gates="\n".join(f"| {kind} | {value:.1f} | {count} |" for kind, (value, count) in sorted(gates.items())),
    )
    export(model, processor, options.output, card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the corpus and the resumable state")
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--pictures", type=int, default=50_000)
    parser.add_argument("--tower-steps", type=int, default=1800)
    parser.add_argument("--question-steps", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=2, help="the global batch is split over them")
    parser.add_argument("--threads", type=int, default=1, help="per process")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "rendezvous").unlink(missing_ok=True)
    Corpus(options.work / "corpus", options.pictures, num_twins=3000)
    torch.multiprocessing.spawn(train, (options,), options.processes)


if __name__ == "__main__":
    main()
