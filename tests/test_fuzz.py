"""Every input is either right or refused: random odd files, and what is made of them.

`pytest` tries a few of each kind, `pytest -m slow` more of them. `python
tests/test_fuzz.py 1000 images` tries so many and counts (docs/reliability.md).
"""

import atexit
import collections
import contextlib
import csv
import functools
import io
import json
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import fuzzing
import numpy as np
import oracles
import pytest
import safetensors.numpy
from commands import assert_refused, qpenet
from conftest import _write_voc
from fuzzing import Rng, chance, damaged, one_of
from predictors import run_predict
from test_annotations import DOG, SQUARE, labelme, shape
from test_annotations import coco as coco_file
from untrained import STEP, untrained_run

from qpenet_jax.backbones import torch_files
from qpenet_jax.backbones.convert import convert, load_weights, to_flax, wheel_file
from qpenet_jax.config import default_config, flat
from qpenet_jax.core.errors import InputError, InputWarning
from qpenet_jax.data.episode_lists import export_episodes, read_episodes
from qpenet_jax.data.episodes import EpisodeSampler
from qpenet_jax.data.prepare.image_folder import read_classes
from qpenet_jax.data.prepare.instances import Instances
from qpenet_jax.data.sources.prepared import Prepared
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.masks.annotations import parse_support, read_support
from qpenet_jax.masks.tasks import compete
from qpenet_jax.runs.build import complete
from qpenet_jax.runs.config_files import load_config, override
from qpenet_jax.runs.folder import open_run, read_config

GOLDENS = Path(__file__).parent / "goldens"
LITE0 = "efficientnet_lite0"


# --- the kinds: each makes one input, tries it, and checks what comes out -------------


def images(rng: Rng, folder: Path) -> None:
    """`predict` with a stand-in for the network, which notes what reaches it."""
    data, ending = fuzzing.image_file(rng)
    photo, mask = folder / f"a{ending}", folder / "mask.png"
    photo.write_bytes(data)
    mask.write_bytes(fuzzing.mask_file(rng, oracles.size(data)))
    query = folder / "q.png"
    fuzzing.Image.new("RGB", (5, 4), (200, 0, 9)).save(query)
    if chance(rng, 0.5):  # as a query, and the support is as it should be
        query, photo = photo, query
        fuzzing.Image.new("L", (5, 4), 255).save(mask)
    stand_in, out = RedFinder(), folder / "out"
    words = ["--support", f"{photo}:{mask}", "--query", query, "--out", out]
    try:
        with contextlib.redirect_stdout(None):
            run_predict(stand_in, *words)
    except InputError:
        assert not out.is_dir() or not any(out.iterdir())
        raise
    ((supports, masks),) = stand_in.examples.values()
    same(supports[0], oracles.image(photo.read_bytes()))
    same(masks[0], oracles.mask(mask.read_bytes()))
    expected = 255 * (oracles.image(query.read_bytes())[..., 0] > 127)
    same(oracles.image((out / f"{query.stem}.png").read_bytes())[..., 0], expected)


class RedFinder:
    """Finds what is red, as a network would, and notes the examples."""

    def learn_classes(self, examples):
        self.examples = examples
        return self

    def find(self, image, tiles=None, *, refine=False, probabilities=False):
        return compete([image[..., 0] - np.float32(127.5)], probabilities=probabilities)


def folders(rng: Rng, folder: Path) -> None:
    """`prepare folder`, then what the data set holds."""
    root = folder / "mine"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    data, ending = fuzzing.image_file(rng)
    label = fuzzing.mask_file(rng, oracles.size(data))
    (root / "images" / f"a{ending}").write_bytes(data)
    (root / "masks/a.png").write_bytes(label)
    fuzzing.Image.new("RGB", (5, 4)).save(root / "images/b.png")
    fuzzing.Image.new("L", (5, 4), 1).save(root / "masks/b.png")
    (root / "classes.txt").write_text("ant\nbee\n")
    (root / "train.txt").write_text("a\n")
    made = folder / "out/folder/mine/1.0.0"
    done = qpenet("prepare", "folder", root, "--out", folder / "out")
    if done.returncode:
        assert_refused(done)
        assert not made.is_dir() or not any(made.iterdir())
        raise InputError(done.stderr.splitlines()[-1])
    train = Prepared(made, "train")
    same(train.image(0), oracles.image(data))
    same(train.label(0), oracles.label(label))
    assert list(train.counts[0]) == [(oracles.label(label) == c).sum() for c in (1, 2)]


