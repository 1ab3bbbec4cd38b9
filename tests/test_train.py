"""The loop on a tiny network: train, stop, resume, select, refuse.

Processes that are killed are in test_cluster.py.
"""

import io
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import (
    SHRUNK,
    assert_refused,
    overrides,
    passed,
    qpenet,
    tiny,
    tiny_config,
)
from conftest import scalars, stopped_after
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qpenet_jax.config import SELECTION
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import locked
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.runs.datasets import (
    build_dataset,
    build_eval_samplers,
    build_fold,
    selection_protocols,
)
from qpenet_jax.runs.folder import open_run, trained_and_scored
from qpenet_jax.training.events import Profile, speeds
from qpenet_jax.training.interruptions import (
    Retry,
    StopSignal,
    batches_left_out,
    divergence,
    not_finite,
)
from qpenet_jax.training.train import LOCK_FILE, train

pytestmark = pytest.mark.standard_promotion

SMALL = {"eval__references": False, "eval__episodes": 2, "eval__base_episodes": 2}
"""As little evaluation as there can be."""


def config(**fields):
    return tiny_config(**SMALL | fields)


def stop_once(reached):
    """Send SIGTERM to this process, from a thread, once something is reached."""

    def wait():
        deadline = time.monotonic() + 200
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def read(path):
    return json.loads(path.read_text())


def assert_same_params(ours, theirs):
    ours, theirs = open_run(ours), open_run(theirs)
    assert ours.step == theirs.step
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to be changed."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_a_run_leaves_results_figure_events_and_checkpoints(finished):
    workdir, result = finished
    results = read(workdir / "results.json")
    for key in ("miou", "fb_iou", "per_class", "episodes", "seeds", "protocol"):
        assert key in results
    assert results["step"] == 4
    assert set(results["references"]) == {"untrained", "cosine"}
    assert list(results["per_class"]) == ["disc", "frame", "star", "arrow", "crescent"]
    for word in ("mIoU", "FB-IoU", "cosine", "before training"):
        assert word in result.stdout
    assert "step/s" in result.stderr or "s/step" in result.stderr

    events = EventAccumulator(str(workdir))
    events.Reload()
    shown = "rms_F_q rms_F_s norm_P_global learning_rate images_per_second step_seconds"
    shown = [*shown.split(), "waiting_for_data", "loss"]
    shown += [f"empty_{head}" for head in ("pre", "rev", "bg", "aux", "final")]
    expected = {"eval/miou", "eval/fb_iou", *(f"train/{name}" for name in shown)}
    assert expected <= set(events.Tags()["scalars"])
    rates = [e.value for e in events.Scalars("train/learning_rate")]
    expected = [5e-4 * (1 - t / 4) ** 0.9 for t in range(4)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]
    (image,) = events.Images("episodes")
    assert image.step == 4
    assert image.width > 500
    with (
        Image.open(io.BytesIO(image.encoded_image_string)) as shown,
        Image.open(workdir / "episodes.png") as figure,
    ):
        np.testing.assert_array_equal(shown, figure)
    assert (workdir / "checkpoints/4").is_dir()


def test_a_finished_run_is_not_trained_again_and_lost_results_are_written_again(
    finished, copy
):
    """As those of a run that was killed while it wrote them."""
    assert "mIoU" in passed(*tiny(copy)).stdout
    for name in ("results.json", "episodes.png"):
        (copy / name).unlink()
    (copy / "results.md").write_text("of an older evaluation")
    passed(*tiny(copy))
    names = [f"results.{kind}" for kind in ("md", "csv", "json")]
    for name in (*names, "episodes.png", "episodes_qpenet.csv"):
        assert (copy / name).read_bytes() == (finished[0] / name).read_bytes()


def test_a_run_goes_on_only_as_it_began(finished, copy):
    inputs = read(copy / "inputs.json")
    hashes = {"training images", "validation images", "backbone weights"}
    assert set(inputs) == {"dtype", *hashes}
    changed = inputs | {"training images": "000000000000"}
    (copy / "inputs.json").write_text(json.dumps(changed))
    refused = qpenet(*tiny(copy))
    assert_refused(refused, "training images", "choose another --workdir")
    other = qpenet(*tiny(finished[0], optimizer__lr=1))
    assert_refused(other, str(finished[0]), "lr")
    with locked(copy / LOCK_FILE, "free before"):
        assert_refused(qpenet(*tiny(copy)), str(copy), "in use", "--workdir")


