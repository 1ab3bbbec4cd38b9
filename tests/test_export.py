"""Exported networks: equal to ours, reloaded without this package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import assert_refused, qpenet
from conftest import without_package
from PIL import Image
from untrained import SIDE

from qpenet_jax import InputError
from qpenet_jax.core.types import Episode
from qpenet_jax.data.folds import PASCAL_CLASSES
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.data.transforms import fit, fit_label, unpad
from qpenet_jax.models import ops
from qpenet_jax.runs.build import build_predictor
from qpenet_jax.runs.export import Part, export
from qpenet_jax.runs.export import onnx as onnx_model
from qpenet_jax.runs.folder import open_run

GUIDE = Path(__file__).parents[1] / "docs" / "export.md"


def example(name):
    """Returns a block of code of the guide."""
    return re.search(f"```python {name}\n(.*?)```", GUIDE.read_text(), re.S)[1]


@pytest.fixture(scope="module")
def predict(untrained):
    run = open_run(untrained)
    return build_predictor(run.config, run.params, run.weights)


@pytest.fixture(scope="module")
def stablehlo(untrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stablehlo") / "exported"
    return export(untrained, folder, format="stablehlo", shots=(1, 5))


@pytest.fixture(scope="module")
def onnx(untrained, tmp_path_factory):
    for package in ("onnxruntime", "jax2onnx"):
        pytest.importorskip(package, reason=f"no {package}: see docs/export.md")
    folder = tmp_path_factory.mktemp("onnx") / "exported"
    return export(untrained, folder, format="onnx", shots=(1, 5))


def episode(photos, labels, shots):
    """Returns an episode of the first photo as query and so many others."""
    images = np.stack([fit(p, SIDE) for p in photos])
    masks = np.stack([fit_label(m, SIDE) for m in labels])
    return Episode(
        images[:1], masks[:1], images[None, 1:][:, :shots], masks[None, 1:][:, :shots]
    )


def through(call, episode, shots):
    """Returns margin and probability of an episode by an exported network."""
    supports = [
        call("encode_support", image=episode.support_images[:, k]) for k in range(shots)
    ]
    stacked = {n: np.stack([s[n] for s in supports], 1) for n in supports[0]}
    query = call("encode_query", image=episode.query_image)
    found = call(f"decode_{shots}shot", masks=episode.support_masks, **stacked, **query)
    return np.asarray(found["margin"]), np.asarray(found["probability"])


def loaded(folder, block):
    """Returns `call` as the guide makes it."""
    names = {}
    exec(block.replace('Path("exported")', f"Path({str(folder)!r})"), names)
    return names["call"]


@pytest.fixture(scope="module")
def made_up():
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (40 + 9 * i, 90, 3), np.uint8) for i in range(6)]
    masks = [np.zeros(p.shape[:2], np.uint8) for p in photos]
    for i, mask in enumerate(masks):
        mask[5 : 25 + i, 10 : 50 + i] = 1
    return photos, masks


def real(voc):
    """Returns six photos of VOC in which a cat covers much."""
    lists, cat = voc / "lists" / "subset_val.txt", PASCAL_CLASSES.index("cat") + 1
    data = VOCLayout(voc / "VOCdevkit" / "VOC2012", lists, PASCAL_CLASSES)
    chosen = np.flatnonzero(data.counts[:, cat - 1] > 4000)[:6].tolist()
    assert len(chosen) == 6
    masks = [(data.label(i) == cat).astype(np.uint8) for i in chosen]
    return [data.image(i) for i in chosen], masks


def check(call, predict, photos, masks, tolerance):
    for shots in (1, 5):
        given = episode(photos, masks, shots)
        expected = np.asarray(predict(given))
        margin, probability = through(call, given, shots)
        assert margin.shape == probability.shape == expected.shape
        largest = max(np.abs(expected).max(), 1)
        assert np.abs(margin - expected).max() < tolerance * largest
        assert np.abs(probability - 1 / (1 + np.exp(-expected))).max() < tolerance


def test_stablehlo_computes_what_we_do(stablehlo, predict, made_up):
    check(loaded(stablehlo, example("stablehlo")), predict, *made_up, tolerance=1e-5)


def test_export_json_names_all_that_a_program_needs(stablehlo):
    about = json.loads((stablehlo / "export.json").read_text())
    assert about["side"] == SIDE
    assert about["shots"] == [1, 5]
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert sorted(f.name for f in stablehlo.iterdir()) == sorted(
        ["export.json", *(part["file"] for part in about["parts"].values())]
    )
    for part in about["parts"].values():
        read = jax.export.deserialize((stablehlo / part["file"]).read_bytes())
        listed = {x["name"]: (tuple(x["shape"]), x["dtype"]) for x in part["inputs"]}
        avals = dict(zip(sorted(listed), read.in_avals, strict=True))
        assert listed == {n: (a.shape, str(a.dtype)) for n, a in avals.items()}
        assert read.platforms == ("cpu", "cuda", "tpu")


def guide_used(folder, exported, format, *missing):
    """Runs the guide's example, where some packages are missing.

    Returns the photos a and b, the mask of a, and the mask that was found for b.
    """
    photos = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[5:40, 10:50] = 200
    for name, pixels in {"a.bmp": photos[0], "b.bmp": photos[1], "a.png": mask}.items():
        Image.fromarray(pixels).save(folder / name)
    (folder / "exported").symlink_to(exported)
    missing = ("qpenet_jax", "flax", "orbax", "cv2", "safetensors", *missing)
    code = f"import sys\nsys.modules |= dict.fromkeys({missing})\n"
    code += example(format) + example("use").replace(".jpg", ".bmp")
    (folder / "use.py").write_text(code)
    subprocess.run([sys.executable, "use.py"], cwd=folder, check=True)
    return *photos, mask > 0, np.array(Image.open(folder / "mask.png")) == 255


def test_the_guides_example_runs_with_jax_alone(stablehlo, predict, tmp_path):
    a, b, mask, found = guide_used(tmp_path, stablehlo, "stablehlo")
    given = Episode(
        fit(b, SIDE)[None],
        fit_label(np.zeros_like(mask, np.uint8), SIDE)[None],
        fit(a, SIDE)[None, None],
        fit_label(mask.astype(np.uint8), SIDE)[None, None],
    )
    expected = unpad(np.asarray(predict(given))[0], 64, 64) > 0
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parity
def test_onnx_computes_what_we_do_on_real_photos(onnx, predict, shared_voc):
    photos, masks = real(shared_voc)
    check(loaded(onnx, example("onnx")), predict, photos, masks, tolerance=1e-4)


@pytest.mark.parity
def test_onnx_files_are_named_as_the_guide_says_and_need_no_jax(onnx, tmp_path):
    import onnxruntime

    about = json.loads((onnx / "export.json").read_text())
    for part in about["parts"].values():
        session = onnxruntime.InferenceSession(onnx / part["file"])
        for kind, listed in (
            (session.get_inputs(), part["inputs"]),
            (session.get_outputs(), part["outputs"]),
        ):
            found = {x.name: list(x.shape) for x in kind}
            assert found == {x["name"]: x["shape"] for x in listed}
    *_, found = guide_used(tmp_path, onnx, "onnx", "jax")
    assert found.shape == (64, 64)


def test_what_cannot_be_exported_is_one_line(untrained, tmp_path):
    run, out = f"--workdir={untrained}", tmp_path / "out"
    shots = qpenet("export", run, "--format=stablehlo", "--shots=0", f"--out={out}")
    assert_refused(shots, "--shots: give numbers from 1 on")
    with without_package("onnx"):
        onnx = qpenet("export", run, "--format=onnx", f"--out={out}")
    assert_refused(onnx, "--format onnx needs onnx, which isn't installed")
    assert_refused(onnx, "pip install --no-deps jax2onnx")
    with pytest.raises(InputError, match="choose stablehlo, onnx"):
        export(untrained, out, format="tflite")
    assert not out.exists()


@pytest.mark.parity
def test_onnx_attends_to_the_true_keys_where_others_are_far_larger():
    """jax2onnx's own attention lets these take all the weight before it masks them."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime")
    pytest.importorskip("jax2onnx", reason="no jax2onnx: see docs/export.md")
    query = np.full((1, 2, 1, 4), 10, np.float32)
    key = np.array([1, 2, 100], np.float32).reshape(1, 3, 1, 1) * query[:, :1]
    value = np.arange(12, dtype=np.float32).reshape(1, 3, 1, 4)
    given = {"query": query, "key": key, "value": value}
    given["mask"] = np.array([[True, True, False]])

    def attend(**inputs):
        return {"out": ops.attention(**inputs)}

    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in given.items()}
    model = onnx_model(Part(attend, shapes), "attention")
    (found,) = onnxruntime.InferenceSession(model).run(None, given)
    np.testing.assert_allclose(found, np.broadcast_to(value[:, 1:2], found.shape))
    np.testing.assert_allclose(found, attend(**given)["out"], rtol=1e-5)
