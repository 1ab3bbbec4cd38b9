"""What training needs, made once from an experiment: data, networks, the step."""

import dataclasses
from collections.abc import Generator
from typing import Any

import jax

from qpenet_jax.backbones.batch_norm import statistics_of
from qpenet_jax.core import cluster
from qpenet_jax.data.loader import training_batches
from qpenet_jax.runs.experiment import Experiment
from qpenet_jax.runs.loading import augmented, training_loader
from qpenet_jax.training.sharding import (
    any_asked,
    global_batch,
    idle_devices,
    shardings,
)
from qpenet_jax.training.step import TrainState


class Trainer:
    """Makes batches and takes steps; the loop, its check and the cost of runs use it.

    `weights` are the backbone's, on all devices; `steps` is the length of training and
    `learning_rate` a function of the step. `warning` tells of idle devices.
    """

    def __init__(self, experiment: Experiment):
        """Reads the data set and the backbone; raises InputError if one is missing."""
        config = experiment.config
        self.experiment, self.config = experiment, config
        self.dataset = experiment.dataset("train")
        self.sampler = experiment.train_sampler(self.dataset)
        self.steps = experiment.steps(len(self.sampler))
        parts = config.batch_size, config.accumulate
        self.replicated, self.split = shardings(*parts)
        self.weights = jax.device_put(experiment.backbone_weights(), self.replicated)
        self.learning_rate = experiment.optimizer.schedule(self.steps)
        self._optimizer = experiment.optimizer.build(self.steps)
        epoch = len(self.sampler) // config.batch_size
        self._train_step = experiment.train_step(self._optimizer, epoch)
        self._key = jax.random.key(config.seed + 1)
        self.warning = idle_devices(*parts)
        self._asked: Any = False  # in any process, before the last step

    def initial_state(self) -> TrainState:
        """Returns the state at step 0."""
        state = self.experiment.init(self._optimizer)
        if self.config.backbone.drift:
            theirs = jax.tree.map(jax.numpy.copy, statistics_of(self.weights))
            state = dataclasses.replace(state, statistics=theirs)
        return self.placed(state)

    def placed(self, tree: Any) -> Any:
        """Returns a tree of arrays with a copy on every device."""
        return jax.device_put(tree, self.replicated)

    def batches(self, start_step: int = 0) -> Generator[Any, None, None]:
        """Yields this process's part of the batches from a step on, without end.

        Close the generator to end the processes that load.
        """
        return training_batches(
            training_loader(self.experiment, self.dataset),
            self.sampler,
            batch_size=self.config.batch_size,
            start_step=start_step,
            workers=self.config.workers,
            shard=(cluster.index(), cluster.count()),
        )

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """Returns the next state and the step's metrics; the given state is used up."""
        episodes = augmented(self.experiment, global_batch(batch, self.split))
        return self._train_step(state, self.weights, episodes, self._key)

    def stops(self, asked: bool) -> bool:
        """Returns whether to stop after this step, the same in all processes.

        To be called in every step. Of several processes each learns a step later that
        any was `asked` to: none waits for the others.
        """
        if cluster.count() == 1:
            return asked
        before, self._asked = self._asked, any_asked(asked, self.split)
        return bool(before)
