"""PASCAL-5i fold 0 (novel: aeroplane, bicycle, bird, boat, bottle), ResNet-50, 1 shot.

python train.py --config configs/pascal_fold0.py --workdir runs/pascal_fold0

200 epochs of 4,208 images = 210,400 steps of batch 4 at 473 pixels. The paper reports
65.2 mIoU. Not yet run by us: it needs a GPU and the whole of PASCAL VOC + SBD.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.dataset.fold = 0
    return config
