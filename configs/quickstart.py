"""The embedded default: novel shapes after minutes of training on 2 CPU cores.

python train.py --config configs/quickstart.py

About 4 minutes; 70 mIoU on the held-out classes, cosine baseline 45, untrained 0.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.dataset.kind = "shapes"
    config.dataset.name = "Shapes"
    config.dataset.fold = 0
    config.dataset.min_pixels = 2048
    config.backbone.name = "efficientnet_lite0"
    config.backbone.weights = ""
    config.recipe = "paper"  # with AdamW it is stable
    config.optimizer.name = "adamw"
    config.optimizer.lr = 5e-4
    config.optimizer.lr_factor = 1.0
    # For minutes of training instead of days: a narrower network, one reducer for
    # support and query (features are comparable from the start), little dropout.
    config.model.channels = 128
    config.model.shared_reducer = True
    config.model.channel_dropout = 0.1
    config.side = 161
    config.steps = 400
    config.workers = 1
    config.log_every = 10
    config.save_every = 100
    config.select_on = "last"
    config.eval.protocol = "default"
    config.eval.episodes = 200
    config.eval.references = True
    return config
