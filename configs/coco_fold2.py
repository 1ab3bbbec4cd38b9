"""COCO-20i fold 2 (FWB split), ResNet-50, 1 shot (Table II; the paper: 40.9 mIoU).

python train.py --config configs/coco_fold2.py --check   # 200 steps, a verdict
python train.py --config configs/coco_fold2.py

Novel: ids 3, 7, ..., 79 of 1..80. 50 epochs of batch 4 at 473 pixels, about
2 TFLOP a step: for a GPU. Not yet run by us on the full data set.
The recipe is ours, not the paper's: `qpenet_jax/config.py` says whose values are whose.
"""

from configs import common


def get_config():
    config = common.for_coco(common.get_config())
    config.dataset.fold = 2
    return config
