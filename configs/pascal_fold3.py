"""PASCAL-5i fold 3, ResNet-50, 1 shot (Table I; the paper reports 59.5 mIoU).

python train.py --config configs/pascal_fold3.py --check   # 200 steps, a verdict
python train.py --config configs/pascal_fold3.py

Novel: pottedplant, sheep, sofa, train, tvmonitor.
200 epochs of 4,510 images = 225,400 steps of batch 4 at 473 pixels, about
2 TFLOP each: for a GPU. Not yet run by us on the full data set.
The recipe is ours, not the paper's: `qpenet_jax/config.py` says whose values are whose.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.dataset.fold = 3
    return config
