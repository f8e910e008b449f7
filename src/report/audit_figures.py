"""Plot audits and dials: what attacks bring back, and what forgetting costs."""

from collections.abc import Sequence
from typing import Any

from unlora.report.audits import Bar, Relearning
from unlora.report.figures import COLOURS, MARKERS, Drawing, as_svg
from unlora.report.markdown import one_line
from unlora.report.runs import Row

NEVER, BEFORE = "a model that never saw it", "as before"
ENDS = ((0, f"0: {NEVER}", "gold"), (1, f"1: {BEFORE}", "target"))
FARTHEST = -1.0  # a curve is not drawn beyond: nobody wants what lies there
_LINES = {"unlearned": ("method", "unlearned"), "target": ("target", "knew it"),
          "retain": ("gold", "never saw it")}  # fmt: skip


def attacks(bars: Sequence[Bar], most: float, baseline: str, prefix: str) -> str:
    """One bar for each attack with its interval; an SVG.

    Args:
        most: a bar whose interval reaches beyond stands out.
        baseline: who has a residual of 0.
    """
    row, left, right = 0.27, 2.0, 1.4  # inches
    height = row * len(bars) + 0.35
    width = 7.2
    with Drawing((width, height)) as (figure, ax):
        ax.set_position((left / width, 0.05 / height, 1 - (left + right) / width,
                         1 - 0.35 / height))  # fmt: skip
        ends = [0.0, 1.0]
        for i, bar in enumerate(bars):
            _label(ax, i, bar)
            if bar.why_not or bar.value is None:
                continue
            low, high = bar.interval or (bar.value, bar.value)
            ends += [low, high, bar.value]
            colour = COLOURS["broken" if high > most else "method"]
            ax.barh(i, bar.value, height=0.55, color=colour, alpha=0.55, linewidth=0)
            ax.plot([low, high], [i, i], color=colour, linewidth=1.6)
            ax.plot([bar.value], [i], color=colour, marker="|", markersize=8)
        room = 0.03 * (max(ends) - min(ends))
        ax.set_xlim(min(ends) - room, max(ends) + room)
        ax.set_ylim(len(bars) - 0.5, -0.5)
        ax.set_yticks([])
        ax.set_xticks([])
        ax.spines[["left", "bottom"]].set_visible(False)
        _ends(ax, sum(not bar.why_not for bar in bars), baseline)
        return as_svg(figure, prefix)


def _label(ax: Any, y: int, bar: Bar) -> None:
    """The attack on the left; its figures on the right, or in grey why it has none."""
    name = one_line(bar.words)
    transform = ax.get_yaxis_transform()
    ax.text(-0.02, y, name if len(name) <= 26 else name[:25] + "…", transform=transform,
            ha="right", va="center", color=COLOURS["muted" if bar.why_not else "ink"])  # fmt: skip
    if bar.why_not or bar.value is None:
        why = one_line(bar.why_not)
        ax.text(0.0, y, why if len(why) <= 64 else why[:63] + "…", transform=transform,
                ha="left", va="center", color=COLOURS["muted"], style="italic", fontsize=9,
                zorder=5)  # fmt: skip
        return
    interval = " [{}, {}]".format(*map(decimal, bar.interval)) if bar.interval else ""
    ax.text(1.02, y, decimal(bar.value) + interval, transform=transform, ha="left", va="center",
            color=COLOURS["ink"], fontsize=9)  # fmt: skip


def decimal(value: float) -> str:
    """Two decimals, and no zero below zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def _ends(ax: Any, counted: int, baseline: str) -> None:
    """The lines of a model that never saw the data, and of the model before unlearning."""
    for x, text, colour in ((0, f"0: {baseline}", "gold"), ENDS[1]):
        ax.plot([x, x], [-0.5, counted - 0.5], color=COLOURS[colour], linewidth=1, zorder=0.5,
                linestyle=(0, (4, 4)) if x else "-")  # fmt: skip
        ax.text(x, 1.0, text, transform=ax.get_xaxis_transform(), va="bottom",
                ha="center" if x else "right", color=COLOURS[colour], fontsize=9)  # fmt: skip


def relearnt(of: Relearning, prefix: str) -> str:
    """Mean score against steps of unlearned, target and retain model; an SVG."""
    with Drawing((3.6, 2.3)) as (figure, ax):
        for model, (colour, label) in _LINES.items():
            points = of.means[model]
            ax.plot(*zip(*points, strict=True), color=COLOURS[colour], marker="o", markersize=3.5,
                    linewidth=1.6, label=label)  # fmt: skip
        ax.set_xlabel("step")
        ax.set_ylabel("log-probability")
        ax.locator_params(nbins=5)
        ax.legend(frameon=False, fontsize=8, loc="best", handlelength=1.6)
        return as_svg(figure, prefix)


def dials(rows: Sequence[Row]) -> str:
    """Residual against retain probability over the scales, a line for each seed; an SVG."""
    drawn = [(row, curves) for row in rows if (curves := _curves(row))]
    if not drawn:
        return ""
    with Drawing((7.2, 4.2)) as (figure, ax):
        ys: list[float] = []
        xs: list[float] = [0.0, 1.0]
        for i, (row, curves) in enumerate(drawn):
            marker = MARKERS[i % len(MARKERS)]
            for dial, curve in curves:
                shown = [(x, y) for _, x, y in curve if x >= FARTHEST]
                xs += [x for x, _ in shown]
                ys += [y for _, y in shown]
                ax.plot([x for _, x, _ in curve], [y for _, _, y in curve], marker=marker,
                        color=COLOURS["method"], linewidth=1, markersize=5, zorder=2,
                        markeredgewidth=0)  # fmt: skip
                if dial.chosen and dial.chosen[0] >= FARTHEST:
                    ax.plot(*dial.chosen, marker=marker, color=COLOURS["good"], markersize=12,
                            markeredgecolor=COLOURS["paper"], zorder=4)  # fmt: skip
            _name(ax, row, curves[0][1])
        room = 0.08 * (max(ys) - min(ys) or 1.0)
        ax.set_xlim(max(xs) + 0.05, min(xs) - 0.05)  # to the right more is forgotten
        ax.set_ylim(min(ys) - room, max(ys) + room)
        for x, text, colour in ENDS:
            ax.axvline(x, color=COLOURS[colour], linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
            ax.text(x, 1.0, text, transform=ax.get_xaxis_transform(), va="bottom", fontsize=9,
                    ha="left" if x else "center", color=COLOURS[colour])  # fmt: skip
        ax.set_xlabel("what is left of what it knew, asked plainly")
        ax.set_ylabel("probability of answers to keep")
        return as_svg(figure, "dials")


def _curves(row: Row) -> list[tuple[Any, list[tuple[float, float, float]]]]:
    dials = [result.dial for result in row.results if result.dial]
    return [(dial, dial.curve) for dial in dials if any(x >= FARTHEST for _, x, _ in dial.curve)]


def _name(ax: Any, row: Row, curve: Sequence[tuple[float, float, float]]) -> None:
    """The run's name at the last scale that is drawn."""
    _, x, y = [point for point in curve if point[1] >= FARTHEST][-1]
    name = one_line(row.name)
    ax.annotate(name if len(name) <= 24 else name[:23] + "…", (x, y), xytext=(7, 3),
                textcoords="offset points", va="bottom", annotation_clip=False)  # fmt: skip
