"""The network of the starter: photos of 56 classes, as the VOC subset otherwise.

python data/starter.py VOC CCP COCO OUT
qpenet prepare folder OUT --name starter --out data/
python train.py --config configs/starter.py

Trained on VOC's classes and on clothing, judged on classes of COCO that are neither:
38 minutes on two cores. In the mean with self-support it is what `predict` uses without
a run (qpenet_jax/starter/), made by `qpenet publish --dtype float16`: docs/starter.md.
"""

from configs import voc_subset_fold2
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
    config = voc_subset_fold2.get_config()
    config.dataset.kind = "prepared"
    config.dataset.name = "starter"
    config.dataset.root = "data/folder/starter/1.0.0"
    config.dataset.train_ids = config.dataset.val_ids = ""
    config.dataset.split = "named"
    config.dataset.fold = 0
    config.dataset.novel = tuple(name for name in COCO_CLASSES if name not in KNOWN)
    # The class is drawn first, so that most are clothes, several in a photo: only the
    # support says which is meant. VOC's photos alone can be learned without looking.
    config.dataset.order = "classes"
    config.side = SIDE
    config.augmentation.scale = (0.9 * SIDE / 473, 1.1 * SIDE / 473)
    config.steps = 3000
    config.save_every = 100
    config.eval.episodes = 400
    config.eval.references = True
    config.eval.subset = ()
    return config
