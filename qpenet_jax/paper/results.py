"""The paper's own results: QPENet's rows of Tables I to V, in percent."""

from collections.abc import Mapping
from typing import NamedTuple

TABLES = {
    f"table{number}": f"Table {numeral}"
    for number, numeral in enumerate(("I", "II", "III", "IV", "V"), 1)
}
"""Printed names by those that `qpenet reproduce` takes."""

TICKS = {
    "table3": {
        "FGPE": lambda net: net.fgpe,
        "BGPE": lambda net: net.bgpe,
        "FFA": lambda net: net.decoder == "ffa",
    },
    "table4": {
        "P_pre": lambda net: "pre" in net.prototypes,
        "P_main": lambda net: "main" in net.prototypes,
        "P_aux": lambda net: "aux" in net.prototypes,
    },
    "table5": {
        "activation maps": lambda net: net.activation_maps,
        "SGM": lambda net: net.sgm,
    },
}
"""What a variant of QPENet has, by the columns of Tables III to V."""

FOLD_COLUMNS = ("Fold-0", "Fold-1", "Fold-2", "Fold-3", "mIoU", "FB-IoU")
"""Columns of Tables I and II; mIoU is the mean of the folds."""

FOLD_RESULTS: Mapping[str, Mapping[tuple[int, str], tuple[float, ...]]] = {
    "table1": {
        (1, "resnet50"): (65.2, 71.9, 64.1, 59.5, 65.2, 76.7),
        (5, "resnet50"): (68.4, 74.0, 67.4, 65.2, 68.8, 80.0),
        (1, "resnet101"): (67.0, 73.2, 63.7, 60.1, 66.0, 77.1),
        (5, "resnet101"): (69.8, 75.5, 66.8, 66.3, 69.6, 81.1),
    },
    "table2": {
        (1, "resnet50"): (41.5, 47.3, 40.9, 39.4, 42.3, 67.4),
        (5, "resnet50"): (47.3, 52.4, 44.3, 44.9, 47.2, 69.5),
        (1, "resnet101"): (39.8, 45.4, 40.5, 40.0, 41.4, 67.8),
        (5, "resnet101"): (47.2, 54.9, 43.4, 45.4, 47.7, 70.6),
    },
}
"""Tables I (PASCAL-5i) and II (COCO-20i) by shots and backbone; see FOLD_COLUMNS."""


class AblationResult(NamedTuple):
    """Scores of one variant on PASCAL-5i: mean of the folds, 1 shot, ResNet-50.

    `rows` maps a table's number to the variant's row in it, counted from 1.
    """

    rows: Mapping[int, int]
    miou: float
    fb_iou: float


ABLATION_RESULTS: Mapping[str, AblationResult] = {
    "baseline": AblationResult({3: 1}, 62.4, 74.1),
    "fgpe": AblationResult({3: 2}, 64.1, 75.7),
    "fgpe_bgpe": AblationResult({3: 3}, 64.5, 76.2),
    "fgpe_ffa": AblationResult({3: 4}, 64.8, 76.3),
    "full": AblationResult({3: 5, 4: 5, 5: 3}, 65.2, 76.7),
    "pre": AblationResult({4: 1}, 63.3, 74.6),
    "main": AblationResult({4: 2}, 61.8, 72.0),
    "aux": AblationResult({4: 3}, 58.1, 69.4),
    "main_aux": AblationResult({4: 4}, 64.1, 74.7),
    "without_maps": AblationResult({5: 1}, 61.6, 73.0),
    "sgm": AblationResult({5: 2}, 63.5, 75.6),
}
"""Tables III to V by the name of the variant in `models.variants.VARIANTS`."""


def rows_of(table: str) -> list[str]:
    """Returns the variants of `table3`, `table4` or `table5` from its top row down."""
    number = int(table[-1])
    rows = {
        name: result.rows[number]
        for name, result in ABLATION_RESULTS.items()
        if number in result.rows
    }
    return sorted(rows, key=rows.__getitem__)


def paper_results(table: str, shots: int, row: str) -> dict[str, float]:
    """Returns the paper's numbers of a row by column; none where it has no such row."""
    if table not in FOLD_RESULTS:
        result = ABLATION_RESULTS[row]
        return {"mIoU": result.miou, "FB-IoU": result.fb_iou}
    row = row.removesuffix("_deepstem")
    values = FOLD_RESULTS[table].get((shots, row), ())
    return dict(zip(FOLD_COLUMNS, values, strict=False))
