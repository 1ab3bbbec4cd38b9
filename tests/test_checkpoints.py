"""Which checkpoints are kept, and which are loaded."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qpenet_jax import InputError
from qpenet_jax.training.checkpoints import (
    open_checkpoints,
    restore,
    restore_params,
    save,
)
from qpenet_jax.training.step import TrainState


def state(step):
    params = {"kernel": jnp.full((3,), step, jnp.float32)}
    return TrainState(jnp.array(step, jnp.int32), params, {"trace": jnp.zeros(3)})


def test_the_best_and_the_latest_are_kept(tmp_path):
    with open_checkpoints(tmp_path, ["base"]) as manager:
        assert restore(manager, state(0)).step == 0
        for step, miou in ((1, 50.0), (2, 30.0), (3, 40.0), (4, None)):
            save(manager, state(step), miou and {"base": miou})
    with open_checkpoints(tmp_path, ["base"]) as manager:
        assert sorted(manager.all_steps()) == [1, 4]
        latest = restore(manager, state(0))
        assert latest.step == 4
        np.testing.assert_array_equal(latest.params["kernel"], 4)
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
    scores = {1: (50, 20), 2: (30, 60), 3: (40, 60), 4: (20, 10), 5: (30, 30)}
    with open_checkpoints(tmp_path, ["base", "novel"]) as manager:
        for step, (base, novel) in scores.items():
            save(manager, state(step), {"base": base, "novel": novel})
        assert sorted(manager.all_steps()) == [1, 3, 5]
    found = {
        name: restore_params(tmp_path, state(0).params, name)[1]
        for name in ("base", "novel", "last")
    }
    assert found == {"base": 1, "novel": 3, "last": 5}


@pytest.mark.parametrize("selection", ["base", "novel"])
def test_the_score_of_earlier_versions_is_read(tmp_path, selection):
    """They knew one selection, and called its score miou."""
    for step, miou in ((1, 50.0), (2, 70.0), (3, 40.0)):
        with open_checkpoints(tmp_path, [selection]) as manager:
            save(manager, state(step), {"miou": miou})
    assert restore_params(tmp_path, state(0).params, selection)[1] == 2
    with open_checkpoints(tmp_path, [selection]) as manager:
        save(manager, state(4), {selection: 60.0})
        assert sorted(manager.all_steps()) == [2, 4]


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
from qpenet_jax.training.checkpoints import restore_params
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
