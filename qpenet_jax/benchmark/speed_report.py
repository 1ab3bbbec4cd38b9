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


def bar_chart(result: dict[str, Any], path: str | Path) -> bool:
    """Draws the time of every step as a bar and saves the chart as an image.

    Returns whether there was anything to draw.
    """
    rows = [row for each in result["tables"] for row in each["rows"]]
    rows = [row for row in rows if "step" in row and "ms" in row]
    if rows:
        # Matplotlib takes long to import, which the tables shouldn't.
        from matplotlib.figure import Figure

        figure = Figure((9.0, 1.2 + 0.4 * len(rows)), dpi=100, layout="constrained")
        axes = figure.subplots()
        names = [f"{row['step']}: {row['variant']}" for row in rows]
        # Of Okabe and Ito, which colour-blind readers distinguish, too.
        colours = ["#d55e00" if r["variant"] == "JAX" else "#0072b2" for r in rows]
        medians = [row["ms"][1] for row in rows]
        bars = axes.barh(names, medians, color=colours)
        axes.bar_label(bars, [as_text(each) for each in medians], padding=6)
        axes.set_title("Time of a step in ms, less is better")
        axes.invert_yaxis()
        axes.margins(x=0.2)  # room for the numbers
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)
    return bool(rows)
