"""The authors' released network and training on PASCAL-5i, ResNet-50, 1 shot.

python train.py --config configs/released_pascal.py --check
python train.py --config configs/released_pascal.py

Fold 0; another one by `--config.dataset.fold=1`, fold 3 with `--config.epochs=50` as
well. Needs PSPNet's resnet50_v2.pth, converted by `qpenet convert resnet50_v2.pth
--backbone resnet50_deepstem`. What its authors did and what we do: docs/released.md.
Not yet run by us on the full data set.
"""

from configs import common


def get_config():
    return common.for_released(common.get_config())
