"""The real loop on the real config, shrunk: train, kill, resume, evaluate, predict.

A process of its own has only what is about processes; all else calls `main` here.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qpenet_jax import load
from qpenet_jax.cli.main import main
from qpenet_jax.config import selections
from qpenet_jax.core.files import locked
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.runs import progress
from qpenet_jax.runs.datasets import (
    build_dataset,
    build_eval_samplers,
    build_fold,
    selection_protocols,
)
from qpenet_jax.runs.folder import open_run
from qpenet_jax.training.health import PATIENCE, Watch
from qpenet_jax.training.train import LOCK_FILE

pytestmark = [
    pytest.mark.standard_promotion,
]

ROOT = Path(__file__).resolve().parents[1]
SHRUNK = {
    "side": 65,
    "steps": 4,
    "batch_size": 2,
    "workers": 1,
    "log_every": 1,
    "save_every": 1,
    "model.channels": 16,
    "dataset.side": 65,
    "dataset.train_images": 60,
    "dataset.val_images": 40,
    "dataset.min_pixels": 64,
    "dataset.on_few": "drop",
    "eval.every": 4,
    "eval.episodes": 6,
}


def words(workdir, config="quickstart", **changes):
    fields = SHRUNK | {name.replace("__", "."): v for name, v in changes.items()}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config", f"configs/{config}.py", "--workdir", str(workdir), *overrides]


def command(workdir, **changes):
    return [sys.executable, "train.py", *words(workdir, **changes)]


def size_of(path):
    with Image.open(path) as image:
        return image.size


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def qpenet(*arguments):
    """Run a command in this process; return what it printed and its exit code."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(
        arguments, code, out.getvalue(), errors.getvalue()
    )


def train(workdir, **changes):
    """Train in this process, which loads the images itself."""
    return qpenet("train", *words(workdir, **{"workers": 0} | changes))


def train_alone(workdir, **changes):
    """Train in a process of its own, which another one loads images for."""
    return subprocess.run(
        command(workdir, **changes), cwd=ROOT, capture_output=True, text=True
    )


