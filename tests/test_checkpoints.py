"""Which checkpoints are kept, and which are loaded."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import no_file_above

from qpenet_jax import InputError
from qpenet_jax.runs.checkpoints import (
    add_scores,
    is_scored,
    open_checkpoints,
    restore,
    restore_params,
    save,
    step_of,
)
from qpenet_jax.training.step import TrainState


def state(step):
    params = {"kernel": jnp.full((3,), step, jnp.float32)}
    return TrainState(jnp.array(step, jnp.int32), params, {"trace": jnp.zeros(3)})


def test_the_best_and_the_latest_two_are_kept(tmp_path):
    with open_checkpoints(tmp_path, ["base"]) as manager:
        assert restore(manager, state(0)).step == 0
        for step, miou in ((1, 50.0), (2, 30.0), (3, None), (4, 40.0), (5, None)):
            save(manager, state(step), miou and {"base": miou})
    with open_checkpoints(tmp_path, ["base"]) as manager:
        assert sorted(manager.all_steps()) == [1, 4, 5]
        latest = restore(manager, state(0))
        assert latest.step == 5
        np.testing.assert_array_equal(latest.params["kernel"], 5)
        save(manager, latest)  # already there: nothing happens
    best, step = restore_params(tmp_path, state(0).params, "base")
    assert step == 1
    np.testing.assert_array_equal(best["kernel"], 1)


def test_without_a_score_the_latest_is_loaded(tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        restore_params(tmp_path, state(0).params, "base")
    with open_checkpoints(tmp_path, ["base"]) as manager:
        save(manager, state(7))
    params, step = restore_params(tmp_path, state(0).params, "base")
    assert step == 7
    np.testing.assert_array_equal(params["kernel"], 7)


def test_every_selection_keeps_its_best(tmp_path):
    scores = {1: (50, 20), 2: (30, 60), 3: (40, 60), 4: (9, 9), 5: (8, 8), 6: (7, 7)}
    with open_checkpoints(tmp_path, ["base", "novel"]) as manager:
        for step, (base, novel) in scores.items():
            save(manager, state(step), {"base": base, "novel": novel})
        assert sorted(manager.all_steps()) == [1, 3, 5, 6]
    found = {
        name: restore_params(tmp_path, state(0).params, name)[1]
        for name in ("base", "novel", "last")
    }
    assert found == {"base": 1, "novel": 3, "last": 6}


@pytest.mark.parametrize("selection", ["base", "novel"])
def test_the_score_of_earlier_versions_is_read(tmp_path, selection):
    """They knew one selection, and called its score miou."""
    for step, miou in ((1, 50.0), (2, 70.0), (3, 40.0)):
        with open_checkpoints(tmp_path, [selection]) as manager:
            save(manager, state(step), {"miou": miou})
    assert restore_params(tmp_path, state(0).params, selection)[1] == 2
    with open_checkpoints(tmp_path, [selection]) as manager:
        save(manager, state(4), {selection: 60.0})
        assert sorted(manager.all_steps()) == [2, 3, 4]


def test_other_values_than_those_that_were_saved_are_refused(tmp_path):
    """TensorStore has checksums of its tables, and none of the numbers."""
    noise = np.random.default_rng(0).bytes(10_000)  # which isn't compressed
    like = {"kernel": jnp.zeros(2500)}
    params = {"kernel": jnp.array(np.frombuffer(noise, np.float32))}
    with open_checkpoints(tmp_path) as manager:
        save(manager, TrainState(jnp.array(7, jnp.int32), params, {}))
    files = [p for p in (tmp_path / "checkpoints/7/params").rglob("*") if p.is_file()]
    (data,) = (path for path in files if noise[500:600] in path.read_bytes())
    data.write_bytes(data.read_bytes().replace(noise[500:600], noise[501:601]))
    with pytest.raises(InputError, match="its params aren't what was"):
        restore_params(tmp_path, like, "last")
    with (
        open_checkpoints(tmp_path) as manager,
        pytest.raises(InputError, match="aren't"),
    ):
        restore(manager, TrainState(jnp.array(0, jnp.int32), like, {}))


READ = """
import sys, jax, numpy as np
from qpenet_jax.core.errors import exit_on_input_error
from qpenet_jax.runs.checkpoints import restore_params
from pathlib import Path
like = {str(n): np.zeros((50, 50), np.float32) for n in range(40)}
with exit_on_input_error():
    restore_params(Path(sys.argv[1]), like, "last")
