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
    with open_checkpoints(tmp_path) as manager:
        assert restore(manager, state(0)).step == 0
        for step, miou in ((1, 50.0), (2, 30.0), (3, 40.0), (4, None)):
            save(manager, state(step), miou)
    with open_checkpoints(tmp_path) as manager:
        assert sorted(manager.all_steps()) == [1, 4]
        latest = restore(manager, state(0))
        assert latest.step == 4
        np.testing.assert_array_equal(latest.params["kernel"], 4)
        save(manager, latest)  # already there: nothing happens
    best, step = restore_params(tmp_path, state(0).params)
    assert step == 1
    np.testing.assert_array_equal(best["kernel"], 1)


def test_without_a_score_the_latest_is_loaded(tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        restore_params(tmp_path, state(0).params)
    with open_checkpoints(tmp_path) as manager:
        save(manager, state(7))
    params, step = restore_params(tmp_path, state(0).params)
    assert step == 7
    np.testing.assert_array_equal(params["kernel"], 7)
