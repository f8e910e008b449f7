"""Draw the plots of a report as inline SVG whose colours follow the theme of the page."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unlora.report.findings import Findings, Point
from unlora.report.markdown import one_line

# drawn with these, shown with the variables of the page's style sheet
COLOURS = {
    "ink": "#010101", "muted": "#020202", "rule": "#030303", "target": "#040404",
    "gold": "#050505", "method": "#060606", "broken": "#070707", "good": "#080808",
    "paper": "#090909",
}  # fmt: skip
MARKERS = "o^DvPX<>phd8"  # the square is the target's, the star gold's
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "font.family": ["DejaVu Sans"], "font.size": 10,
    "axes.edgecolor": COLOURS["rule"], "axes.labelcolor": COLOURS["ink"],
    "xtick.color": COLOURS["rule"], "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["muted"], "ytick.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"], "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.8, "text.parse_math": False, "axes.unicode_minus": False,
}  # fmt: skip


def scatter(findings: Findings) -> str:
    """Forgotten against utility kept, with target, gold and the better direction; an SVG."""
    shown = [line for line in findings.lines if None not in (line.point.forgot, line.point.kept)]
    if not shown:
        return ""
    share = findings.scale != "raw"
    with Drawing((7.2, 4.5)) as (figure, ax):
        marker_of = {
            line.name: MARKERS[i % len(MARKERS)] for i, line in enumerate(findings.methods)
        }
        points: list[tuple[float, float, str, str]] = []
        for line in shown:
            x, y = line.point.forgot, line.point.kept
            assert x is not None and y is not None
            colour = COLOURS[line.role if line.role != "method" else
                             "broken" if line.collapsed else "method"]  # fmt: skip
            marker = marker_of.get(line.name, "s" if line.role == "target" else "*")
            size = {"target": 90, "gold": 260}.get(line.role, 75)
            for seed in line.seeds:
                if seed.forgot is not None and seed.kept is not None:
                    ax.plot([line.point.forgot, seed.forgot], [line.point.kept, seed.kept],
                            color=colour, linewidth=0.6, alpha=0.5, zorder=2)  # fmt: skip
                    ax.scatter(seed.forgot, seed.kept, s=12, color=colour, alpha=0.7,
                               marker=marker, linewidths=0, zorder=3)  # fmt: skip
            ax.scatter(line.point.forgot, line.point.kept, s=size, color=colour, marker=marker,
                       edgecolors=COLOURS["paper"], linewidths=1.2, zorder=4)  # fmt: skip
            points.append((x, y, _name(line), colour))
        _limits(ax, shown, share)
        if share:
            ax.axhline(1, color=COLOURS["rule"], linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
            for x in (0, 1) if findings.scale == "gold" else (0,):
                ax.axvline(x, color=COLOURS["rule"], linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
            percent = lambda value, _: f"{100 * value:.0f} %"  # noqa: E731
            ax.xaxis.set_major_formatter(percent)
            ax.yaxis.set_major_formatter(percent)
        _label(ax, points)
        _direction(ax, findings)
        ax.set_xlabel({
            "gold": "forgotten: the way from target to gold",
            "target": "forgotten: share of what the target knew",
            "raw": "forgotten: one minus the forget figures",
        }[findings.scale])  # fmt: skip
        ax.set_ylabel("utility, share of the target's" if share else "utility")
        return as_svg(figure, f"scatter-{findings.kind}")


def curves(histories: Sequence[Sequence[Mapping[str, Any]]], prefix: str) -> str:
    """Losses against optimiser steps, one line a seed; an SVG, or nothing without a history."""
    keys = {"loss": ("ink", "-", 1.6), "forget_loss": ("broken", "--", 1.2),
            "retain_loss": ("target", ":", 1.6)}  # fmt: skip
    series = {
        key: [points for history in histories if (points := _series(history, key))] for key in keys
    }
    if _alike(series["loss"], series["retain_loss"]):
        series["retain_loss"] = []  # nothing else is learnt
    if not series["loss"]:
        return ""
    with Drawing((3.6, 2.3)) as (figure, ax):
        for key, (colour, dashes, width) in keys.items():
            for i, points in enumerate(series[key]):
                ax.plot(*zip(*points, strict=True), color=COLOURS[colour], linestyle=dashes,
                        linewidth=width if len(series[key]) == 1 else 0.9,
                        label=key.replace("_", " ") if i == 0 else None)  # fmt: skip
        ax.set_xlabel("step")
        ax.locator_params(nbins=5)
        ax.set_yscale("symlog", linthresh=1) if _wide(series) else None
        if sum(map(bool, series.values())) > 1:
            ax.legend(frameon=False, fontsize=8, loc="upper right", handlelength=2.2)
        return as_svg(figure, prefix)


def history(training: Any) -> list[Mapping[str, Any]]:
    """The steps of a log history that have a loss."""
    steps = training if isinstance(training, list) else []
    return [step for step in steps if isinstance(step, Mapping) and "step" in step]


def _series(steps: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [
        (step["step"], step[key])
        for step in steps
        if isinstance(step.get(key), (int, float)) and isinstance(step["step"], (int, float))
    ]


def _alike(first: Sequence[Any], other: Sequence[Any]) -> bool:
    flat = [[point for line in lines for point in line] for lines in (first, other)]
    return len(flat[0]) == len(flat[1]) and all(
        a[0] == b[0] and math.isclose(a[1], b[1], rel_tol=1e-4, abs_tol=1e-6)
        for a, b in zip(*flat, strict=True)
    )


def _wide(series: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> bool:
    values = [abs(y) for lines in series.values() for line in lines for _, y in line]
    return max(values) > 100


class Drawing:
    """A figure of this page's style; nothing of it outlives the block."""

    def __init__(self, size: tuple[float, float]):
        self.size = size

    def __enter__(self) -> Any:
        import matplotlib
        from matplotlib.figure import Figure

        self.context = matplotlib.rc_context(_STYLE)
        self.context.__enter__()
        figure = Figure(figsize=self.size)
        width, height = self.size  # margins in inches: a layout engine takes half of the time
        box = (0.75 / width, 0.5 / height, 1 - 0.85 / width, 1 - 0.6 / height)
        return figure, figure.add_axes(box)

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