def weights(rng: Rng, folder: Path) -> None:
    """`read_tensors`, `load_weights` and `qpenet convert`."""
    witness = folder / "witness"
    data, ending = _weight_file(rng, str(witness))
    path, out = folder / f"w{ending}", folder / "out"
    path.write_bytes(data)
    converted = loaded = None
    with contextlib.suppress(InputError):
        converted = convert(LITE0, path, out_dir=out)
    assert converted or not out.exists() or not any(out.iterdir())
    with contextlib.suppress(InputError):
        loaded = load_weights(LITE0, path)
    assert not witness.exists(), "code of the file was executed"
    tensors = torch_files.read_tensors(path)
    expected = oracles.tensors(path)
    assert tensors.keys() == expected.keys()
    for name, array in tensors.items():
        same(array, expected[name])
    if converted:
        same_tree(load_weights(LITE0, converted), loaded)
    if loaded and not ending.startswith("_converted"):
        same_tree(loaded, to_flax(LITE0, expected))


def _weight_file(rng: Rng, witness: str) -> tuple[bytes, str]:
    kind = one_of(rng, ("zip", "zip", "legacy", "legacy", "safe", "converted", "wheel"))
    data, ending = _base_weights(kind)
    if chance(rng, 0.05):
        ending = one_of(rng, (".pth", ".safetensors", ".pt", ""))
    if kind == "zip":
        members = dict(oracles.members(data))
        evil = chance(rng, 0.5)
        if evil:
            name = "archive/data.pkl"
            members[name] = fuzzing.attack(rng, members[name], witness)
        data = fuzzing.zipped(rng, members, not evil)
    elif kind == "legacy" and chance(rng, 0.5):
        *programs, rest = oracles.pickles(data)
        place = int(rng.integers(len(programs)))
        programs[place] = fuzzing.attack(rng, programs[place], witness)
        return b"".join((*programs, rest)), ending
    elif kind in ("safe", "converted") and chance(rng, 0.6):
        length = int.from_bytes(data[:8], "little")
        header = fuzzing.json_file(rng, json.loads(data[8 : 8 + length]))
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        return data, ending
    return damaged(rng, data) if chance(rng, 0.8) else data, ending


@functools.cache
def _base_weights(kind: str) -> tuple[bytes, str]:
    """Returns a file that is as it should be, and its ending."""
    if kind in ("zip", "legacy", "wheel"):
        path = wheel_file() if kind == "wheel" else GOLDENS / f"tiny_{kind}.pth"
        return path.read_bytes(), ".pth"
    if kind == "safe":
        found = torch_files.read_tensors(wheel_file())
        data = safetensors.numpy.save({n: t.astype("f4") for n, t in found.items()})
        return data, ".safetensors"
    with tempfile.TemporaryDirectory() as folder:
        path = convert(LITE0, wheel_file(), out_dir=folder)
        return path.read_bytes(), ".safetensors"


def runs(rng: Rng, folder: Path) -> None:
    """The folder of a run: its checkpoint, its config, its hashes."""
    run = Path(shutil.copytree(_base_run(), folder / "run"))
    name = one_of(rng, ("config.json", "inputs.json", "checkpoints", "checkpoints"))
    if name == "checkpoints":
        files = sorted(p for p in (run / name).rglob("*") if p.is_file())
        path = one_of(rng, files)
        data = path.read_bytes()
        match int(rng.integers(6)):
            case 0:
                path.unlink()
            case 1:
                path.write_bytes(one_of(rng, files).read_bytes())
            case 2:
                shutil.rmtree(path.parent)
            case _ if data.startswith(b"{") and chance(rng, 0.7):
                path.write_bytes(fuzzing.json_file(rng, json.loads(data)))
            case _:
                path.write_bytes(damaged(rng, data))
    else:
        content = json.loads((run / name).read_text())
        (run / name).write_bytes(fuzzing.json_file(rng, content))
    opened = open_run(run)
    same_tree(opened.params, open_run(_base_run()).params)
    same_tree(opened.weights, load_weights(LITE0))
    assert opened.step == STEP
    assert isinstance(opened.shared, dict)
    if name == "config.json":
        same_fields(opened.config, run / name)


@functools.cache
def _base_run() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return untrained_run(folder / "run")


