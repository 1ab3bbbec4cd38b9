"""The optimiser and its schedule (paper IV.B)."""

import dataclasses
import functools

import jax.numpy as jnp
import optax

from qpenet_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """SGD of the paper (IV.B), or AdamW for short schedules, with poly decay.

    The paper gives lr 0.0025; the released trainer multiplies it by 10 for every
    parameter (PFENet's habit for layers that start from scratch): `lr_factor`.
    """

    name: str = "sgd"
    lr: float = 0.0025
    lr_factor: float = 10.0
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 0.0  # largest norm of the whole gradient; 0: not clipped
    warm_up: int = 0  # steps over which the rate rises linearly to the schedule
    first: int = 0  # the t of the first step; with 1 the last step's rate is 0

    def __post_init__(self):
        """Refuses a name that `build` doesn't know, and what makes no optimiser."""
        if self.name not in ("sgd", "adamw"):
            raise InputError(f"optimizer {self.name!r}: choose 'sgd' or 'adamw'")
        for name in ("clip", "warm_up", "first"):
            if getattr(self, name) < 0:
                raise InputError(
                    f"optimizer.{name}={getattr(self, name)} must be 0 or more"
                )

    def schedule(self, steps: int) -> optax.Schedule:
        """Returns lr * lr_factor * (1 - t / steps)^power, after the warm-up if any."""
        peak = self.lr * self.lr_factor
        poly = optax.polynomial_schedule(peak, 0.0, self.power, steps)

        def decay(t):
            # XLA may turn t / steps into a product that is above 1 in the last step,
            # and the power of what is left isn't a number.
            return jnp.where(t + self.first < steps, poly(t + self.first), 0.0)

        if not self.warm_up:
            return decay
        return lambda t: decay(t) * jnp.minimum(1.0, (t + 1) / self.warm_up)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - of settings, which are few
    def build(self, steps: int) -> optax.GradientTransformation:
        """Returns the optimiser for a run of `steps` steps."""
        schedule = self.schedule(steps)
        clip = [optax.clip_by_global_norm(self.clip)] if self.clip else []
        if self.name == "adamw":
            adamw = optax.adamw(schedule, weight_decay=self.weight_decay)
            return optax.chain(*clip, adamw) if clip else adamw
        # As in PyTorch, weight decay is part of the gradient that momentum sums up.
        decay = optax.add_decayed_weights(self.weight_decay)
        return optax.chain(*clip, decay, optax.sgd(schedule, momentum=self.momentum))
