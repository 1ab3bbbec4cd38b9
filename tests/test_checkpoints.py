"""Which checkpoints are kept, which are loaded, and what is refused."""

import json
import os
import shutil
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import no_file_above

from qpenet_jax import InputError
from qpenet_jax.core.types import TrainState
from qpenet_jax.runs.checkpoints import open_checkpoints, restore_params


def state(step, params=None):
    params = params or {"kernel": jnp.full((3,), step, jnp.float32)}
    return TrainState(jnp.array(step, jnp.int32), params, {"trace": jnp.zeros(3)})


def save(checkpoints, step, **scores):
    checkpoints.save(state(step))
    if scores:
        checkpoints.add_scores(step, scores)


def test_the_best_of_every_selection_and_the_latest_two_are_kept(tmp_path):
    scores = {1: (50, 20), 2: (30, 60), 3: (40, 60), 4: (9, 9), 5: (0, 0), 6: (7, 7)}
    with open_checkpoints(tmp_path, ["base", "novel"]) as checkpoints:
        assert checkpoints.restore(state(0)) is None
        for step, found in scores.items():
            save(checkpoints, step, **dict(zip(("base", "novel"), found, strict=True)))
        assert checkpoints.steps() == [1, 3, 5, 6]
    names, like = ("base", "novel", "last"), state(0).params
    found = {name: restore_params(tmp_path, like, name) for name in names}
    assert [found[name][1] for name in names] == [1, 3, 6]
    np.testing.assert_array_equal(found["novel"][0]["kernel"], 3)
    with open_checkpoints(tmp_path, ["base", "novel"]) as checkpoints:
        latest = checkpoints.restore(state(0))
        assert latest.step == checkpoints.latest() == 6
        np.testing.assert_array_equal(latest.params["kernel"], 6)
        checkpoints.save(latest)  # already there: nothing happens
    # Without a score the latest is taken.
    with pytest.raises(InputError, match="no checkpoint"):
        restore_params(tmp_path / "new", like, "last")
    with open_checkpoints(tmp_path / "new") as checkpoints:
        save(checkpoints, 7)
    for selection in ("base", "last"):
        assert restore_params(tmp_path / "new", like, selection)[1] == 7


def test_other_values_than_those_that_were_saved_are_refused(tmp_path):
    """TensorStore has checksums of its tables, and none of the numbers."""
    data = np.random.default_rng(0).bytes(10_000)  # which isn't compressed
    params = {"kernel": jnp.array(np.frombuffer(data, np.float32))}
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(7, params))
    files = [p for p in (tmp_path / "checkpoints/7/params").rglob("*") if p.is_file()]
    (file,) = (path for path in files if data[500:600] in path.read_bytes())
    file.write_bytes(file.read_bytes().replace(data[500:600], data[501:601]))
    with pytest.raises(InputError, match="its params aren't what was"):
        restore_params(tmp_path, params, "last")
    with (
        open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(InputError, match="aren't"),
    ):
        checkpoints.restore(state(0, params))


# --- A damaged one, and the one before ---


@pytest.fixture(scope="module")
def scored_twice(tmp_path_factory):
    """A workdir with checkpoints 4, the best, and 6 and 8; 6 was never scored.

    Its files are dated into the future, which changes nothing.
    """
    workdir = tmp_path_factory.mktemp("scored_twice")
    with open_checkpoints(workdir, ["base"]) as checkpoints:
        save(checkpoints, 4, base=50.0)
        save(checkpoints, 6)
        save(checkpoints, 8, base=30.0)
    future = time.time() + 1e7
    for path in workdir.rglob("*"):
        os.utime(path, (future, future))
    return workdir