def traced(workdir):
    """Return the steps of every trace."""
    found = []
    for trace in workdir.glob("plugins/profile/*/*.xplane.pb"):
        data = jax.profiler.ProfileData.from_file(str(trace))
        lines = [line for plane in data.planes for line in plane.lines]
        steps = [e for line in lines for e in line.events if e.name == "train"]
        found.append(sorted(dict(step.stats)["step_num"] for step in steps))
    return sorted(found)


# ProfileData has types without a module; as an error, the warning ends the process.
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_a_stop_saves_the_step_and_the_resumed_run_is_the_same(finished, tmp_path):
    """A stop ends a trace as well; the resumed run has one of its own."""
    workdir = tmp_path / "run"
    stopped = r"step 2 is saved: the same command goes on"
    with stopped_after(1), pytest.raises(KeyboardInterrupt, match=stopped):
        train(tiny_config(), workdir, profile=3)
    assert traced(workdir) == [[2]]
    assert not (workdir / "results.json").exists()
    passed(*tiny(workdir), "--profile=2")
    assert traced(workdir) == [[2], [3, 4]]
    assert_same_params(workdir, finished[0])


def test_signals_set_a_flag_and_are_given_back(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        assert "again to stop at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


# --- Which checkpoint is the result ---


def test_one_training_is_scored_by_every_selection(tmp_path, capsys):
    """Of three steps base classes take one, novel ones may take another."""
    fields = {"select_on": "base,novel,last", "eval__every": 1, "steps": 3}
    fields |= {"eval__episodes": 8, "eval__base_episodes": 40}
    # A checkpoint is saved before it is scored, which takes long here.
    stop_once(lambda: (tmp_path / "checkpoints/1").exists())
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        train(config(**fields), tmp_path)
    assert read(tmp_path / "scores.json") == {}
    train(config(**fields), tmp_path)
    scores = read(tmp_path / "scores.json")
    assert set(scores) == {"1", "2", "3"}
    printed = capsys.readouterr().out
    for name in ("base", "novel"):
        shown = scalars(tmp_path, f"eval/{name}_miou")
        # Step 1 was scored before the resumed run began to write events.
        live = {int(s): x[name] for s, x in scores.items() if s != "1"}
        assert shown == pytest.approx(live)
        best = max(scores, key=lambda s: (scores[s][name], int(s)))
        assert open_run(tmp_path, selection=name).step == int(best)
    assert open_run(tmp_path, selection="last").step == 3
    run, results = open_run(tmp_path), read(tmp_path / "results.json")
    assert results["step"] == run.step
    assert results["selection"] == SELECTION["base"]
    assert f"Checkpoint: {SELECTION['base']}" in printed
    assert "leaks" in SELECTION["novel"]
    assert "leaks" not in SELECTION["base"]
    for name in ("base", "novel", "last"):
        step = open_run(tmp_path, selection=name).step
        assert any(
            [x.strip() for x in line.split("|")[1:3]] == [name, str(step)]
            for line in printed.splitlines()
        )
    for folder in tmp_path.glob("selected_on_*"):
        name = folder.name.removeprefix("selected_on_")
        beside = read(folder / "results.json")
        assert beside["selection"] == SELECTION[name]
        assert beside["step"] == open_run(tmp_path, selection=name).step
        if name == "novel":
            assert "leaks" in (folder / "results.md").read_text()

    # Scores that are lost are those of the checkpoints that are kept, scored again.
    (tmp_path / "scores.json").unlink()
    train(config(**fields), tmp_path)
    again = read(tmp_path / "scores.json")
    assert again.items() <= scores.items()
    assert {"2", "3"} <= set(again)

    # What base classes are scored on: no image shows a novel class.
    val = build_dataset(run.config, "val")
    protocol = selection_protocols(run.config, ("base",))["base"]
    sampler = build_eval_samplers(run.config, val, protocol)[0]
    fold = build_fold(run.config)
    assert set(sampler.classes) == set(fold.base)
    assert not val.counts[sampler.images][:, np.subtract(fold.novel, 1)].any()
    refused = "no checkpoint by 'other': choose base, novel, last"
    with pytest.raises(ValueError, match=refused):
        open_run(tmp_path, selection="other")


# --- A loss that isn't finite ---

DIVERGING = {"optimizer__name": "sgd", "optimizer__lr": 1e30, "recipe": "paper"}


def test_a_training_that_diverges_is_retried_and_keeps_its_checkpoint(tmp_path):
    """No training has a finite loss here, with other episodes neither."""
    workdir = tmp_path / "run"
    result = qpenet(*tiny(workdir, **SMALL, **DIVERGING, retries_on_nan=2))
    assert_refused(result, "step", "last good checkpoint", "lower config.optimizer.lr")
    assert not (workdir / "results.json").exists()
    params = open_run(workdir).params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    warnings = [x for x in result.stderr.splitlines() if "on with other episodes" in x]
    assert [x.split("(")[1] for x in warnings] == ["retry 1 of 2)", "retry 2 of 2)"]
    retries = read(workdir / "retries.json")["retries"]
    assert len(retries) == 2
    assert all(retry["at"] > retry["to"] for retry in retries)


def test_retries_leave_out_the_batches_that_led_to_the_bad_step(tmp_path):
    none = divergence(tmp_path, "loss is nan", 3, 2, limit=0)
    assert isinstance(none, InputError)
    assert not (tmp_path / "retries.json").exists()
    first = divergence(tmp_path, "loss is nan", 3, 2, limit=2)
    assert isinstance(first, Retry)
    assert [batches_left_out(tmp_path, step) for step in (0, 1, 2, 5)] == [0, 0, 1, 1]
    second = divergence(tmp_path, "loss is nan", 9, 4, limit=2)
    assert [batches_left_out(tmp_path, step) for step in (2, 4)] == [1, 6]
    assert "back to step 4, and on with other episodes" in str(second)
    third = divergence(tmp_path, "loss is nan", 10, 4, limit=2)
    assert isinstance(third, InputError)
    assert "nan at step 10; last good checkpoint: step 4 is kept" in str(third)
    # A training that lost its checkpoints takes the first again, not the second.
    divergence(tmp_path, "loss is nan", 3, None, limit=1)
    assert read(tmp_path / "retries.json")["retries"] == [
        {"at": 3, "found": "loss is nan", "to": 0}
    ]


def test_a_parameter_that_is_not_finite_is_found():
    """What else isn't is in test_preflight.py."""
    good = {"loss": 1.0, "grad_norm": 2.0}
    assert not_finite([good], 7, {"a": np.ones(2)}) is None
    bad = {"a": np.array([1, np.inf])}
    assert not_finite([good], 7, bad) == ("a parameter isn't finite", 7)


def test_dead_heads_are_warned_of_once_with_the_remedy(tmp_path):
    """Without a learning rate no head gets better than chance, in 200 steps."""
    fields = {"optimizer__lr": 1e-12, "log_every": 50, "save_every": 201, "steps": 201}
    fields |= {"eval__every": 201, "batch_size": 1, "side": 33, "dataset__side": 33}
    fields |= {"dataset__min_pixels": 16}
    result = passed(*tiny(tmp_path / "run", **SMALL, **fields))
    warnings = [s for s in result.stderr.splitlines() if "warning: y_" in s]
    assert warnings
    assert all("for 200 steps" in s and "recipe=stable" in s for s in warnings)
    heads = [s.split("warning: ")[1].split()[0] for s in warnings]
    assert len(set(heads)) == len(heads)


# --- What is refused ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nope": 1}, ["nope", "qpenet_jax/config.py"]),
        ({"side": 64}, ["side=64", "8 n + 1"]),
        ({"optimizer__name": "adam"}, ["adam", "sgd"]),
        ({"recipe": "best"}, ["recipe='best'", "stable", "released", "paper"]),
        ({"optimizer__clip": -1.0}, ["optimizer.clip=-1.0", "0 or more"]),
        ({"optimizer__warm_up": -1}, ["optimizer.warm_up=-1", "0 or more"]),
        ({"dataset__targets": "small"}, ["dataset.targets='small'", "large", "any"]),
        ({"dataset__order": "random"}, ["dataset.order='random'", "shuffled", "list"]),
        ({"backbone__stages": "('block5',)"}, ["block5", "only"]),
        ({"dataset__kind": "voc", "dataset__root": "nowhere"}, ["nowhere"]),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(tmp_path, change, words):
    assert_refused(qpenet(*tiny(tmp_path / "run", **change)), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra", [["--profile", "-1"], ["--profile", "2", "--check"]])
def test_a_trace_of_nothing_is_refused(extra):
    refused = qpenet("train", "--config", "configs/quickstart.py", *extra)
    assert_refused(refused, "--profile", "1 or more")


def test_folders_and_configs_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "run").touch()
    assert_refused(qpenet(*tiny(tmp_path / "run")), str(tmp_path / "run"))
    missing = qpenet("train", "--config", "configs/nope.py", "--workdir", tmp_path)
    assert_refused(missing, "configs/nope.py")
    if not Path("/proc").is_dir():
        pytest.skip("no folder here that even the superuser can't write to: /proc")
    assert_refused(qpenet(*tiny(Path("/proc/run"))), "/proc/run")


def test_a_corrupt_checkpoint_is_named(copy):
    for file in (copy / "checkpoints" / "4").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"garbage")
    result = qpenet("evaluate", "--workdir", copy, "--episodes", 1)
    assert_refused(result, f"{copy}/checkpoints/4", "delete that folder")