"""


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    """Orbax reads all arrays at once; those that fail later printed tracebacks."""
    rng = np.random.default_rng(0)
    params = {str(n): jnp.array(rng.random((50, 50), np.float32)) for n in range(40)}
    with open_checkpoints(tmp_path) as manager:
        save(manager, TrainState(jnp.array(1, jnp.int32), params, {"a": jnp.zeros(1)}))
    for path in (tmp_path / "checkpoints/1/params").rglob("ocdbt.process_0/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    told = subprocess.run(
        [sys.executable, "-c", READ, tmp_path], capture_output=True, text=True
    )
    lines = [x for x in told.stderr.splitlines() if not x.startswith("WARNING:absl")]
    assert told.returncode == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"error: checkpoint {tmp_path}/checkpoints/1 can't be")


# --- A damaged one, and the one before ---


@pytest.fixture(scope="module")
def scored_twice(tmp_path_factory):
    """A workdir with checkpoints 4, the best, and 6 and 8; 6 was never scored."""
    workdir = tmp_path_factory.mktemp("scored_twice")
    with open_checkpoints(workdir, ["base"]) as manager:
        save(manager, state(4), {"base": 50.0})
        save(manager, state(6))
        save(manager, state(8), {"base": 30.0})
    return workdir


@pytest.fixture
def workdir(scored_twice, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(scored_twice, tmp_path / "run")


def damage(workdir, pattern, how, step=8):
    """Damage the files of a checkpoint that match."""
    files = [p for p in (workdir / f"checkpoints/{step}").glob(pattern) if p.is_file()]
    assert files
    for path in files:
        data = path.read_bytes()
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(
                data[: len(data) // 2] if how == "cut" else bytes(len(data))
            )


@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        ("params/d/*", "cut"),
        ("optimizer/d/*", "missing"),
        ("params/_METADATA", "cut"),
        ("_CHECKPOINT_METADATA", "zeroed"),  # it holds the hashes
        ("**/*", "zeroed"),
        ("**/*", "missing"),
    ],
)
def test_training_goes_on_from_the_one_before_a_damaged_one(
    workdir, capsys, pattern, how
):
    damage(workdir, pattern, how)
    with open_checkpoints(workdir, ["base"]) as manager:
        assert restore(manager, state(0)).step == 6
        assert sorted(manager.all_steps()) == [4, 6]
        save(manager, state(8), {"base": 70.0})  # made again
    told = [s for s in capsys.readouterr().err.splitlines() if s.startswith("warning")]
    assert told[-1].startswith(f"warning: checkpoint {workdir}/checkpoints/8 can't be")
    assert told[-1].endswith(f"it is now {workdir}/damaged/8, going on from step 6")
    params, step = restore_params(workdir, state(0).params, "base")
    assert step == 8
    np.testing.assert_array_equal(params["kernel"], 8)


def test_if_all_are_damaged_the_latest_is_named_and_all_stay(workdir):
    for step in (4, 6, 8):
        damage(workdir, "params/d/*", "cut", step)
    with (
        open_checkpoints(workdir) as manager,
        pytest.raises(InputError, match=r"/8 can't be read.*put back a copy"),
    ):
        restore(manager, state(0))
    assert not (workdir / "damaged").exists()


@pytest.mark.parametrize("how", ["missing", "cut", "zeroed"])
def test_lost_scores_never_let_another_checkpoint_be_taken(workdir, how):
    """But training makes them again."""
    damage(workdir, "metrics/metrics", how)
    for _ in range(2):  # reading mends nothing
        with pytest.raises(InputError, match=r"checkpoints/8 .* \(its scores"):
            restore_params(workdir, state(0).params, "base")
    with open_checkpoints(workdir, ["base"]) as manager:
        assert restore(manager, state(0)).step == 8
        assert not is_scored(manager, 8)
        add_scores(manager, 8, {"base": 60.0})
        assert step_of(manager, "base") == 8
    assert json.loads((workdir / "checkpoints/8/metrics/metrics").read_text())


def test_lost_scores_of_an_older_one_are_told(workdir):
    damage(workdir, "metrics/metrics", "cut", step=4)
    with (
        pytest.raises(InputError, match="checkpoints/4 can't be read"),
        open_checkpoints(workdir, ["base"]),
    ):
        pass


def test_what_an_interrupted_save_left_is_removed(workdir):
    """A save cut off, and a deletion: that of one which was scored, and wasn't best."""
    left = workdir / "checkpoints/9.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints/8", left)
    (left / "commit_success.txt").unlink()
    deleted = workdir / "checkpoints/deleted/2"
    shutil.copytree(workdir / "checkpoints/8/params", deleted / "params")
    for read_only in (True, False):
        with open_checkpoints(workdir, read_only=read_only) as manager:
            assert sorted(manager.all_steps()) == [4, 6, 8]
            assert step_of(manager, "base") == 4
            if not read_only:
                save(manager, state(9))
        assert left.exists() == deleted.exists() == read_only


