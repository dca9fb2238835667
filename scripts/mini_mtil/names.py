"""The classes of `mini_mtil`, and which pictures the base must not have seen. `tiny-clip`'s training reads this too."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from .sources import Emoji, emoji

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SILHOUETTES = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
TEXTILES = {"nominal": "no defect", "local": "a local defect", "global": "a global defect"}
CELLS = ("no defect", "a doubtful defect", "a likely defect", "a certain defect")
# Class -> folders of openclipart, with what lies below them; a folder of two classes is of the first.
CLIPS: dict[str, tuple[str, ...]] = {
    "mammal": ("animals/mammals",),
    "bird": ("animals/birds",),
    "insect": ("animals/bugs",),
    "fruit": ("food/fruit",),
    "dessert": ("food/desserts",),
    "drink": ("food/beverages",),
    "musical instrument": ("recreation/music",),
    "sport": ("recreation/sports",),
    "party": ("recreation/party",),
    "playing card": ("recreation/games/cards",),
    "smiley": ("people/smilies",),
    "stick figure": ("people/stickmen",),
    "hat": ("people/clothing/hats",),
    "clothing": ("people/clothing",),
    "house": ("buildings/homes",),
    "vehicle": ("transportation/vehicles",),
    "boat": ("transportation/boating",),
    "road sign": ("transportation/roadsigns",),
    "map symbol": ("signs_and_symbols/map_symbols", "transportation/aiga-symbols"),
    "arrow": ("shapes/arrows",),
    "star": ("shapes/stars",),
    "pattern": ("special/patterns",),
    "computer": ("computer/hardware",),
    "weapon": ("tools/weapons",),
}
FLAGS, WHITE = (
    "signs_and_symbols/flags",
    "special/gradients",
)  # left out of the base's training, too; gradients are white
# Writing system -> the middle of its fonts' file names.
SCRIPTS = {
    "arabic": "Arabic", "armenian": "Armenian", "bengali": "Bengali", "canadian": "CanadianAboriginal",
    "cherokee": "Cherokee", "cuneiform": "Cuneiform", "devanagari": "Devanagari", "egyptian": "EgyptianHieroglyphs",
    "ethiopic": "Ethiopic", "georgian": "Georgian", "gujarati": "Gujarati", "hebrew": "Hebrew", "kannada": "Kannada",
    "khmer": "Khmer", "malayalam": "Malayalam", "runic": "Runic", "sinhala": "Sinhala", "tamil": "Tamil",
    "thai": "Thai", "tibetan": "Tibetan",
}  # fmt: skip
PROMPTS = {
    "Digits": "the number {}.",
    "Silhouettes": "a silhouette of a {}.",
    "Flags": "the flag of {}.",
    "Food": "a picture of {}.",
    "Textiles": "a photo of fabric with {}.",
    "Clips": "a clip art of a {}.",
    "Scripts": "a letter of the {} script.",
    "Cells": "a photo of a solar cell with {}.",
    "general": "a picture of a {}.",
}


def is_below(folder: str, folders: Iterable[str]) -> bool:
    """Tell whether a folder is one of some, or lies below one."""
    return any(folder == each or folder.startswith(f"{each}/") for each in folders)


def is_kept_out(folder: str) -> bool:
    """Tell whether the base must not have seen a folder of clip art: of flags, of domain Clips, or all white."""
    return is_below(folder, chain((FLAGS, WHITE), *CLIPS.values()))


def flags(packages: Path) -> dict[str, str]:
    """Name the countries that have an emoji: code -> name."""
    return {one.code: one.name.removeprefix("flag: ") for one in emoji(packages) if one.subgroup == "country-flag"}


def kind_of(one: Emoji) -> str:
    """Name an emoji's subgroup in words, as class names of suite `general` do."""
    return one.subgroup.replace("-", " ")
