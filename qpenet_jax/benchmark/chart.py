"""What `speed.benchmark` measured as a bar chart."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qpenet_jax.benchmark.settings import TWIN_VARIANTS
from qpenet_jax.benchmark.speed_tables import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, THEIRS, INK = "#d55e00", "#0072b2", "#222222"
"""Of Okabe and Ito, told apart by colour-blind readers too."""

NAMES = {OURS: "qpenet_jax", THEIRS: "PyTorch twin"}

WIDTH, ROW = 9.0, 0.3
"""Width of the picture and height of a bar, in inches."""

WORDS = 1.9
"""Length of the axis, as a multiple of the longest bar: room for words beside it."""


class Bar(NamedTuple):
    """A bar of so many seconds, with its value in words."""

    seconds: float
    text: str
    colour: str


def bar_chart(result: dict[str, Any], path: str | Path) -> None:
    """Draws the seconds of every step as bars and saves them as an image.

    Every kind of step has a scale of its own, from 0. Raises ValueError if no step was
    measured.
    """
    # Matplotlib takes long to import, which the tables shouldn't.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kinds = itertools.groupby(result["cases"], lambda case: case["what"])
    groups = [list(cases) for _, cases in kinds]
    if not groups:
        raise ValueError("no step was measured: nothing to draw")
    rows = [sum(len(_bars(case)) + 1 for case in cases) for cases in groups]
    size = WIDTH, 1.2 + ROW * sum(rows)
    figure = Figure(size, dpi=100, layout="constrained")
    figure.suptitle(_title(result["facts"]), fontsize=11)
    all_axes = figure.subplots(len(groups), squeeze=False, height_ratios=rows)[:, 0]
    for axes, cases in zip(all_axes, groups, strict=True):
        _draw(axes, cases)
    drawn = {bar.colour for case in result["cases"] for bar in _bars(case)}
    handles = [Patch(color=c, label=name) for c, name in NAMES.items() if c in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def _title(facts: dict[str, Any]) -> str:
    return (
        f"{facts['backbone']}, {facts['size']} pixels: time of a step, less is better\n"
        f"{facts['device']}, {facts['cpu']}, {facts['cores']} cores"
    )


def _bars(case: dict[str, Any]) -> list[Bar]:
    ours = case["seconds"][1]
    if "ratio" not in case:
        return [Bar(ours, duration(ours), OURS)]
    theirs, ratio = case["torch_seconds"][1], case["ratio"][1]
    return [
        Bar(ours, f"{duration(ours)} ({ratio:.2f} of PyTorch's)", OURS),
        Bar(theirs, f"{duration(theirs)} ({TWIN_VARIANTS[case['variant']]})", THEIRS),
    ]


def _draw(axes: "Axes", cases: list[dict[str, Any]]) -> None:
    """Draws the bars of all cases from top to bottom, with a gap between the cases."""
    middles, top = [], 0
    for case in cases:
        bars = _bars(case)
        for bar in bars:
            axes.barh(top, bar.seconds, color=bar.colour, height=0.9)
            axes.annotate(
                bar.text,
                (bar.seconds, top),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=INK,
            )
            top += 1
        middles.append(top - (len(bars) + 1) / 2)
        top += 1
    longest = max(bar.seconds for case in cases for bar in _bars(case))
    axes.set(xlim=(0, WORDS * longest), ylim=(top - 1, -1), xticks=[])
    axes.set_yticks(middles, [case["name"] for case in cases])
    axes.tick_params(left=False, labelcolor=INK)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
