"""What an evaluation reports: numbers in percent, tables and files."""

import csv
import json
import re

import numpy as np
import pytest
from conftest import toy_protocol

from qpenet_jax.evaluation.metrics import Scores
from qpenet_jax.evaluation.report import summarize, table, write_report

IDS = (4, 5, 6)


@pytest.fixture(scope="module")
def scores():
    """Class 4 at IoU 0.5, 5 at 0.25, 6 never drawn; background 0.8."""
    rows = [(0, i, i, 4, 80, 100, 10, 20) for i in range(3)]
    rows += [(0, i, i, 5, 80, 100, 10, 40) for i in range(3, 6)]
    return Scores(np.array(rows))


@pytest.fixture(scope="module")
def two_seeds(scores):
    """Seed 7 does better: class 4 at 0.6, 5 at 0.5."""
    rows = scores.rows.copy()
    rows[:, 0] = 7
    rows[:, 6] = [6, 12, 18, 10, 20, 30]
    return Scores(np.concatenate([scores.rows, rows]))


def cells(text):
    """Return the rows of a Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_summary_in_percent(scores):
    p = toy_protocol(shots=5)
    result = summarize(scores, p, IDS, subset=("two", "one"))
    assert result["miou"] == 25.0
    assert result["miou_interval"] == [25.0, 25.0]
    np.testing.assert_allclose(result["fb_iou"], 100 * (0.8 + 60 / 180) / 2, atol=0.01)
    low, high = result["fb_iou_interval"]
    assert (40 + 25 / 2) < low < result["fb_iou"] < high < (40 + 50 / 2)
    assert result["per_class"] == {"one": 50.0, "two": 25.0, "three": 0.0}
    assert result["per_class_interval"] == {
        "one": [50.0, 50.0],
        "two": [25.0, 25.0],
        "three": [0.0, 0.0],
    }
    assert result["per_seed"] == {"0": 25.0}
    assert result["seed_spread"] == {"std": None, "min": 25.0, "max": 25.0}
    assert (result["episodes"], result["seeds"]) == (6, [0])
    assert result["protocol"] == p.to_dict()
    assert result["subset"]["classes"] == ["two", "one"]
    assert result["subset"]["miou"] == 37.5
    assert result["subset"]["miou_interval"] == [37.5, 37.5]
    assert "subset" not in summarize(scores, p, IDS)


def test_table_is_markdown(scores):
    result = summarize(scores, toy_protocol(), IDS, subset=("one",))
    text = table({"cosine": result, "QPENet": result})
    rows = cells(text)
    assert rows[0] == ["IoU %", "cosine", "QPENet"]
    assert set("".join(rows[1])) == {"-"}
    assert rows[2] == ["one", "50.0", "50.0"]
    assert rows[5] == ["mean of one", "50.0 [50.0, 50.0]", "50.0 [50.0, 50.0]"]
    assert rows[6] == ["mIoU", "25.0 [25.0, 25.0]", "25.0 [25.0, 25.0]"]
    low, high = result["fb_iou_interval"]
    assert rows[7] == ["FB-IoU", *[f"56.7 [{low:.1f}, {high:.1f}]"] * 2]
    assert len({len(line) for line in text.splitlines()}) == 1


def test_report_is_three_files(two_seeds, scores, tmp_path):
    p = toy_protocol(seeds=(0, 7))
    results = summarize(two_seeds, p, IDS, subset=("one",))
    second = round(110 / 3, 2)
    assert results["per_seed"] == {"0": 25.0, "7": second}
    assert results["miou"] == round((25 + 110 / 3) / 2, 2)
    std = round((110 / 3 - 25) / np.sqrt(2), 2)
    assert results["seed_spread"] == {"std": std, "min": 25.0, "max": second}
    results["references"] = {"cosine": summarize(scores, p, IDS, subset=("one",))}
    results["gain_over_cosine"] = {"mIoU": [5.83, -1.0, 12.0]}
    results["selection"] = "last step (the novel classes had no say)"
    for _ in range(2):  # the second time over the first
        write_report(tmp_path, results)
    names = ["results.csv", "results.json", "results.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads((tmp_path / "results.json").read_text()) == results

    page = (tmp_path / "results.md").read_text()
    assert table({**results["references"], "QPENet": results}) in page
    for part in (
        f"Protocol: {p}\n",
        "Spread over 2 seeds: mIoU 25.0 to 36.7, standard deviation 8.25 "
        "(0: 25.0, 7: 36.7).",
        "Gain over cosine, mIoU: +5.8 [-1.0, +12.0]",
        "95 % intervals over query images",
        "without episodes counts 0",
        "Checkpoint: last step (the novel classes had no say)\n",
    ):
        assert part in page


def test_sheet_has_a_row_a_class_and_the_means(two_seeds, tmp_path):
    names = ("dining, table", 'so "called"', "café")
    p = toy_protocol(seeds=(0, 7), classes=names)
    results = summarize(two_seeds, p, IDS, subset=names[:2])
    write_report(tmp_path, results)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "iou", "low", "high"]
    expected = [
        *zip(
            names,
            results["per_class"].values(),
            results["per_class_interval"].values(),
            strict=True,
        ),
        (
            'mean of dining, table, so "called"',
            results["subset"]["miou"],
            results["subset"]["miou_interval"],
        ),
        ("mIoU", results["miou"], results["miou_interval"]),
        ("FB-IoU", results["fb_iou"], results["fb_iou_interval"]),
    ]
    found = [(name, float(iou), [*map(float, ends)]) for name, iou, *ends in rows]
    assert found == expected
    for _, iou, (low, high) in found[:2]:
        assert low < iou < high


def test_page_without_the_optional_parts_and_of_trained_images(scores, tmp_path):
    results = summarize(scores, toy_protocol(), IDS)
    write_report(tmp_path, results | {"shared": {}})
    page = (tmp_path / "results.md").read_text()
    assert cells(page)[0] == ["IoU %", "QPENet"]
    assert "Spread over seeds: unknown, there is one (seed 0)." in page
    assert not re.search("Checkpoint|Gain|mean of|Warning", page)
    shared = {"scored images that were trained on": "2 of 9, such as a = b"}
    write_report(tmp_path, results | {"shared": shared})
    assert json.loads((tmp_path / "results.json").read_text())["shared"] == shared
    line = "\nWarning: scored images that were trained on: 2 of 9, such as a = b\n"
    assert line in (tmp_path / "results.md").read_text()
