"""COCO-20i fold 3 (FWB split), ResNet-50, 1 shot (Table II; the paper: 39.4 mIoU).

python train.py --config configs/coco_fold3.py --check   # 200 steps, a verdict
python train.py --config configs/coco_fold3.py

Novel: ids 4, 8, ..., 80 of 1..80. 50 epochs of batch 4 at 473 pixels, about
2 TFLOP a step: for a GPU. Not yet run by us on the full data set.
The recipe is ours, not the paper's: `qpenet_jax/config.py` says whose values are whose.
"""

from configs import common


def get_config():
    config = common.for_coco(common.get_config())
    config.dataset.fold = 3
    return config