@pytest.fixture
def workdir(scored_twice, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(scored_twice, tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def damage(workdir, pattern, how, step=8):
    """Damage the files of a checkpoint that match."""
    files = [p for p in (workdir / f"checkpoints/{step}").glob(pattern) if p.is_file()]
    assert files
    for path in files:
        how(path)


@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        ("params/d/*", cut),
        ("rest/d/*", Path.unlink),
        ("params/_METADATA", cut),
        ("_CHECKPOINT_METADATA", zero),  # it holds the hashes
        ("**/*", zero),
        ("**/*", Path.unlink),
    ],
)
def test_training_goes_on_from_the_one_before_a_damaged_one(
    workdir, capsys, pattern, how
):
    damage(workdir, pattern, how)
    with open_checkpoints(workdir, ["base"]) as checkpoints:
        assert checkpoints.restore(state(0)).step == 6
        assert checkpoints.steps() == [4, 6]
        save(checkpoints, 8, base=70.0)  # made again
    lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("warning")]
    assert lines[-1].startswith(f"warning: checkpoint {workdir}/checkpoints/8 can't be")
    assert lines[-1].endswith(f"it is now {workdir}/damaged/8, going on from 6")
    params, step = restore_params(workdir, state(0).params, "base")
    assert step == 8
    np.testing.assert_array_equal(params["kernel"], 8)


def test_if_all_are_damaged_the_latest_is_named_and_all_stay(workdir):
    for step in (4, 6, 8):
        damage(workdir, "params/d/*", cut, step)
    with (
        open_checkpoints(workdir) as checkpoints,
        pytest.raises(InputError, match=r"/8 can't be read.*put back a copy"),
    ):
        checkpoints.restore(state(0))
    assert not (workdir / "damaged").exists()


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        (None, "lost its scores.json"),
        ("", "can't be"),
        ("[]", "can't be"),
        ("{", "an't"),
    ],
)
def test_lost_scores_never_let_another_checkpoint_be_taken(workdir, content, refused):
    """Training again scores the checkpoints that are kept (test_train.py)."""
    if content is None:
        (workdir / "scores.json").unlink()
    else:
        (workdir / "scores.json").write_text(content)
    with pytest.raises(InputError, match=f"{refused}.*run train.py again"):
        restore_params(workdir, state(0).params, "base")
    (workdir / "scores.json").unlink(missing_ok=True)
    assert restore_params(workdir, state(0).params, "last")[1] == 8
    with open_checkpoints(workdir, ["base"]) as checkpoints:
        assert checkpoints.scores == {}
        checkpoints.add_scores(8, {"base": 60.0})
        assert checkpoints.selected("base") == 8
    assert json.loads((workdir / "scores.json").read_text()) == {"8": {"base": 60.0}}


def test_what_a_killed_process_left_is_removed(workdir):
    """A save was cut off, and the deletion of 6, which is neither best nor latest."""
    left = workdir / "checkpoints/9.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints/8", left)
    (left / "commit_success.txt").unlink(missing_ok=True)
    shutil.rmtree(workdir / "checkpoints/6/params")
    for read_only in (True, False):
        with open_checkpoints(workdir, ["base"], read_only=read_only) as checkpoints:
            assert checkpoints.selected("base") == 4
            assert checkpoints.restore(state(0)).step == 8
            if not read_only:
                save(checkpoints, 9)
                save(checkpoints, 10)
                assert checkpoints.steps() == [4, 9, 10]
        assert left.exists() == read_only


def wait_for_late_writes(workdir):
    """Wait until nothing changes: a user's next command begins after the last ended.

    Orbax writes all of a checkpoint at once, and where one write fails it doesn't wait
    for the others.
    """
    unchanged, before = 0, None
    while unchanged < 3:
        now = sorted(str(path) for path in workdir.rglob("*"))
        unchanged = unchanged + 1 if now == before else 0
        before = now
        time.sleep(0.1)


@pytest.mark.parametrize("more", [[], [10]])
def test_a_save_on_a_full_disk_is_one_line_and_the_one_before_is_whole(workdir, more):
    """Orbax raises it with the next save, or in the end, from a thread of its own."""
    numbers = np.random.default_rng(0).random(50_000, np.float32)
    large = state(9, {"kernel": jnp.array(numbers), "b": jnp.zeros(3)})

    def save_all(*states):
        with no_file_above(20_000), open_checkpoints(workdir) as checkpoints:
            for each in states:
                checkpoints.save(each)

    refused = r"checkpoints: a checkpoint can't be saved .*File too large.*make room"
    with pytest.raises(InputError, match=refused):
        save_all(large, *map(state, more))
    wait_for_late_writes(workdir)
    with open_checkpoints(workdir, ["base"]) as checkpoints:
        assert checkpoints.restore(state(0)).step == 8
        save(checkpoints, 9)
    assert restore_params(workdir, state(0).params, "last")[1] == 9
