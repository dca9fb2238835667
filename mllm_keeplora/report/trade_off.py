"""The trade-off curve: how well domains are learned against how much of the earlier ones is lost meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mllm_keeplora.report.figures import FAINT, INK, LINE_COLOURS, MARKERS, new_figure, png_of


def trade_off_figure(
    curves: Mapping[str, Sequence[tuple[str, float, float]]],
    chosen: Collection[tuple[str, str]] = (),
    dark: bool = False,
) -> bytes:
    """Draw a line per strategy over its settings; up and right is better.

    Args:
        curves: name -> (setting, plasticity, BWT) in the order of the line.
        chosen: (name, setting) of points to mark with a ring.
        dark: draw light ink on a transparent ground.

    Returns:
        PNG.

    Raises:
        ValueError: there is no point to draw.
    """
    if not any(curves.values()):
        raise ValueError("a trade-off curve needs at least one run with plasticity and BWT")
    figure = new_figure(6.2, 4.0)
    axes = figure.subplots()
    for i, (name, points) in enumerate(curves.items()):
        colour = LINE_COLOURS[dark][i % len(LINE_COLOURS[dark])]
        xs, ys = [point[1] for point in points], [point[2] for point in points]
        axes.plot(xs, ys, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.6, label=name)
        for setting, x, y in points:
            if (name, setting) in chosen:
                axes.plot([x], [y], marker="o", markersize=13, markerfacecolor="none", color=colour, linestyle="none")
            style = {"color": colour, "fontsize": 8, "parse_math": False}
            axes.annotate(setting, (x, y), xytext=(6, 6), textcoords="offset points", **style)
    axes.margins(0.14)
    axes.axhline(0, color=FAINT[dark], linewidth=0.8)
    axes.set_xlabel("plasticity: score right after learning (%)", color=INK[dark], fontsize=9)
    axes.set_ylabel("BWT: change since then (points)", color=INK[dark], fontsize=9)
    axes.tick_params(colors=INK[dark], labelsize=8.5, length=0)
    axes.grid(color=FAINT[dark], alpha=0.25, linewidth=0.6)
    axes.spines[:].set_visible(False)
    legend = axes.legend(frameon=False, fontsize=9, loc="lower left")
    for text in legend.get_texts():
        text.set_color(INK[dark])
    return png_of(figure, dark)