def assert_refused(result, *words):
    assert result.returncode == 2, result.stderr
    # Python's resource tracker may add a warning about Grain's shared memory after it.
    told = [s for s in result.stderr.splitlines() if s.startswith("error: ")]
    assert len(told) == 1, result.stderr
    line = told[0]
    for word in words:
        assert word in line
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and what it printed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    result = train_alone(workdir)
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_a_run_leaves_results_figure_events_and_checkpoints(finished):
    workdir, result = finished
    results = json.loads((workdir / "results.json").read_text())
    for key in ("miou", "fb_iou", "per_class", "episodes", "seeds", "protocol"):
        assert key in results
    assert results["step"] == 4
    assert set(results["references"]) == {"untrained", "cosine"}
    assert list(results["per_class"]) == ["disc", "frame", "star", "arrow", "crescent"]
    assert "mIoU" in result.stdout
    assert "FB-IoU" in result.stdout
    assert "cosine" in result.stdout
    assert "step/s" in result.stderr or "s/step" in result.stderr

    assert size_of(workdir / "episodes.png")[0] > 500
    events = EventAccumulator(str(workdir))
    events.Reload()
    shown = (
        "rms_F_q",
        "rms_F_s",
        "norm_P_global",
        "learning_rate",
        "images_per_second",
        "step_seconds",
        "waiting_for_data",
    )
    shown += tuple(f"empty_{head}" for head in ("pre", "rev", "bg", "aux", "final"))
    told = {"train/loss", "eval/miou", *(f"train/{name}" for name in shown)}
    assert told <= set(events.Tags()["scalars"])
    rates = [e.value for e in events.Scalars("train/learning_rate")]
    expected = [5e-4 * (1 - t / 4) ** 0.9 for t in range(4)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert events.Tags()["images"] == ["episodes"]
    saved = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    assert "4" in saved


@pytest.mark.parametrize("lost", [["results.json"], ["results.json", "episodes.png"]])
def test_a_run_killed_while_writing_results_writes_them_again(finished, tmp_path, lost):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    for name in lost:
        (copy / name).unlink()
    (copy / "results.md").write_text("of an older evaluation")
    result = train(copy)
    assert result.returncode == 0, result.stderr
    names = [f"results.{kind}" for kind in ("md", "csv", "json")]
    for name in (*names, "episodes.png", "episodes_qpenet.csv"):
        assert (copy / name).read_bytes() == (finished[0] / name).read_bytes()


def test_a_run_goes_on_only_with_the_data_that_it_started_with(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    inputs = json.loads((copy / "inputs.json").read_text())
    hashes = {"training images", "validation images", "backbone weights"}
    assert set(inputs) == {"dtype", *hashes}
    changed = inputs | {"training images": "000000000000"}
    (copy / "inputs.json").write_text(json.dumps(changed))
    assert_refused(train(copy), "training images", "choose another --workdir")


def test_a_finished_run_is_not_trained_again(finished):
    workdir, _ = finished
    before = (workdir / "results.json").read_bytes()
    result = train(workdir)
    assert result.returncode == 0, result.stderr
    assert "mIoU" in result.stdout
    assert (workdir / "results.json").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_to_the_same_parameters(finished, tmp_path, number):
    whole, _ = finished
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(workdir), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 200
    while not any((workdir / "checkpoints").glob("[12]")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    if number == signal.SIGTERM:
        assert process.returncode == 130, errors
        assert b"is saved: the same command goes on" in errors
    else:
        assert process.returncode == -signal.SIGKILL

    result = train(workdir)  # no result depends on the number of workers
    assert result.returncode == 0, result.stderr
    ours, theirs = open_run(workdir).params, open_run(whole).params
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for name in ("episodes_qpenet.csv", "episodes_cosine.csv", "results.json"):
        assert (workdir / name).read_text() == (whole / name).read_text()


def test_a_nan_stops_training_and_keeps_the_last_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    result = train(
        workdir, optimizer__name="sgd", optimizer__lr=1e30, eval__references=False
    )
    assert_refused(result, "step", "last good checkpoint", "lower config.optimizer.lr")
    assert not (workdir / "results.json").exists()
    params = open_run(workdir).params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_dead_heads_are_told_once_with_the_remedy(tmp_path, monkeypatch):
    """Without a learning rate no head gets better than chance."""
    assert Watch().patience == PATIENCE == 200
    monkeypatch.setattr(progress.health, "Watch", functools.partial(Watch, 20))
    changes = {"optimizer__lr": 1e-12, "eval__references": False, "log_every": 7}
    result = train(tmp_path / "run", steps=28, save_every=28, **changes)
    assert result.returncode == 0, result.stderr
    told = [s for s in result.stderr.splitlines() if "warning: y_" in s]
    assert told
    assert all("for 20 steps" in s and "recipe=stable" in s for s in told)
    heads = [s.split("warning: ")[1].split()[0] for s in told]
    assert len(set(heads)) == len(heads)


def test_a_truncated_image_stops_training_with_its_name(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClassAug"):
        (tmp_path / folder).mkdir()
    names = [f"{i}_{c}" for c in range(1, 21) for i in range(3)]
    for name in names:
        pixels = rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        label = np.full((70, 80), int(name.split("_")[1]), np.uint8)
        Image.fromarray(label).save(tmp_path / "SegmentationClassAug" / f"{name}.png")
    for image in (tmp_path / "JPEGImages").glob("*.jpg"):  # headers stay whole
        image.write_bytes(image.read_bytes()[:-3000])
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(names))
    lists = {f"dataset__{split}_ids": ids for split in ("train", "val")}
    fields = {"dataset__kind": "voc", "dataset__root": tmp_path} | lists
    result = train_alone(tmp_path / "run", **fields, eval__references=False)
    assert_refused(result, ".jpg", "truncated")


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").touch()
    assert_refused(train(tmp_path / "run"), str(tmp_path / "run"))


def test_a_folder_that_nobody_can_write_to_is_refused():
    """Not even the superuser, who runs the tests in containers."""
    if not Path("/proc").is_dir():
        pytest.skip("no such folder here: /proc is Linux's")
    assert_refused(train(Path("/proc/run")), "/proc/run")


def test_a_corrupt_checkpoint_is_named(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    for file in (copy / "checkpoints" / "4").rglob("*"):
        if file.is_file() and file.stat().st_size > 5000:
            file.write_bytes(b"garbage")
    result = qpenet("evaluate", "--workdir", copy, "--episodes", 1)
    assert_refused(result, f"{copy}/checkpoints/4", "delete that folder")


def test_the_config_of_another_run_is_refused(finished):
    assert_refused(train(finished[0], optimizer__lr=1), str(finished[0]), "lr")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nope": 1}, ["nope", "qpenet_jax/config.py"]),
        ({"side": 64}, ["side=64", "8 n + 1"]),
        ({"optimizer__name": "adam"}, ["adam", "sgd"]),
        ({"recipe": "best"}, ["recipe='best'", "stable", "released", "paper"]),
        ({"optimizer__clip": -1.0}, ["optimizer.clip=-1.0", "0 or more"]),
        ({"dataset__targets": "small"}, ["dataset.targets='small'", "large", "any"]),
        ({"dataset__order": "random"}, ["dataset.order='random'", "shuffled", "list"]),
        ({"backbone__stages": "('block5',)"}, ["block5", "block4, block10, block14"]),
        ({"dataset__kind": "voc", "dataset__root": "nowhere"}, ["nowhere"]),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(tmp_path, change, words):
    workdir = tmp_path / "run"
    assert_refused(train(workdir, **change), *words)
    assert not workdir.exists()


def test_a_missing_config_is_refused(tmp_path):
    assert_refused(train(tmp_path / "run", config="nope"), "configs/nope.py")


@pytest.mark.parametrize("script", [["train.py"], ["-m", "qpenet_jax.cli", "train"]])
def test_a_config_may_lie_outside_of_the_checkout(tmp_path, script):
    """Both commands read it, and tell what is wrong with it, alike."""
    config = tmp_path / "my.py"
    config.write_text("from configs import common\n\nget_config = common.get_config\n")

    def told(*words):
        files = ["--config", str(config), "--workdir", str(tmp_path / "run")]
        run = [sys.executable, *script, *files, *words]
        return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)

    assert_refused(told("--config.side=64"), "side=64", "8 n + 1")
    assert_refused(told("--config.sid=64"), "no such config field: sid", "side")
    config.write_text("import math\n\nmath.nothing\n")
    assert_refused(told(), f"{config}, line 3: AttributeError", "nothing")
    config.unlink()
    assert_refused(told(), str(config), "no such config file")
    assert {path.name for path in tmp_path.iterdir()} <= {"__pycache__"}  # of my.py


def test_a_checkpoint_is_selected_on_base_classes(tmp_path):
    """The best of three, by the validation images that show no novel class."""
    workdir = tmp_path / "run"
    result = train(
        workdir,
        select_on="base",
        eval__every=1,
        eval__base_episodes=8,
        eval__references=False,
        steps=3,
    )
    assert result.returncode == 0, result.stderr
    events = EventAccumulator(str(workdir))
    events.Reload()
    scored = {e.step: e.value for e in events.Scalars("eval/base_miou")}
    assert set(scored) == {1, 2, 3}
    results = json.loads((workdir / "results.json").read_text())
    assert scored[results["step"]] == max(scored.values())
    assert open_run(workdir).step == results["step"]
    assert "base classes" in results["selection"]
    assert "leaks" not in results["selection"]
    # The same number by hand, of the checkpoint that is the last and always kept.
    config = open_run(workdir).config
    val = build_dataset(config, "val")
    protocol = selection_protocols(config, selections(config))["base"]
    sampler = build_eval_samplers(config, val, protocol)[0]
    novel = np.subtract(build_fold(config).novel, 1)
    assert set(sampler.classes) == set(build_fold(config).base)
    assert not val.counts[sampler.images][:, novel].any()


def test_selection_on_novel_classes_is_flagged_as_leaking(tmp_path):
    workdir = tmp_path / "run"
    result = train(
        workdir, select_on="novel", eval__every=1, eval__references=False, steps=2
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((workdir / "results.json").read_text())
    assert "leaks" in results["selection"]
    assert "leaks" in result.stdout
    assert "leaks" in (workdir / "results.md").read_text()
    events = EventAccumulator(str(workdir))
    events.Reload()
    scored = [e.value for e in events.Scalars("eval/novel_miou")]
    np.testing.assert_allclose(results["miou"], max(scored), atol=0.006)


def test_evaluate_scores_shots_and_seeds(finished, tmp_path):
    workdir, _ = finished
    arguments = ("evaluate", "--workdir", workdir, "--out", tmp_path, "--episodes", 3)
    with locked(workdir / LOCK_FILE, "free before"):  # as if it was being trained
        result = qpenet(*arguments, "--shots", "1,2", "--seeds", "0,1", "--references")
    assert result.returncode == 0, result.stderr
    for shots in (1, 2):
        (folder,) = tmp_path.glob(f"ours_episodes=3_*_{shots}shot")
        results = json.loads((folder / "results.json").read_text())
        assert results["protocol"]["shots"] == shots
        assert results["seeds"] == [0, 1]
        assert set(results["per_seed"]) == {"0", "1"}
        assert results["step"] == 4
        rows = (folder / "episodes_qpenet.csv").read_text()
        assert len(rows.splitlines()) == 1 + 2 * 3
    assert "2-shot" in result.stdout
    assert "ours, but episodes=3 seeds=0,1 min_pixels=64 side=65" in result.stdout


def test_a_published_protocol_with_one_field_changed(finished, tmp_path):
    workdir, _ = finished
    out = ("--episodes", 2, "--out", tmp_path)
    result = qpenet("evaluate", "--workdir", workdir, "--protocol", "hsnet", *out)
    assert result.returncode == 0, result.stderr
    assert "hsnet, but exclude_novel=True episodes=2 min_pixels=64" in result.stdout
    assert "pairs queries" in result.stdout
    assert "input 401 (squash)" in result.stdout


def test_frozen_episodes_are_scored_exactly_and_compared(finished, tmp_path):
    workdir, _ = finished
    listed = tmp_path / "lists" / "episodes.csv"
    export = ("episodes", "export", "--workdir", workdir, "--out", listed)
    result = qpenet(*export, "--episodes", 5, "--seeds", "3,4")
    assert result.returncode == 0, result.stderr
    assert "sha256" in result.stdout
    evaluate = ("evaluate", "--workdir", workdir)
    common = (*evaluate, "--episode-list", listed)
    drawn = ("--episodes", 5, "--seeds", "3,4")
    for run in (
        (*common, "--out", tmp_path / "a"),
        (*evaluate, *drawn, "--out", tmp_path),
    ):
        result = qpenet(*run)
        assert result.returncode == 0, result.stderr
    (a,), (b,) = (tmp_path / "a").iterdir(), tmp_path.glob("ours_*_1shot")
    ours, theirs = ((x / "episodes_qpenet.csv").read_text() for x in (a, b))
    assert ours == theirs

    refused = qpenet("compare", a / "results.json", b / "results.json")
    assert_refused(refused, "episode_list")
    assert_refused(qpenet(*evaluate, "--side", 100), "8 n + 1")
    forced = qpenet(
        "compare", a / "results.json", b / "results.json", "--different-protocols"
    )
    assert forced.returncode == 0, forced.stderr
    assert "10" in forced.stdout
    same = qpenet("compare", a / "results.json", a / "results.json")
    assert same.returncode == 0, same.stderr
    assert "mIoU" in same.stdout

    assert_refused(qpenet(*common, "--episodes", 3), "--episodes", "--episode-list")
    typo = qpenet(*export, "--protcol", "paper")
    assert typo.returncode == 2
    assert "--protcol" in typo.stderr
    base = tmp_path / "base.csv"
    swapped = ("--config.dataset.fold=1", "--config.dataset.min_pixels=64")
    small = [f"--config.{k}={SHRUNK[k]}" for k in SHRUNK if k.startswith("dataset")]
    config = ("episodes", "export", "--config", "configs/quickstart.py")
    result = qpenet(*config, *small, *swapped, "--out", base)
    assert result.returncode == 0, result.stderr
    refused = qpenet(*evaluate, "--episode-list", base, "--out", tmp_path)
    assert_refused(refused, "novel in fold 0")
    listed.write_text(listed.read_text().replace(",1,", ",2,", 1))
    assert_refused(qpenet(*common), str(listed), "changed")


def test_export_reads_a_config_with_overrides(tmp_path):
    listed = tmp_path / "episodes.csv"
    size = ("--config.dataset.val_images=60", "--config.dataset.min_pixels=100")
    small = ("--config.dataset.side=65", "--config.eval.episodes=4", *size)
    export = ("episodes", "export", "--config", "configs/quickstart.py")
    result = qpenet(*export, "--out", listed, *small)
    assert result.returncode == 0, result.stderr
    assert len(listed.read_text().splitlines()) == 1 + 1 + 4
    other = tmp_path / "other.csv"
    bad = qpenet(*export, "--out", other, "--config.nope=1")
    assert_refused(bad, "nope", "qpenet_jax/config.py")
    assert not other.exists()


def test_figures_are_drawn_of_a_run(finished, tmp_path):
    workdir, _ = finished
    command = ("figures", "--workdir", workdir, "--episodes", "1,4", "--out", tmp_path)
    result = qpenet(*command)
    assert result.returncode == 0, result.stderr
    for name in ("predictions", "evolution", "background"):
        assert str(tmp_path / f"{name}.jpg") in result.stdout
        width, height = size_of(tmp_path / f"{name}.jpg")
        assert width > 500
        assert height > 300
    assert_refused(qpenet(*command[:3], "--episodes", 99, *command[5:]), "99")


def test_predict_writes_masks_of_the_querys_size(finished, tmp_path):
    workdir, _ = finished
    shapes = Shapes("val", 3, 120)
    for i in range(3):
        Image.fromarray(shapes.image(i)).resize((90 + i, 70)).save(
            tmp_path / f"{i}.png"
        )
    label = Image.fromarray((shapes.label(0) > 0).astype(np.uint8) * 255)
    label.resize((90, 70), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    queries = tmp_path / "queries"
    queries.mkdir()
    (tmp_path / "1.png").rename(queries / "1.png")
    (tmp_path / "2.png").rename(queries / "2.png")
    support = f"{tmp_path / '0.png'}:{tmp_path / 'mask.png'}"
    arguments = ("predict", "--workdir", workdir, "--support", support)
    out = tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    result = qpenet(*arguments, "--query", queries, "--out", out)
    assert result.returncode == 0, result.stderr
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert after == before, "a run may lie in a folder that can only be read"
    for i in (1, 2):
        mask = pixels_of(out / f"{i}.png")
        assert mask.shape == (70, 90 + i)
        assert set(np.unique(mask)) <= {0, 255}
        assert size_of(out / f"{i}_overlay.jpg") == (90 + i, 70)

    segment = load(workdir)
    pixels, mask = (pixels_of(tmp_path / name) for name in ("0.png", "mask.png"))
    found = segment(pixels_of(queries / "1.png"), pixels, mask // 255)
    np.testing.assert_array_equal(255 * found, pixels_of(out / "1.png"))


PEAK = """
import resource, sys
from qpenet_jax.cli.main import main
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
common, small, large = sys.argv[1:-2], *sys.argv[-2:]
main([*common, "--query", small])
before = peak()
main([*common, "--query", large])
print(peak() - before)
"""


def test_a_pixel_and_a_photograph_are_segmented_in_bounded_memory(finished, tmp_path):
    workdir, _ = finished
    shapes = Shapes("val", 1, 120)
    image, mask, dot, large = (
        tmp_path / n for n in ("i.png", "m.png", "d.png", "l.jpg")
    )
    Image.fromarray(shapes.image(0)).save(image)
    Image.fromarray((shapes.label(0) > 0).astype(np.uint8)).save(mask)
    Image.fromarray(shapes.image(0)[:1, :1]).save(dot)
    Image.fromarray(shapes.image(0)).resize((8000, 6000)).save(large)
    arguments = ["predict", "--workdir", workdir, "--support", f"{image}:{mask}"]
    arguments += ["--out", tmp_path / "out", dot, large]
    result = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 2 * 2**30
    assert size_of(tmp_path / "out" / "d.png") == (1, 1)
    assert size_of(tmp_path / "out" / "l.png") == (8000, 6000)


def test_training_on_real_pixels(tmp_path):
    data = ROOT.parent / "shared" / "data" / "voc"
    if not data.is_dir():
        pytest.skip(f"the real VOC subset is not at {data}")
    few = data / "lists" / "subset_val.txt"
    lists = {f"dataset__{s}_ids": few for s in ("train", "val")}
    result = train(
        tmp_path / "run",
        config="voc_subset_fold2",
        **lists,
        dataset__root=data / "VOCdevkit" / "VOC2012",
        dataset__min_pixels=2048,
        eval__references=True,
    )
    assert result.returncode == 0, result.stderr
    assert "mean of dog, horse, person" in result.stdout


def test_the_environment_needs_no_torch():
    code = "import sys, qpenet_jax, qpenet_jax.cli; print('torch' in sys.modules)"
    run = [sys.executable, "-c", code]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    out = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert out.stdout.strip() == "False", out.stderr
