"""The one exception that means: the user can mend this. The command line prints it as a sentence and exits with 2."""


class UserError(ValueError):
    """Something given from outside is wrong; the message names the thing, the value, what is allowed and its origin."""


def several(faults: list[str], shown: int = 20) -> UserError:
    """Join all faults found at once into one error, the first `shown` of them spelled out."""
    if len(faults) == 1:
        return UserError(faults[0])
    rest = [f"... and {len(faults) - shown} more"] if len(faults) > shown else []
    return UserError("\n".join([f"{len(faults)} faults:", *(f"  - {fault}" for fault in faults[:shown] + rest)]))


def known(names) -> str:
    """The allowed names, as error messages show them."""
    return ", ".join(sorted(names)) or "none"
