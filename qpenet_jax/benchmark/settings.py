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


LEAST = {"shots": 1, "batch": 1, "photos": 1, "seconds": 0, "episodes": 0, "workers": 0}
"""The smallest number that a field of the settings can have."""


def option(default: Any, text: str) -> Any:
    """Returns a field with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


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
    released: bool = option(False, "measure the authors' released network")
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Any = None
    what: Sequence[str] = option(("eval", "train"), f"any of {', '.join(WHAT)}")
    shots: Sequence[int] = option((1,), "numbers of support images")
    batch: Sequence[int] = option((1, 4), "numbers of episodes in one step")
    dtype: Sequence[str] = option(("float32",), "of float32, tf32, bfloat16")
    against: Sequence[str] = option(
        (), "torch: measure the same network in PyTorch too"
    )
    variants: Sequence[str] = option(
        VARIANTS, "ways of running PyTorch; compile takes minutes"
    )
    seconds: float = option(20.0, "shortest time for comparing one case")
    episodes: int = option(0, "protocol: episodes for each seed; 0: the protocol's")
    workers: Sequence[int] = option((0, 1, 2), "data: loading processes; 0: a thread")
    workdir: str | None = option(None, "predict: folder of a run; default: the starter")
    photos: int = option(100, "predict: number of made-up photos")

    def __post_init__(self):
        """Refuses values with which a measurement would fail later."""
        from qpenet_jax.backbones.precision import DTYPES
        from qpenet_jax.backbones.registry import backbone
        from qpenet_jax.data.transforms import check_side

        known = {"what": WHAT, "dtype": DTYPES, "variants": VARIANTS}
        for name, values in (known | {"against": ("torch",)}).items():
            for value in getattr(self, name):
                check_choice(f"--{name} ", value, values)
        for name, least in LEAST.items():
            given = getattr(self, name)
            lowest = min(given) if isinstance(given, tuple) else given
            if lowest < least:
                raise InputError(f"--{name} {lowest}: give {least} or more")
        check_side(self.size)
        backbone(self.backbone)
        if self.released and (self.against or "protocol" in self.what):
            raise InputError(
                "--released is measured by itself, and in single steps: leave out "
                "--against and protocol"
            )

    def cases(self, steps: Sequence[str]) -> Iterator[Case]:
        """Yields these single steps at all sizes and in every dtype."""
        names = ("backbone", "size", "released", "network")
        shared: dict[str, Any] = {name: getattr(self, name) for name in names}
        for values in itertools.product(steps, self.shots, self.batch, self.dtype):
            yield Case(*values, **shared)