def coco(rng: Rng, folder: Path) -> None:
    """COCO's annotations: who is shown, and the label maps."""
    from test_prepare_coco import CONTENT

    path = folder / "instances_val2014.json"
    path.write_bytes(fuzzing.json_file(rng, CONTENT))
    instances = Instances(path)
    labels = {name: instances.label(name) for name in instances.files}
    expected = oracles.coco_labels(path)
    assert labels.keys() == expected.keys()
    for name, label in labels.items():
        same(label, expected[name])


def configs(rng: Rng, folder: Path) -> None:
    """Fields of a config: on the command line, in a file, in a run's config.json."""
    fields = flat(default_config().to_dict())
    name = one_of(rng, fields)
    alike = [v for v in fields.values() if type(v) is type(fields[name])]
    value = one_of(rng, alike if chance(rng, 0.4) else fuzzing.ODD)
    way = int(rng.integers(3))
    if way == 0:
        text = str(value) if chance(rng, 0.7) else one_of(rng, ("1,2", "(1,)", "x=y"))
        config = override(default_config(), [f"--config.{name}={text}"])
    elif way == 1:
        path = folder / "mine.py"
        lines = ["from qpenet_jax.config import default_config", "def get_config():"]
        lines += ["    config = default_config()", f"    config.{name} = {value!r}"]
        text = "\n".join([*lines, "    return config"]).replace("inf", "1e999")
        text = text.replace("nan", "(1e999-1e999)").encode(errors="surrogatepass")
        path.write_bytes(damaged(rng, text) if chance(rng, 0.3) else text)
        config = load_config(path)
    else:
        before = json.loads(default_config().to_json())
        (folder / "config.json").write_bytes(fuzzing.json_file(rng, before))
        config = read_config(folder)
        same_fields(config, folder / "config.json")
    used = flat(complete(config).to_dict())
    for field, default in fields.items():
        if default is not None and not isinstance(default, tuple):
            wanted = (int, float) if type(default) is float else type(default)
            assert isinstance(used[field], wanted), f"{field}={used[field]!r}"
            assert type(default) is bool or type(used[field]) is not bool, field


def lists(rng: Rng, folder: Path) -> None:
    """Lists of ids, of episodes and of classes."""
    root = _write_voc(folder / "voc", images=6, classes=2)
    data = VOCLayout(root, root / "ids.txt", ("one", "two"))
    path, kind = folder / "list", one_of(rng, ("ids", "episodes", "classes"))
    if kind == "ids":
        path.write_bytes(damaged(rng, (root / "ids.txt").read_bytes()))
        names = VOCLayout(root, path, ("one", "two")).names
        assert list(names) == [x for x in oracles.lines(path) if x]
    elif kind == "classes":
        text = one_of(rng, ("ant\nbee\ncat\n", "_background_\nant\n", "1 ant\nbee\n"))
        path.write_bytes(damaged(rng, text.encode()))
        classes, lines = read_classes(path), oracles.lines(path)
        assert list(classes) == lines[lines[0] == "_background_" :]
    else:
        export_episodes(path, data, [EpisodeSampler(data.counts, (1, 2), 1, 0)], 4)
        content = path.read_bytes()
        head, _, rest = content.partition(b"\n")
        path.write_bytes(damaged(rng, content if chance(rng, 0.2) else rest))
        (sampler,) = read_episodes(path, data).samplers
        text = path.read_bytes().decode("utf-8-sig").removeprefix(f"{head.decode()}\n")
        rows = list(csv.DictReader(io.StringIO(text)))
        for row, given in zip(sampler.rows, rows, strict=True):
            assert [row.index, row.class_id] == [
                int(given[name]) for name in ("index", "class_id")
            ]
            shown = [data.names[i] for i in (row.query, *row.supports)]
            assert shown == [given["query"], given["support_1"]]


MARKS = {
    "labelme": labelme(
        shape("dog", SQUARE, group_id=None),
        shape("dog", [[20, 4], [30, 15]], "rectangle"),
        shape("dog", [[9, 20], [9, 25]], "circle"),
        shape("cat", [[1, 1]], "point", mask=None),
    ),
    "coco": coco_file(
        DOG | {"iscrowd": 0},
        DOG | {"segmentation": {"size": [40, 50], "counts": [100, 50, 1850]}},
    ),
}


