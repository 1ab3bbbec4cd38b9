"""Tables of measurements, as Markdown and as a bar chart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qpenet_jax.core.markdown import table

Row = dict[str, Any]
"""Cells by the header of their column: text, a number, quartiles, or None."""


class Table(NamedTuple):
    """What was measured in the same way, and a sentence about it above the rows."""

    caption: str
    rows: list[Row]


def benchmark_report(result: dict[str, Any]) -> str:
    """Returns the result of `benchmark` as Markdown: the facts, then every table."""
    facts = (f"{name}: {value}" for name, value in result["facts"].items())
    parts = [f"{'; '.join(facts)}."]
    for each in result["tables"]:
        caption, rows = Table(**each)
        headers = list(dict.fromkeys(header for row in rows for header in row))
        cells = [[as_text(row.get(header)) for header in headers] for row in rows]
        parts += [caption, table(headers, cells, numbers=True)]
    return "\n\n".join(parts)


def as_text(value: Any) -> str:
    """Returns a cell's text: of quartiles the median with the others in brackets."""
    if value is None:
        return "-"
    if isinstance(value, Sequence) and not isinstance(value, str):
        low, median, high = map(as_text, value)
        return f"{median} ({low}-{high})"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


# --- the chart --------------------------------------------------------------------

COLOURS = {"JAX, ms": "#d55e00", "PyTorch, ms": "#0072b2"}
"""Of Okabe and Ito, which colour-blind readers distinguish, too."""


def bar_chart(result: dict[str, Any], path: str | Path) -> None:
    """Draws the time of every step as a bar and saves the chart as an image.

    Raises ValueError if no step was measured.
    """
    # Matplotlib takes long to import, which the tables shouldn't.
    from matplotlib.figure import Figure

    rows = steps_of(result)
    if not rows:
        raise ValueError("no step was measured: nothing to draw")
    figure = Figure((9.0, 1.2 + 0.8 * len(rows)), dpi=100, layout="constrained")
    figure.suptitle("Time of a step, less is better")
    axes = figure.subplots()
    for place, (header, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
        medians = [row[header][1] if header in row else 0.0 for row in rows]
        positions = [number + place for number in range(len(rows))]
        bars = axes.barh(positions, medians, 0.4, color=colour, label=header)
        axes.bar_label(bars, [as_text(each or None) for each in medians], padding=6)
    axes.set_yticks(range(len(rows)), [row["step"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.2)  # room for the numbers
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def steps_of(result: dict[str, Any]) -> list[Row]:
    """Returns the rows of steps that were timed."""
    rows = [row for each in result["tables"] for row in each["rows"]]
    return [row for row in rows if "JAX, ms" in row and "step" in row]
