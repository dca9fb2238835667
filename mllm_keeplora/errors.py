"""The one exception that means: the user can mend this. The command line prints it as a sentence and exits with 2."""


class UserError(ValueError):
    """Something given from outside is wrong; the message names the thing, the value, what is allowed and its origin."""


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
    return UserError("\n".join([f"{total} faults:", *(f"  - {fault}" for fault in faults[:shown] + rest)]))


def known(names) -> str:
    """The allowed names, as error messages show them."""
    return ", ".join(sorted(names)) or "none"
