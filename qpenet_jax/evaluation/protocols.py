"""How a number came about: the evaluation protocol, and those of published codes."""

import dataclasses
import json
from typing import Any, get_args

from qpenet_jax.core.choices import Order, Resize, Scoring, Targets
from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.types import IGNORE, SegmentationDataset
from qpenet_jax.data.episodes import MIN_PIXELS
from qpenet_jax.data.transforms import check_side
from qpenet_jax.data.versions import dataset_version

FIVE_SEEDS = (0, 1, 2, 3, 4)

HASH_DIGITS = 12
"""How many digits stand for the hash of an episode list in a line of text."""

# In what published evaluations differ from the defaults of `Protocol`. Their random
# episodes can't be repeated outside of their code; a preset has their rules.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # QPENet, IV.B: random pairs by the protocol of PFENet, so at original size; the
    # number of seeds is that of the released test script.
    "paper": {"seeds": FIVE_SEEDS},
    # QPENet's released test script, which counts on the padded network input.
    "released": {
        "seeds": FIVE_SEEDS,
        "order": "list",
        "targets": "any",
        "scoring": "input",
    },
    "pfenet": {
        "episodes": 5000,
        "order": "list",
        "targets": "any",
        "exclude_novel": False,
    },
    "bam": {"seeds": FIVE_SEEDS, "order": "list", "targets": "any"},
    # 400 x 400 whatever the aspect ratio; 401 is the nearest side the network takes.
    "hsnet": {
        "order": "pairs",
        "resize": "squash",
        "side": 401,
        "scoring": "input",
        "exclude_novel": False,
    },
}

# ... and on COCO-20i.
PRESETS_ON_COCO: dict[str, dict[str, Any]] = {
    "paper": {"episodes": 4000},
    "pfenet": {"episodes": 20000},
    "hsnet": {"order": "classes"},
}


CHOICES = {
    "scoring": get_args(Scoring),
    "order": get_args(Order),
    "targets": get_args(Targets),
    "resize": get_args(Resize),
    "preset": tuple(PRESETS),
}

OF_A_RUN = {"release", "version", "shots", "ignore", "preset"}
"""Fields that have a default but that no preset fixes."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What was measured and how: two results compare only if these are equal.

    `split` is the family of folds, `release` the prepared data set (and so the training
    images), `version` a hash of the scored images' names and pixel counts;
    `exclude_novel` says that training left out images with pixels of novel classes.
    `order` is how queries follow each other, `targets` which classes of a query count,
    from `min_pixels` on or any pixel (see `EpisodeSampler`); `episode_list` is the hash
    of a list that replaces drawing.

    `scoring` is the size at which pixels are counted. "original" follows PFENet and its
    descendants: logits stretched to a square of the query's longer side, which shifts
    them by some pixels; "exact" undoes the padding first; "input" counts on the padded
    network input, 473 x 473 in the paper.
    """

    dataset: str
    split: str
    fold: int
    classes: tuple[str, ...]
    release: str = ""
    version: str = ""
    exclude_novel: bool = True
    shots: int = 1
    episodes: int = 1000
    seeds: tuple[int, ...] = (0,)
    order: Order = "shuffled"
    targets: Targets = "large"
    min_pixels: int = MIN_PIXELS
    side: int = 473
    resize: Resize = "pad"
    scoring: Scoring = "original"
    ignore: int = IGNORE
    episode_list: str = ""
    preset: str = "default"

    def __post_init__(self):
        """Refuses values that name no protocol."""
        for name, choices in CHOICES.items():
            check_choice(f"{name} ", getattr(self, name), choices)
        repeated = len(set(self.seeds)) < len(self.seeds)
        if self.episodes < 1 or not self.seeds or repeated or min(self.seeds) < 0:
            raise InputError(
                f"{self.episodes} episodes with seeds {list(self.seeds)}: give 1 "
                "episode or more, and different seeds from 0 on"
            )
        check_side(self.side)

    @property
    def name(self) -> str:
        """The preset and whatever differs from it."""
        changes = [
            f"{field}={_short(getattr(self, field))}"
            for field, value in preset_fields(self.preset, self.split).items()
            if getattr(self, field) != value
        ]
        return ", but ".join([self.preset, *([" ".join(changes)] if changes else [])])

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, the name and the line as results.json holds them."""
        fields = dataclasses.asdict(self) | {"name": self.name, "text": str(self)}
        return json.loads(json.dumps(fields))

    def __str__(self) -> str:
        """Returns the one line that is printed with every result."""
        size = "any size" if self.targets == "any" else f">= {self.min_pixels} px"
        rule = f"{self.order} queries, targets of {size}"
        if self.episode_list:
            rule = f"episode list {_short(self.episode_list)}"
        novel = "without" if self.exclude_novel else "with"
        versions = " ".join(filter(None, (self.release, self.version)))
        version = f" ({versions})" if versions else ""
        return (
            f"{self.name}: {self.dataset}{version}, {self.split} fold {self.fold}, "
            f"{self.shots}-shot, {self.episodes} episodes x seeds "
            f"{_short(self.seeds)}, {rule}, input {self.side} ({self.resize}), scored "
            f"at {self.scoring} size, {self.ignore} ignored, trained {novel} images "
            "that show novel classes"
        )


def preset_fields(preset: str, split: str) -> dict[str, Any]:
    """Returns all fields that a preset fixes, on the family of folds `split`.

    Raises:
        InputError: there is no such preset.
    """
    check_choice("protocol ", preset, PRESETS)
    fields = {
        field.name: field.default
        for field in dataclasses.fields(Protocol)
        if field.default is not dataclasses.MISSING and field.name not in OF_A_RUN
    }
    on_coco = PRESETS_ON_COCO.get(preset, {}) if split.startswith("coco") else {}
    return fields | PRESETS[preset] | on_coco


def of_dataset(protocol: Protocol, dataset: SegmentationDataset) -> Protocol:
    """Returns the protocol with the release and version of the data it is used on."""
    release = getattr(dataset, "version", "")
    return dataclasses.replace(
        protocol, release=release, version=dataset_version(dataset)
    )


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))  # seeds: all of them count
    return str(value)[:HASH_DIGITS]
