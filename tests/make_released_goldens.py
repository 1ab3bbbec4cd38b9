"""Write tests/goldens/released.npz: the released network on drawn features.

python tests/make_released_goldens.py. Only after a change that is meant to change them,
and with `pytest tests/test_released.py` green against the released model's own numbers.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import test_released as t

features = jnp.zeros((1, 1, 5, 5, 12))
masks = jnp.zeros((1, 1, 33, 33), jnp.int32)
params = jax.jit(t.SMALL.init)(jax.random.key(3), features, masks, features[:, 0])
params = jax.tree.map(
    lambda p: jax.random.normal(jax.random.key(p.size), p.shape) * 0.2, params["params"]
)
padding = np.zeros((1, 1, 33, 33), bool)
padding[..., 20:] = True
goldens = {}
for behaviour in ("released", "fixed"):
    model = t.SMALL.clone(behaviour=behaviour)
    logits, out = t.predict(
        model, {"params": params}, *t.episode(), padding, padding[:, 0]
    )
    goldens |= {f"{behaviour}/logits": logits, f"{behaviour}/T": out["T"]}
np.savez_compressed(Path(__file__).parent / "goldens" / "released.npz", **goldens)