def test_what_is_no_longer_kept_is_renamed_at_once(tmp_path):
    with open_checkpoints(tmp_path) as manager:
        for step in (1, 2, 3):
            save(manager, state(step))
        manager.wait_until_finished()
        found = {path.name for path in (tmp_path / "checkpoints").iterdir()}
        assert found == {"deleted", "2", "3"}
    found = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert found == {"2", "3"}


def test_a_save_on_a_full_disk_is_one_line_and_the_one_before_is_whole(workdir):
    """Orbax raises it with the next save, or in the end, from a thread of its own."""
    like = {"kernel": jnp.zeros(50_000), "b": jnp.ones(3)}
    large = TrainState(jnp.array(9, jnp.int32), like, {"trace": jnp.zeros(3)})
    large = dataclasses.replace(large, params=noise_like(like))

    def save_all(*states):
        with no_file_above(20_000), open_checkpoints(workdir) as manager:
            for each in states:
                save(manager, each)

    refused = r"checkpoints: a checkpoint can't be saved .*File too large.*make room"
    for states in ([large], [large, state(10)]):
        with pytest.raises(InputError, match=refused):
            save_all(*states)
    with open_checkpoints(workdir, ["base"]) as manager:
        assert restore(manager, state(0)).step == 8
        save(manager, state(9))
    assert restore_params(workdir, state(0).params, "last")[1] == 9


def noise_like(tree):
    """Numbers that aren't compressed."""
    rng = np.random.default_rng(0)
    return {k: jnp.array(rng.random(v.shape, np.float32)) for k, v in tree.items()}


def test_a_clock_that_was_turned_back_changes_nothing(workdir, monkeypatch):
    future = time.time() + 1e7
    for path in workdir.rglob("*"):
        os.utime(path, (future, future))
    monkeypatch.setattr(time, "time", lambda: future - 3e7)
    with open_checkpoints(workdir, ["base"]) as manager:
        assert restore(manager, state(0)).step == 8
        save(manager, state(9))
        save(manager, state(10))
    with open_checkpoints(workdir, ["base"]) as manager:
        assert sorted(manager.all_steps()) == [4, 9, 10]
        assert restore(manager, state(0)).step == 10