def _limits(ax: Any, lines: Sequence[Any], share: bool) -> None:
    """Room for every point, and for the name to the right of it."""
    points: list[Point] = [p for line in lines for p in (line.point, *line.seeds)]
    xs = [p.forgot for p in points if p.forgot is not None] + ([0.0, 1.0] if share else [])
    ys = [p.kept for p in points if p.kept is not None] + ([0.0, 1.0] if share else [0.0])
    height = max(ys) - min(ys) or 1.0
    left = min(xs) - 0.08 * (max(xs) - min(xs) or 1.0)
    right = max(xs) + 0.08 * (max(xs) - min(xs) or 1.0)
    for _ in range(4):
        right = max(
            right,
            *(
                line.point.forgot + (0.04 + 0.0135 * len(_name(line))) * (right - left)
                for line in lines
            ),
        )
    ax.set_xlim(left, right)
    ax.set_ylim(min(ys) - 0.08 * height, max(ys) + 0.14 * height)


def _name(line: Any) -> str:
    name = one_line(line.name)
    name = name if len(name) <= 32 else name[:31] + "…"
    return name + (" (collapsed)" if line.collapsed else "")


def _label(ax: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside their points, moved apart where they would cover each other."""
    low, high = ax.get_ylim()
    left, right = ax.get_xlim()
    least = 0.052 * (high - low)
    taken: list[tuple[float, float]] = []
    for x, y, name, colour in sorted(points, key=lambda point: (-point[1], *point)):
        height = y
        for _ in range(len(points)):
            near = [t for tx, t in taken if abs(tx - x) < 0.2 * (right - left)
                    and abs(t - height) < least]  # fmt: skip
            if not near:
                break
            height = min(near) - least
        taken.append((x, height))
        ax.annotate(
            name, (x, y), xytext=(x + 0.018 * (right - left), height), va="center",
            color=colour, fontsize=10, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": COLOURS["rule"], "linewidth": 0.6}
            if height != y else None,
        )  # fmt: skip


def _direction(ax: Any, findings: Findings) -> None:
    """An arrow to where good unlearning is: to gold, or to the upper right."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    start = (left + 0.36 * (right - left), low + 0.36 * (high - low))
    gold = findings.of("gold")
    goal = (right, high)
    if gold and gold.point.forgot is not None and gold.point.kept is not None:
        goal = (gold.point.forgot, gold.point.kept)
    stop = [a + 0.7 * (b - a) for a, b in zip(start, goal, strict=True)]
    ax.annotate(
        "", xy=stop, xytext=start, zorder=1,
        arrowprops={"arrowstyle": "-|>", "color": COLOURS["good"], "linewidth": 1.4,
                    "mutation_scale": 14},
    )  # fmt: skip
    text = "better: up, and to gold" if gold else "better: up, and to the right"
    ax.text(start[0], start[1] - 0.02 * (high - low), text, color=COLOURS["good"], ha="center",
            va="top", style="italic", fontsize=10)  # fmt: skip


def as_svg(figure: Any, prefix: str) -> str:
    """The figure as an element of a page: ids of its own, the page's colours and fonts."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix}):
        figure.savefig(stream, format="svg", transparent=True, metadata={
            "Date": None, "Creator": None, "Format": None, "Type": None})  # fmt: skip
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    safe = re.sub(r"\W", "-", prefix)
    text = re.sub(r'\bid="', f'id="{safe}-', text)
    text = re.sub(r'href="#', f'href="#{safe}-', text).replace("url(#", f"url(#{safe}-")
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r"(font:[^;\"]*?[\d.]+px) [^;\"]+", r"\1 var(--sans)", text)
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', text[:400])[:2]
    text = re.sub(r'(width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace(
        "<svg", f'<svg aria-hidden="true" focusable="false" data-size="{width}x{height}"', 1
    )
