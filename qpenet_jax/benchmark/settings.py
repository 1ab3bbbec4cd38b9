"""What `qpenet benchmark` can be asked to measure, checked before anything runs.

The command line reads its defaults here, so that this module imports nothing heavy
before settings are made.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from qpenet_jax.core.errors import InputError, check_choice

STEPS = ("eval", "train", "backbone")
"""What `cases` times: an evaluation step, a train step, the backbone alone."""

WHAT = (*STEPS, "protocol", "data", "memory", "runtimes", "predict")

TWIN_VARIANTS = {
    "eager": "eager, NCHW",
    "channels_last": "eager, channels_last",
    "compile": "torch.compile, channels_last",
}
"""Ways of running the PyTorch twin, and their names in tables."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to measure: "eval", "train" or "backbone" at these sizes.

    `size` is in pixels; `network` holds the fields of QPENet that differ from the
    paper's; `released` takes the authors' released network, without its defects.
    `weights` is the backbone's file, and without it they are random. All values are
    plain, so that another process can be given the case as JSON.
    """

    what: str
    backbone: str = "resnet50"
    shots: int = 1
    batch: int = 1
    size: int = 473
    dtype: str = "float32"
    seed: int = 0
    weights: str = ""
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    released: bool = False

    @property
    def images(self) -> int:
        """Numbers of images that pass the backbone in a step."""
        return self.batch * (self.shots + 1)

    def __str__(self) -> str:
        """Returns a name for tables and messages."""
        shots = f"{self.shots} shot{'s' if self.shots > 1 else ''}"
        network = "released " if self.released else ""
        return f"{network}{self.what}, {shots}, batch {self.batch}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure, and how long.

    Raises:
        InputError: a value that is unknown or too small.
    """

    what: Sequence[str] = ("eval", "train")
    """Any of WHAT: single steps, a whole evaluation ("protocol"), loading ("data"), or
    what evaluation and training will need ("memory"), a prediction beside run times of
    ONNX ("runtimes"), or what a user of `qpenet predict` waits for ("predict")."""

    shots: Sequence[int] = (1,)
    """Numbers of support images; each is measured."""

    batch: Sequence[int] = (1, 4)
    """Numbers of episodes in one step; each is measured."""

    size: int = 473
    """Side of the images in pixels."""

    dtype: Sequence[str] = ("float32",)
    """Number formats, any of `models.ops.precision.DTYPES`; each is measured."""

    backbone: str = "resnet50"
    """Name of the backbone."""

    weights: str = ""
    """File of the backbone's weights; without it they are random."""

    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of QPENet that differ from the paper's."""

    released: bool = False
    """Whether it is the authors' released network, models/released/."""

    against: Literal["torch"] | None = None
    """"torch" also measures the PyTorch twin, in turns with our steps."""

    variants: Sequence[str] = tuple(TWIN_VARIANTS)
    """Ways of running the twin, any of TWIN_VARIANTS; the fastest is compared."""

    episodes: int | None = None
    """protocol: episodes for each seed; by default those of the protocol."""

    workers: Sequence[int] = (0, 1, 2)
    """data: numbers of processes that load; 0 is a thread."""

    workdir: str = ""
    """predict: the run; without one the starter."""

    photos: int = 100
    """predict: number of photos."""

    seconds: float = 20.0
    """Shortest time of one comparison, and of one measurement of loading."""

    seed: int = 0
    """Seed of random weights, images and episodes."""

    processes: bool = True
    """Whether eval and train are also run in new processes, which tell the time to
    the first step and the peak memory."""

    def __post_init__(self):
        """Refuses what would fail later, or measure nothing."""
        self._check_names()
        self._check_numbers()
        self._check_network()

    def cases(self, steps: Sequence[str] | None = None) -> Iterator[Case]:
        """Yields the single steps, those of `what` by default, in the order of STEPS."""
        chosen = self.what if steps is None else steps
        sizes = itertools.product(STEPS, self.dtype, self.shots, self.batch)
        for what, dtype, shots, batch in sizes:
            if what in chosen:
                yield self.case(what, shots, batch, dtype)

    def case(self, what: str, shots: int, batch: int, dtype: str) -> Case:
        """Returns one step of these settings."""
        return Case(
            what,
            self.backbone,
            shots,
            batch,
            self.size,
            dtype,
            self.seed,
            self.weights,
            dict(self.network),
            self.released,
        )

    def _check_names(self) -> None:
        from qpenet_jax.backbones.precision import DTYPES
        from qpenet_jax.backbones.registry import backbone

        against = () if self.against is None else (self.against,)
        for name, values, choices in (
            ("what", self.what, WHAT),
            ("dtype", self.dtype, DTYPES),
            ("variants", self.variants, TWIN_VARIANTS),
            ("against", against, ("torch",)),
        ):
            for value in values:
                check_choice(f"--{name} ", value, choices)
        backbone(self.backbone)

    def _check_numbers(self) -> None:
        from qpenet_jax.data.transforms import check_side

        for name in ("what", "shots", "batch", "dtype", "variants", "workers"):
            if not getattr(self, name):
                raise InputError(f"--{name} is empty: give one value or more")
        for name, values, least in (
            ("shots", self.shots, 1),
            ("batch", self.batch, 1),
            ("episodes", () if self.episodes is None else (self.episodes,), 1),
            ("workers", self.workers, 0),
            ("photos", (self.photos,), 1),
            ("seconds", (self.seconds,), 0),
            ("seed", (self.seed,), 0),
        ):
            for value in values:
                if value < least:
                    raise InputError(f"--{name} {value}: give {least} or more")
        check_side(self.size)

    def _check_network(self) -> None:
        from qpenet_jax.models.qpenet import QPENet
        from qpenet_jax.models.released.network import ReleasedQPENet

        if self.released and (self.against or "protocol" in self.what):
            raise InputError(
                "--released is measured by itself, and in single steps: leave out "
                "--against and protocol"
            )
        try:
            (ReleasedQPENet if self.released else QPENet)(**self.network)
        except TypeError as error:
            raise InputError(f"network {dict(self.network)}: {error}") from None
