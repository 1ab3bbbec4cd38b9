"""PASCAL-5i fold 0, ResNet-50, 1 shot (Table I; the paper reports 65.2 mIoU).

python train.py --config configs/pascal_fold0.py --check   # 200 steps, a verdict
python train.py --config configs/pascal_fold0.py

Novel: aeroplane, bicycle, bird, boat, bottle.
200 epochs of 4,208 images = 210,400 steps of batch 4 at 473 pixels, about
2 TFLOP each: for a GPU. Not yet run by us on the full data set.
The recipe is ours, not the paper's: `qpenet_jax/config.py` says whose values are whose.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.dataset.fold = 0
    return config
