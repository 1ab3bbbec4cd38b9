"""The starter model that comes with the package: photos of 56 classes, 2 CPU cores.

python data/starter.py VOC CCP COCO OUT
qpenet prepare folder OUT --name starter --out data/
python train.py --config configs/starter.py

Trained on VOC's classes and on clothing, judged on classes of COCO that are neither.
"""

from configs import common
from qpenet_jax.data.folds import COCO_CLASSES

# fmt: off
KNOWN = {
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "boat",
    "bird", "cat", "dog", "horse", "sheep", "cow", "bottle", "chair", "couch",
    "potted plant", "dining table", "tv", "backpack", "handbag", "tie",
}
"""COCO's names of classes that VOC or the clothing set have."""
# fmt: on

SIDE = 241


def get_config():
    config = common.get_config()
    config.dataset.name = "starter"
    config.dataset.root = "data/folder/starter/1.0.0"
    config.dataset.split = "named"
    config.dataset.novel = tuple(name for name in COCO_CLASSES if name not in KNOWN)
    config.dataset.on_few = "drop"
    config.dataset.order = "shuffled"

    config.dataset.min_pixels = 2048
    config.backbone.name = "efficientnet_lite0"
    config.backbone.weights = ""
    # Not block14, whose features know the base classes best (docs/training.md).
    config.backbone.stages = ("block4", "block10")
    config.recipe = "paper"  # with AdamW it is stable
    config.optimizer.name = "adamw"
    config.optimizer.lr = 5e-4
    config.optimizer.lr_factor = 1.0
    config.model.channels = 128
    config.model.shared_reducer = True
    config.model.channel_dropout = 0.2
    config.side = SIDE
    config.augmentation.scale = (0.9 * SIDE / 473, 1.1 * SIDE / 473)
    config.steps = 3000
    config.workers = 1
    config.log_every = 10
    config.save_every = 100
    config.select_on = "last"
    config.eval.protocol = "ours"
    config.eval.episodes = 400
    config.eval.references = True
    return config
