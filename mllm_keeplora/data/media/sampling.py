"""Which frames of a clip are seen: always as many as are asked for, by their number or by their time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SAME_TIME = 1e-6  # seconds within which a frame counts as shown at a moment


class VideoOptions(BaseModel):
    """How the frames of a clip are chosen and made smaller."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    frames: int = Field(8, ge=1, le=1024, description="seen of each clip; a shorter one shows some more than once")
    sampling: Literal["linspace", "uniform", "centre"] = Field(
        "linspace",
        description="linspace: the first frame, the last, those evenly between; uniform: the first of so many equal "
        "parts; centre: the middle of each",
    )
    clock: Literal["index", "time"] = Field("index", description="parts are equal in frames, or in seconds")
    max_side: int = Field(448, ge=16, le=4096, description="longest side in pixels that a frame keeps")


def chosen(times: Sequence[float], options: VideoOptions) -> list[int]:
    """Choose the frames of a clip that are seen.

    Args:
        times: (N,) seconds at which its frames are shown, ascending, N at least 1.

    Returns:
        (n,) places in `times`, ascending, n = `options.frames`: floor(k (N - 1) / (n - 1)), floor(k N / n) or
        floor((k + 1/2) N / n) for k = 0 .. n - 1. By time, the last frame shown at such a part of the whole time.
    """
    count, total = options.frames, len(times)
    parts = {  # numerator and denominator of the part of the whole at which frame k is looked for
        "linspace": [(k, max(count - 1, 1)) for k in range(count)],
        "uniform": [(k, count) for k in range(count)],
        "centre": [(2 * k + 1, 2 * count) for k in range(count)],
    }[options.sampling]
    if options.clock == "index":
        whole = total - 1 if options.sampling == "linspace" else total
        return [part * whole // of for part, of in parts]
    first, span = times[0], times[-1] - times[0]
    return [bisect_right(times, first + span * part / of + SAME_TIME) - 1 for part, of in parts]
