"""Which checkpoints are kept, and which are loaded."""

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
