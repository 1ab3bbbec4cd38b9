"""Published runs: what is written, that it is opened as a run, from a hub as well."""

import contextlib
import json
import pickle
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from commands import assert_refused, passed, qpenet
from conftest import no_file_above, without_package
from PIL import Image
from safetensors import safe_open
from untrained import STEP

import qpenet_jax
from qpenet_jax import InputError
from qpenet_jax.runs.build import identity
from qpenet_jax.runs.folder import claim, open_run, read_inputs
from qpenet_jax.runs.publish import publish
from qpenet_jax.runs.published import MODEL_FILE, Facts, write_model


@pytest.fixture(scope="module")
def exact(untrained, tmp_path_factory):
    """The run, published exactly; not to be changed."""
    return publish(untrained, tmp_path_factory.mktemp("exact") / "published")


@pytest.fixture
def mine(exact, tmp_path):
    """A copy of it, which may be changed."""
    return Path(shutil.copytree(exact, tmp_path / "mine"))


def equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_published_run_is_the_run(exact, untrained):
    names = {"README.md", "config.json", "model.safetensors"}
    assert {f.name for f in exact.iterdir()} == names
    before, after = open_run(untrained), open_run(exact)
    equal(after.params, before.params)
    equal(after.weights, before.weights)
    assert after.step == before.step == STEP
    assert after.shared == before.shared
    assert read_inputs(exact) == read_inputs(untrained)
    assert identity(after.config) == identity(before.config)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_rounded_once_and_read_as_float32(tmp_path, exact, dtype):
    folder = publish(exact, tmp_path / "half", dtype=dtype)
    exactly, found = open_run(exact).params, open_run(folder).params
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), exactly)
    equal(found, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    with safe_open(folder / MODEL_FILE, "numpy") as file:
        assert str(file.get_tensor("gbc/P_global").dtype) == dtype
    numbers = sum(leaf.size for leaf in jax.tree.leaves(found))
    assert 2 * numbers < (folder / MODEL_FILE).stat().st_size < 2 * numbers + 9000
    assert f"stored in {dtype}, rounded" in (folder / "README.md").read_text()
    again = publish(folder, tmp_path / "again", dtype=dtype)
    equal(open_run(again).params, rounded)


def test_a_value_that_16_bits_cannot_hold_is_refused(tmp_path):
    params = {"a": jnp.array([1.0, 1e6])}
    facts = Facts(step=1, selection="last", inputs={})
    with pytest.raises(InputError, match="float16 can't: choose --dtype bfloat16"):
        write_model(tmp_path / MODEL_FILE, params, "float16", facts)
    assert not (tmp_path / MODEL_FILE).exists()
    write_model(tmp_path / MODEL_FILE, params, "bfloat16", facts)


def test_the_backbone_goes_along_if_asked_and_its_own_always(tmp_path, exact):
    folder = publish(exact, tmp_path / "whole", with_backbone=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["backbone"]["weights"] == "backbone.safetensors"
    run = open_run(folder)
    assert run.config.backbone.weights == str(folder / "backbone.safetensors")
    equal(run.weights, open_run(exact).weights)
    assert "backbone.safetensors in this folder" in (folder / "README.md").read_text()
    own = publish(folder, tmp_path / "own", dtype="float16")
    equal(open_run(own).weights, run.weights)


def test_the_config_names_no_folder_of_its_author(tmp_path, untrained):
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    config["dataset"]["root"] = "/home/somebody/photos"
    config["backbone"]["weights"] = str(tmp_path / "lite.safetensors")
    (run / "config.json").write_text(json.dumps(config))
    folder = publish(run, tmp_path / "published")
    text = (folder / "config.json").read_text() + (folder / "README.md").read_text()
    assert "somebody" not in text
    assert str(tmp_path) not in text
    with pytest.raises(InputError) as refused:
        _ = open_run(folder).weights
    message = str(refused.value)
    assert message.startswith("lite.safetensors: no such file")
    assert message.endswith(
        "(hash d269ff436f7d): give them by --config.backbone.weights=FILE"
    )


def test_the_card_says_what_the_run_is(exact, untrained, tmp_path):
    card = (exact / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: qpenet_jax\n")
    assert "license:" not in card
    for fact in ("65 x 65 pixels", "Shapes, split pascal, fold 0", "step 3", "arrow"):
        assert fact in card
    licensed = publish(exact, tmp_path / "licensed", license="cc-by-4.0")
    assert "\nlicense: cc-by-4.0\n" in (licensed / "README.md").read_text()
    # It repeats results of the same checkpoint alone.
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    (run / "results.md").write_text("# Results\n\nProtocol: default\n")
    for step, words in ((STEP, "Protocol: default"), (2, "None were found")):
        (run / "results.json").write_text(json.dumps({"step": step}))
        folder = publish(run, tmp_path / f"step{step}")
        assert words in (folder / "README.md").read_text()


def test_commands_take_a_published_run(mine, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    mask = np.zeros((40, 50), np.uint8)
    mask[10:30, 10:30] = 1
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    photo, out, run = tmp_path / "a.png", tmp_path / "masks", ("--workdir", mine)
    support = f"{photo}:{tmp_path / 'm.png'}"
    passed("predict", "--support", support, "--query", photo, *run, "--out", out)
    expected = qpenet_jax.load(mine)(pixels, pixels, mask)
    np.testing.assert_array_equal(np.array(Image.open(out / "a.png")), 255 * expected)
    passed("evaluate", *run, "--episodes", 1)
    (results,) = mine.glob("evaluate/*/results.json")
    assert json.loads(results.read_text())["step"] == STEP
    episodes = ("episodes", "export", "--episodes", 1, "--out", out / "list.csv")
    assert "1 episodes in" in passed(*episodes, *run).stdout


def test_a_model_that_is_not_what_was_written_is_refused(mine):
    model = mine / MODEL_FILE
    whole = model.read_bytes()
    with safe_open(model, "numpy") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(model)
    tensors["gbc/P_global"] = np.full_like(tensors["gbc/P_global"], np.nan)
    for content, words in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "values aren't what was written"),
        (whole[:-7], "is no model of `qpenet publish`"),
        (b"", "is no model of `qpenet publish`"),
        (pickle.dumps(print), "is no model of `qpenet publish`"),
        (whole.replace(b"qpenet_jax run 1", b"qpenet_jax run 2"), "run 2, not"),
        (whole.replace(b'\\"step\\": 3', b'\\"stop\\": 3'), "is no model of"),
        (whole.replace(b'\\"step\\": 3', b'\\"step\\":[]'), "of other types"),
        (safetensors.numpy.save(tensors, metadata), "not finite or .*: gbc/P_global"),
    ):
        model.write_bytes(content)
        with pytest.raises(InputError, match=words) as refused:
            open_run(mine)
        assert str(model) in str(refused.value)


def test_a_published_run_has_one_checkpoint_one_network_and_is_not_trained_on(mine):
    with pytest.raises(InputError, match="no checkpoint by 'novel': choose last"):
        open_run(mine, selection="novel")
    assert open_run(mine, selection="last").step == STEP
    with pytest.raises(InputError, match="published run, which can't be trained on"):
        claim(mine, open_run(mine).config, {})
    config = json.loads((mine / "config.json").read_text())
    config["model"]["channels"] = 2**20  # a network that is refused without making it
    (mine / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="doesn't fit its config: wrong shape"):
        open_run(mine)


def test_publishing_replaces_nothing_and_leaves_nothing(tmp_path, exact, untrained):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    full = qpenet("publish", "--workdir", untrained, "--out", tmp_path / "full")
    assert_refused(full, "exists and isn't empty: choose another folder")
    with no_file_above(1000), pytest.raises(InputError, match="make room"):
        publish(exact, tmp_path / "new")
    assert [f.name for f in tmp_path.iterdir()] == ["full"]


# The hub.

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(SimpleHTTPRequestHandler):
    """A stand-in for the hub: serves a folder that is laid out as its addresses."""

    def log_message(self, *_):
        self.server.asked.append(self.path)

    def end_headers(self):
        self.send_header("ETag", f'"{self.path.replace("/", "-")}"')
        self.send_header("X-Repo-Commit", self.path.split("/")[-2])
        super().end_headers()


def put_on_hub(root, revision, folder):
    """Lays out a folder as a revision of the repository ann/shapes."""
    api, commit = root / "api" / "models" / "ann" / "shapes", COMMITS[revision]
    shutil.copytree(folder, root / "ann" / "shapes" / "resolve" / commit)
    files = {f.name: f.stat().st_size for f in folder.iterdir()}
    about = {"id": "ann/shapes", "sha": commit}
    about["siblings"] = [{"rfilename": name} for name in files]
    listed = [
        {"type": "file", "path": name, "size": size, "oid": name}
        for name, size in files.items()
    ]
    for path, content in (
        (api / "revision" / revision, about),
        (api / "tree" / commit, listed),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


@pytest.fixture
def asked(exact, tmp_path, monkeypatch):
    """Paths asked of the stand-in; its revisions are in 16 bits, and exact."""
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="no huggingface_hub: pip install -e .[hub]"
    )
    half = publish(exact, tmp_path / "half", dtype="float16")
    (half / "evil.pkl").write_bytes(pickle.dumps(print))
    for revision, folder in (("main", half), ("v1", exact)):
        put_on_hub(tmp_path / "hub", revision, folder)
    handler = partial(Hub, directory=tmp_path / "hub")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        url = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = template.replace(constants.ENDPOINT, url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        with contextlib.chdir(tmp_path):
            yield server.asked
        server.shutdown()


def test_a_run_is_loaded_from_the_hub(asked, tmp_path, exact):
    run = open_run("ann/shapes")
    equal(run.params, open_run(tmp_path / "half").params)
    assert not any("evil" in path for path in asked if "resolve" in path)
    pinned = open_run("ann/shapes@v1")
    equal(pinned.params, open_run(exact).params)
    image = np.zeros((40, 50, 3), np.uint8)
    segmenter = qpenet_jax.load("ann/shapes@v1")
    assert segmenter(image, image, np.ones((40, 50), np.uint8)).shape == (40, 50)


def test_what_the_hub_does_not_have_is_one_line(asked):
    for name in ("ann/nothing", "ann/shapes@v9"):
        with pytest.raises(InputError, match=f"{name}: no such folder, and the Hug"):
            open_run(name)
    nowhere = qpenet("evaluate", "--workdir", "ann/shapes")
    assert_refused(nowhere, "give --out, a folder for the results")
    asked.clear()
    Path("runs").mkdir()  # a wrong name in a folder of this machine asks no hub
    with pytest.raises(InputError, match="runs/nothing is no run"):
        open_run("runs/nothing")
    assert not asked


def test_without_the_library_the_remedy_is_said(tmp_path):
    with (
        contextlib.chdir(tmp_path),
        without_package("huggingface_hub"),
        pytest.raises(InputError) as refused,
    ):
        open_run("ann/shapes")
    assert str(refused.value) == (
        "ann/shapes: no such folder; to look for it on the Hugging Face hub, run "
        "`pip install huggingface_hub`"
    )
