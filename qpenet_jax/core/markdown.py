"""The one writer of Markdown tables."""

from collections.abc import Iterable, Sequence


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False
) -> str:
    """Returns a Markdown table whose columns also line up as plain text.

    A `|` inside a cell is escaped. With `numbers` all columns but the first are aligned
    on the right. Raises ValueError if a row has more or fewer cells than the header.
    """
    ruled = [list(header), ["---"] * len(header), *map(list, rows)]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in ruled]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [numbers and number > 0 for number in range(len(header))]
    cells[1] = [
        "-" * (width - 1) + ":" if at_right else "-" * width
        for width, at_right in zip(widths, right, strict=True)
    ]
    return "\n".join(_line(row, widths, right) for row in cells)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = (
        cell.rjust(width) if at_right else cell.ljust(width)
        for cell, width, at_right in zip(cells, widths, right, strict=True)
    )
    return f"| {' | '.join(padded)} |"
