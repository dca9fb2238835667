"""What `tiny-clip` must do without having been taught: name Noto's animals, sort Noto's emoji, read MNIST's digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mini_mtil import names
from mini_mtil.domains import mnist
from mini_mtil.sources import Emoji, emoji, on_white, picture
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from .processing import SIZE

# In percent. Digits: those that it learns are of 8 x 8 grey levels, those that it is asked are MNIST's.
GATES = {"animals": 30.0, "subgroups": 25.0, "digits": 20.0}


@torch.no_grad()
def zero_shot(
    model: CLIPModel, processor: CLIPProcessor, images: Sequence[Image.Image], labels: Sequence[str], prompt: str
) -> tuple[float, int, int]:
    """Classify pictures among all labels that occur; gives percent right, how many pictures, how many classes."""
    classes = sorted(set(labels))
    texts = processor(text=[prompt.replace("{}", name) for name in classes], padding=True, return_tensors="pt")
    likeliest: list[int] = []
    for start in range(0, len(images), 500):
        pixels = processor(images=images[start : start + 500], return_tensors="pt")
        likeliest += model(**pixels, **texts).logits_per_image.argmax(1).tolist()
    right = [classes[place] == label for place, label in zip(likeliest, labels, strict=True)]
    return 100 * float(np.mean(right)), len(images), len(classes)


def _noto(packages: Path, chosen: Sequence[Emoji]) -> tuple[list[Image.Image], list[Emoji]]:
    drawn = [(picture(packages, "noto", one, SIZE), one) for one in chosen]
    found = [(on_white(image), one) for image, one in drawn if image is not None]
    return [image for image, _ in found], [one for _, one in found]


def measure(model: CLIPModel, processor: CLIPProcessor, packages: Path) -> dict[str, tuple[float, int, int]]:
    """Ask the three gates; each gives percent right, number of pictures and of classes."""
    everything = emoji(packages)
    images, found = _noto(packages, [one for one in everything if one.subgroup.startswith("animal")])
    animals = zero_shot(model, processor, images, [one.name for one in found], names.PROMPTS["general"])
    images, found = _noto(packages, [one for one in everything if one.group not in ("flags", "food-drink")])
    groups = zero_shot(model, processor, images, [names.kind_of(one) for one in found], names.PROMPTS["general"])
    pixels, digits = mnist(packages)
    images = [Image.fromarray(each).convert("RGB") for each in pixels[::5]]
    labels = [names.DIGITS[digit] for digit in digits[::5]]
    read = zero_shot(model, processor, images, labels, names.PROMPTS["Digits"])
    return {"animals": animals, "subgroups": groups, "digits": read}
