"""The exceptions that mean: the user can mend this. The command line prints them as a sentence, without a traceback.

And the exit codes of a run that did not come to its end.
"""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

FAILED = 1  # by a fault of ours, or of a process that was killed
REFUSED = 2  # by a mistake in what was given
DIVERGED = 3  # by a training whose loss, gradient or factors are not finite
UNWRITABLE = os.EX_IOERR  # 74: its output cannot be written; the same command continues once it can
STOPPED = os.EX_TEMPFAIL  # 75: by a signal; the same command continues
INTERRUPTED = 130  # by Ctrl-C; the same command continues


class UserError(ValueError):
    """Something given from outside is wrong; the message names the thing, the value, what is allowed and its origin.

    Attributes:
        code: with which the command line exits.
        faults: the single sentences, where the error tells of several.
        more: how many faults there are beyond those.
    """

    code: ClassVar[int] = REFUSED
    faults: tuple[str, ...] = ()
    more: int = 0

    @property
    def sentences(self) -> tuple[str, ...]:
        """The sentences, one for each fault that is spelled out."""
        return self.faults or (str(self),)


class Diverged(UserError, RuntimeError):
    """A training came to numbers that are not finite; nothing of them is stored as done."""

    code = DIVERGED


class Unwritable(UserError, OSError):
    """There is no room to write, or no right to; what was written before is whole."""

    code = UNWRITABLE


MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # torch's words, of any device


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory of a device or of the host did not suffice."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in said for word in MEMORY))


def first_line(error: Exception) -> str:
    """Give what another library's error says, as part of a sentence."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def shortened(value: Any, most: int = 200) -> str:
    """Write a value so that it fits into a sentence: the begin of one that is long."""
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= most else f"{text[:most]}..."


def several(faults: list[str], shown: int = 20, more: int = 0) -> UserError:
    """Join all faults found at once into one error, the first `shown` of them spelled out.

    Args:
        faults: one sentence each.
        shown: how many to spell out.
        more: how many there are beyond those of `faults`.
    """
    total = len(faults) + more
    if total == 1:
        return UserError(faults[0])
    rest = [f"... and {total - shown} more"] if total > shown else []
    error = UserError("\n".join([f"{total} faults:", *(f"  - {fault}" for fault in faults[:shown] + rest)]))
    error.faults, error.more = tuple(faults), more
    return error


def known(names) -> str:
    """List the allowed names, as error messages show them."""
    return ", ".join(sorted(names)) or "none"


def validation_faults(
    error: ValidationError, origin: str, model: type[BaseModel] | None, prefix: str = "", of: str = ""
) -> list[str]:
    """Say each fault in a sentence: key, what is allowed, the value got, where it came from.

    Args:
        error: what `model` refused.
        origin: file or place that the values came from.
        model: of an unknown key, its keys that read alike are told, or all of them; None where any key may stand.
        prefix: of the keys, as in "strategy."
        of: what has no such key, as in " of strategy ewc".
    """
    faults = []
    for item in error.errors():
        key = shortened((prefix + ".".join(str(part) for part in item["loc"])).removesuffix("."))
        got = shortened(repr(item["input"]))
        said = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            faults.append(f"{key} is missing ({origin})")
        elif item["type"] == "extra_forbidden":
            allowed = _allowed(model, item["loc"])
            faults.append(f"{key} is not a known key{of}, got {got}{allowed} ({origin})")
        elif not item["loc"] and item["type"] == "value_error":  # of keys that do not go together, which it names
            faults.append(f"{key or 'the whole'}: {said} ({origin})")
        elif item["type"] == "model_type" or not key:
            faults.append(f"{key or 'the whole'} must hold keys and values, got {got} ({origin})")
        else:
            faults.append(f"{key}: {said[0].lower()}{said[1:]}, got {got} ({origin})")
    return faults


def _allowed(model: type[BaseModel] | None, place: tuple[int | str, ...]) -> str:
    """What may stand in a place, as far as the model's fields tell."""
    *sections, last = place
    for section in sections:
        field = model.model_fields.get(str(section)) if model is not None else None
        kind = field.annotation if field is not None else None
        model = kind if isinstance(kind, type) and hasattr(kind, "model_fields") else None
    if model is None:
        return ""
    alike = difflib.get_close_matches(str(last), model.model_fields, n=3)
    return f"; did you mean {' or '.join(alike)}?" if alike else f"; known: {known(model.model_fields)}"
