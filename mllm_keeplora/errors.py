"""The one exception that means: the user can mend this. The command line prints it as a sentence and exits with 2.

And the exit codes of a run that did not come to its end.
"""

import os

FAILED = 1  # by a fault, such as a loss that is not finite
STOPPED = os.EX_TEMPFAIL  # 75: by a signal; the same command continues
INTERRUPTED = 130  # by Ctrl-C; the same command continues


class UserError(ValueError):
    """Something given from outside is wrong; the message names the thing, the value, what is allowed and its origin.

    Attributes:
        faults: the single sentences, where the error tells of several.
        more: how many faults there are beyond those.
    """

    faults: tuple[str, ...] = ()
    more: int = 0

    @property
    def sentences(self) -> tuple[str, ...]:
        """One sentence for each fault that is spelled out."""
        return self.faults or (str(self),)


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
    """The allowed names, as error messages show them."""
    return ", ".join(sorted(names)) or "none"
