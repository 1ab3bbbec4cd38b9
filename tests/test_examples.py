"""The examples of docs/examples, run as they stand, at tiny sizes."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from qpenet_jax import InputError, load, load_backbone
from qpenet_jax.backbones.registry import BACKBONES
from qpenet_jax.models.variants import VARIANTS
from qpenet_jax.runs.build import build_backbone, build_model, complete, initial_params

pytestmark = pytest.mark.standard_promotion

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
SHRUNK = {
    "side": 25,
    "steps": 2,
    "batch_size": 2,
    "workers": 0,
    "model.channels": 8,
    "dataset.min_pixels": 64,
    "eval.protocol": "default",
    "eval.episodes": 2,
}


@pytest.fixture(scope="module")
def examples():
    """A function that imports an example; what it registers is forgotten at the end."""

    @functools.cache
    def imported(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    before = [(table, dict(table)) for table in (BACKBONES, VARIANTS)]
    known = set(sys.modules)
    yield imported
    for table, rows in before:
        table.clear()
        table.update(rows)
    for path in EXAMPLES.glob("*.py"):
        if path.stem not in known:
            sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, write_voc):
    """A folder as data/README.md describes it: 24 images, three classes."""
    root = tmp_path_factory.mktemp("mine")
    write_voc(root, images=24, classes=3)
    (root / "JPEGImages").rename(root / "images")
    (root / "SegmentationClassAug").rename(root / "masks")
    (root / "classes.txt").write_text("cat\ndog\nhorse\n")
    names = (root / "ids.txt").read_text().split()
    (root / "train.txt").write_text("\n".join(names[:12]))
    (root / "val.txt").write_text("\n".join(names[12:]))
    return root


@pytest.fixture(scope="module")
def weights(examples, tmp_path_factory):
    """The weight file of the example's backbone, which is in the table then."""
    path = tmp_path_factory.mktemp("weights") / "patches.safetensors"
    examples("add_backbone").write_weights(path)
    return path


@pytest.fixture(scope="module")
def run(examples, photos, weights, tmp_path_factory):
    """A run on the photos, of the examples' backbone and variant."""
    examples("add_variant")
    workdir = tmp_path_factory.mktemp("runs")
    fields = {"backbone.name": "patches", "backbone.weights": str(weights)}
    fields |= {"variant": "centred", **SHRUNK}
    examples("train_own_data").train_on(photos, workdir, ["dog"], **fields)
    return workdir / "run"


def test_a_network_is_trained_on_own_data_and_scored(run):
    results = json.loads((run / "results.json").read_text())
    assert results["protocol"]["classes"] == ["dog"]
    assert results["protocol"]["dataset"].startswith("mine")
    config = json.loads((run / "config.json").read_text())
    assert (config["variant"], config["backbone"]["name"]) == ("centred", "patches")


def test_a_photo_is_segmented_by_another(examples, run, photos, tmp_path):
    a, b = photos / "images/im_001.jpg", photos / "images/im_004.jpg"
    mask = photos / "masks/im_001.png"
    examples("segment").segment(run, a, mask, b, tmp_path / "out.png")
    support, marked, query = map(Image.open, (a, mask, b))
    written = np.asarray(Image.open(tmp_path / "out.png"))
    np.testing.assert_array_equal(written, 255 * load(run)(query, support, marked))
    assert written.shape == query.size[::-1]


def test_a_backbone_of_ones_own_is_a_row_and_a_file(examples, weights):
    images = np.random.default_rng(0).integers(0, 256, (33, 41, 3), np.uint8)
    (found,) = load_backbone("patches", weights)(images).values()
    assert found.shape == (5, 6, 32)
    # Cell (2, 3) is centred on pixel (16, 24): the kernel's 9 x 9 around it.
    net = BACKBONES["patches"]
    params = {k.rpartition("/")[2]: x for k, x in load_file(weights).items()}
    patch = (images[12:21, 20:29] / 255 - np.array(net.mean)) / np.array(net.std)
    by_hand = np.einsum("hwc,hwcd->d", patch, params["kernel"]) + params["bias"]
    np.testing.assert_allclose(found[2, 3], np.maximum(by_hand, 0), atol=1e-5)
    assert build_backbone(examples("add_backbone").get_config()) == net


def test_a_variant_by_code_and_one_by_fields(examples):
    """What is added to all features of an image changes nothing once they are centred.

    A row of fields alone is QPENet with them, an unknown one is refused.
    """
    example = examples("add_variant")
    config = example.get_config()
    config.update_from_flattened_dict({"model.channels": 8, "side": 33})
    config = complete(config)
    assert type(build_model(config)) is example.Centred
    rng = np.random.default_rng(0)
    support, query = rng.normal(size=(2, 1, 1, 5, 5, 1536)).astype(np.float32)
    masks = jnp.zeros((1, 1, 33, 33), jnp.int32).at[..., :17, :].set(1)
    variables = {"params": initial_params(config)}

    @jax.jit
    def margins(shift):
        inputs = support + shift, masks, query[0] + shift
        return build_model(config).apply(variables, *inputs)[0]

    np.testing.assert_allclose(margins(0.0), margins(3.0), atol=1e-4)

    config.variant = "main_prior"
    fields = build_model(config)
    assert (fields.prototypes, fields.prior) == (("main",), True)

    config.variant = "centered"
    with pytest.raises(InputError, match=r"config\.variant='centered'.*centred"):
        complete(config)