class Listed(list):
    """A sampler of some images."""

    @property
    def images(self):
        return np.array(self)


def test_scored_images_that_are_trained_on_are_warned_of(tmp_path, write_voc, capsys):
    """One list may serve both, as long as each has images of its own."""
    root = write_voc(tmp_path, images=6, classes=3)
    data = VOCLayout(root, root / "ids.txt", ("one", "two", "three"))
    trained = Listed([0, 1, 3])
    assert trained_and_scored("what", data, trained, data, Listed([2, 4, 5])) == {}
    assert capsys.readouterr().err == ""
    found = trained_and_scored("what", data, trained, data, Listed([3, 1]))
    assert found == {"what": "2 of 2, such as im_003 = im_003"}
    assert capsys.readouterr().err == "warning: what: 2 of 2, such as im_003 = im_003\n"


# --- Speed, and traces of steps ---


def test_speeds_are_of_the_steps_since_a_moment(tmp_path):
    found = speeds(config(batch_size=3, shots=2), 4, time.perf_counter() - 8, 6.0)
    assert found["step_seconds"] == pytest.approx(2, rel=1e-3)
    assert found["images_per_second"] == pytest.approx(4.5, rel=1e-3)
    assert found["waiting_for_data"] == pytest.approx(0.75, rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "start", "total", "expected"),
    [
        (5, 0, 100, range(11, 16)),
        (5, 40, 100, range(51, 56)),
        (5, 0, 12, range(8, 13)),
        (5, 0, 3, range(1, 4)),
        (0, 0, 100, range(11, 11)),
    ],
)
def test_which_steps_are_traced(steps, start, total, expected, tmp_path):
    assert Profile(tmp_path, steps, start, total).steps == expected


def test_training_on_real_pixels(shared_voc, tmp_path):
    """The real config, shrunk, with its own backbone."""
    few = shared_voc / "lists" / "subset_val.txt"
    fields = {f"dataset__{s}_ids": few for s in ("train", "val")}
    fields |= {"dataset__root": shared_voc / "VOCdevkit/VOC2012", "steps": 2}
    fields |= {"dataset__min_pixels": 2048, "eval__references": True}
    files = ("--config", "configs/voc_subset_fold2.py", "--workdir", tmp_path / "run")
    result = passed("train", *files, *overrides(**SHRUNK | fields))
    assert "mean of dog, horse, person" in result.stdout
