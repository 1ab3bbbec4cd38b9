"""What `qpenet benchmark` can measure, checked before anything runs.

The command line makes its options of the fields that have a help text, so this module
imports nothing that takes long.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qpenet_jax.core.errors import InputError, check_choice

STEPS = ("eval", "train", "backbone")
"""An evaluation step, a train step, the backbone alone."""

WHAT = (*STEPS, "protocol", "data", "memory", "runtimes", "predict")

VARIANTS = ("eager", "channels_last", "compile")
"""Ways of running the PyTorch twin: by default in NCHW, or with channels last, or so
and compiled by torch.compile."""


def option(default: Any, text: str, least: int | None = None) -> Any:
    """Returns a field with its help text and the smallest number that it can have."""
    metadata = {"help": text, "least": least}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to measure: "eval", "train" or "backbone" at these sizes.

    All values can be written as JSON, so that another process can measure the case.
    `network` holds the fields of QPENet that differ from the paper's.
    """

    what: str
    shots: int = 1
    batch: int = 1
    dtype: str = "float32"
    backbone: str = "resnet50"
    size: int = 473
    released: bool = False
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """Returns a name for tables and messages."""
        shots = f"{self.shots} shot{'s' if self.shots > 1 else ''}"
        network = "released " if self.released else ""
        return f"{network}{self.what}, {shots}, batch {self.batch}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure, and how long.

    `network` is that of `Case`. The images of "protocol" and "data" are those of
    `config`, a complete config; without one they are made up.

    Raises:
        InputError: a value that is unknown or too small.
    """

    backbone: str = option("resnet50", "name of the backbone")
    size: int = option(473, "side of the images in pixels")
    released: bool = option(
        False, "measure the network that the authors released, not the paper's"
    )
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Any = None
    what: Sequence[str] = option(("eval", "train"), f"any of {', '.join(WHAT)}")
    shots: Sequence[int] = option((1,), "numbers of support images", least=1)
    batch: Sequence[int] = option((1, 4), "numbers of episodes in one step", least=1)
    dtype: Sequence[str] = option(
        ("float32",), "number formats: float32, tf32, bfloat16"
    )
    against: str = option("", "also measure the same network in PyTorch: torch")
    variants: Sequence[str] = option(
        VARIANTS, "ways of running PyTorch; compile takes minutes"
    )
    seconds: float = option(20.0, "shortest time for comparing one case", least=0)
    episodes: int = option(
        0,
        "protocol: number of episodes for each seed, or 0 for the protocol's",
        least=0,
    )
    workers: Sequence[int] = option(
        (0, 1, 2), "data: numbers of loading processes; 0 is a thread", least=0
    )
    workdir: str = option("", "predict: folder of a run, by default the starter")
    photos: int = option(100, "predict: number of made-up photos", least=1)

    def __post_init__(self):
        """Refuses values with which a measurement would fail later."""
        from qpenet_jax.backbones.precision import DTYPES
        from qpenet_jax.backbones.registry import backbone
        from qpenet_jax.data.transforms import check_side

        known = {"what": WHAT, "dtype": DTYPES, "variants": VARIANTS}
        known["against"] = ("torch",)
        for name, value, least in self._given():
            if least is not None and value < least:
                raise InputError(f"--{name} {value}: give {least} or more")
            if name in known:
                check_choice(f"--{name} ", value, known[name])
        check_side(self.size)
        backbone(self.backbone)
        if self.released and (self.against or "protocol" in self.what):
            raise InputError(
                "--released is measured by itself, and in single steps: leave out "
                "--against and protocol"
            )

    def _given(self) -> Iterator[tuple[str, Any, int | None]]:
        """Yields every value with the name of its field and the smallest allowed."""
        for field in dataclasses.fields(self):
            given, least = getattr(self, field.name), field.metadata.get("least")
            for value in given if isinstance(given, tuple) else (given,):
                if value != "":
                    yield field.name, value, least

    def cases(self, steps: Sequence[str]) -> Iterator[Case]:
        """Yields these single steps at all sizes and in every dtype."""
        names = ("backbone", "size", "released", "network")
        shared: dict[str, Any] = {name: getattr(self, name) for name in names}
        for values in itertools.product(steps, self.shots, self.batch, self.dtype):
            yield Case(*values, **shared)
