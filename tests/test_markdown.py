"""The one writer of Markdown tables."""

import pytest

from qpenet_jax.core.markdown import table


def test_markdown_escapes_what_would_end_a_cell():
    rows = table(["class", "IoU"], [["cat|dog", "1.0"]]).splitlines()
    assert rows == ["| class    | IoU |", "| -------- | --- |", r"| cat\|dog | 1.0 |"]


def test_numbers_stand_on_the_right():
    rows = table(["step", "s"], [["train", "12.0"], ["a", "1"]], numbers=True)
    assert rows.splitlines() == [
        "| step  |    s |",
        "| ----- | ---: |",
        "| train | 12.0 |",
        "| a     |    1 |",
    ]


def test_a_short_column_still_has_a_rule_of_three_dashes():
    """With fewer, some readers of Markdown see no table; every line is as long."""
    lines = table(["A", "B"], iter([["1", "2"]]), numbers=True).splitlines()
    assert lines == ["| A   |   B |", "| --- | --: |", "| 1   |   2 |"]
    assert table(["A"], []).splitlines() == ["| A   |", "| --- |"]


def test_a_row_that_does_not_fit_the_header_is_refused():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        table(["a", "b"], [["1"]])