def marks(rng: Rng, folder: Path) -> None:
    """Marks of a support: files of labelme and COCO, polygons and boxes."""
    fuzzing.Image.new("RGB", (50, 40)).save(folder / "a.png")
    kind = one_of(rng, ("labelme", "coco", "polygon=", "box="))
    given = folder / "a.json"
    if kind in MARKS:
        given.write_bytes(fuzzing.json_file(rng, MARKS[kind]))
    else:
        count = 4 if chance(rng, 0.7) else int(rng.integers(9))
        numbers: list[object] = [int(n) for n in rng.integers(0, 25, count)]
        if chance(rng, 0.4) and count:
            numbers[int(rng.integers(count))] = one_of(rng, fuzzing.ODD)
        given = kind + ",".join(map(str, numbers))
    name = one_of(rng, ("dog=", "dog=", "", "cow="))
    marked = read_support(parse_support(f"{name}{folder / 'a.png'}:{given}"))
    assert set(np.unique(marked.mask)) <= {0, 1}
    assert marked.mask.any()
    same(marked.pixels.shape, (40, 50, 3))
    if kind in MARKS:
        read = {"labelme": oracles.labelme_mask, "coco": oracles.coco_mask}[kind]
        same(marked.mask, read(folder / "a.json", marked.label))


KINDS = {
    "images": (images, 8, 30),
    "folders": (folders, 4, 12),
    "weights": (weights, 8, 25),
    "runs": (runs, 0, 8),
    "coco": (coco, 10, 40),
    "configs": (configs, 10, 40),
    "lists": (lists, 10, 30),
    "marks": (marks, 15, 60),
}
"""What tries a kind; how many in this process, and how many under the mark slow, in a
process of their own: reads of Orbax that failed may end there when they like."""


# --- how an input is tried ------------------------------------------------------------


def same(ours, expected) -> None:
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    np.testing.assert_array_equal(ours, expected)


def same_tree(ours, expected) -> None:
    ours, expected = flat(ours), flat(expected)
    assert ours.keys() == expected.keys()
    for name in ours:
        same(ours[name], expected[name])


def same_fields(config, path: Path) -> None:
    """Checks that a config holds what its file says; null may stand for a recipe's."""
    ours, defaults = flat(config.to_dict()), flat(default_config().to_dict())
    for field, given in oracles.flat(json.loads(path.read_text("utf-8"))).items():
        given = tuple(given) if isinstance(given, list) else given
        if field != "version" and not (given is defaults[field] is None):
            assert ours[field] == given, field


LONGEST = 700
"""Characters of a message, beyond which it hides what it says."""


def outcome(kind: str, seed: int) -> str:
    """Tries one input; returns "right", "refused: why", or "FAULT: what"."""
    rng = np.random.default_rng([list(KINDS).index(kind), seed])
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(record=True) as shown,
    ):
        warnings.simplefilter("always")
        try:
            KINDS[kind][0](rng, Path(folder))
            result = "right"
        except (InputError, OSError) as error:
            result = f"refused: {error}"
            if isinstance(error, OSError):  # the command line makes a line of it
                result = f"refused: {error.filename}: {error.strerror}"
            nameless = isinstance(error, OSError) and not error.filename
            if nameless or "\n" in result or len(result) > LONGEST:
                result = f"FAULT: {traceback.format_exc()}"
        except BaseException:
            result = f"FAULT: {traceback.format_exc()}"
    for warning in shown:
        if "was never awaited" in str(warning.message):
            continue  # Orbax's, of other reads of a checkpoint that failed
        pillows = "PIL" in Path(warning.filename).parts  # is shown in one line
        if not pillows and warning.category not in (InputWarning, DeprecationWarning):
            return f"FAULT: warning {warning.category.__name__}: {warning.message}"
    return result


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][1]])
def test_every_input_is_right_or_refused(kind):
    if kind == "weights":
        pytest.importorskip("torch", reason="PyTorch reads the .pth file as well")
    outcomes = [outcome(kind, seed) for seed in range(KINDS[kind][1])]
    assert [o for o in outcomes if o.startswith("FAULT")] == []
    assert {o.split(":")[0] for o in outcomes} == {"right", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_inputs_are_right_or_refused(kind):
    many = KINDS[kind][2]
    words = [sys.executable, __file__, str(many), kind]
    child = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(child.stdout.rpartition(kind)[2])
    assert "FAULT" not in found, child.stdout
    assert found.keys() == {"right", "refused"}
    assert sum(found.values()) == many


if __name__ == "__main__":
    for chosen in sys.argv[2:] or KINDS:
        found = collections.Counter()
        for number in range(int(sys.argv[1])):
            result = outcome(chosen, number)
            found[result.split(":")[0]] += 1
            if result.startswith("FAULT"):
                print(f"--- {chosen} {number}\n{result!a}", flush=True)
        print(chosen, json.dumps(found), flush=True)
