"""Names and layouts of the authors' checkpoints, as our parameters."""

import functools
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Float, PyTree

from qpenet_jax.models.released.transformer import LAYERS

CONVS = {"cyc": "convs", "bg": "gbc/convs"}
"""Prefixes of the two networks that segment by a prototype: theirs -> ours."""


@functools.cache
def names() -> Mapping[str, str]:
    """Returns our parameter's path by the name of each of the 81 tensors."""
    table = {
        "bg_prototype": "gbc/P_global",
        "down_query.0.weight": "reduce_query/kernel",
        "down_supp.0.weight": "reduce_support/kernel",
        "init_merge1.0.weight": "filter/kernel",
        "init_merge2.0.weight": "activate/kernel",
        "merge_multi_lvl_reduce.0.weight": "reduce/kernel",
        "Dynamic_conv.weight": "gbc/kernels",
        "Dynamic_conv.attention.fc1.weight": "gbc/fc1/kernel",
        "Dynamic_conv.attention.fc2.weight": "gbc/fc2/kernel",
        "Dynamic_conv.attention.fc2.bias": "gbc/fc2/bias",
        "transformer.level_embed": "transformer/level_embed",
    }
    table |= _layer("gam.gate.0", "gate1") | _layer("gam.gate.2", "gate2")
    table |= _residual("fg_res", "activate_residual")
    table |= _head("fg_cls", "auxiliary_head")
    table |= _residual("merge_multi_lvl_sum", "reduce_residual")
    table |= _head("cls_meta", "head")
    for theirs, ours in CONVS.items():
        table[f"down_{theirs}.0.weight"] = f"{ours}/merge/kernel"
        table |= _residual(f"{theirs}_res1", f"{ours}/residual")
        table |= _head(f"{theirs}_cls", f"{ours}/head")
    for i in range(LAYERS):
        table |= _transformer_layer(i)
    return table


def _layer(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.weight": f"{ours}/kernel", f"{theirs}.bias": f"{ours}/bias"}


def _residual(theirs: str, ours: str) -> dict[str, str]:
    return {
        f"{theirs}.0.weight": f"{ours}/conv1/kernel",
        f"{theirs}.2.weight": f"{ours}/conv2/kernel",
    }


def _head(theirs: str, ours: str) -> dict[str, str]:
    table = {f"{theirs}.0.weight": f"{ours}/conv/kernel"}
    return table | _layer(f"{theirs}.3", f"{ours}/classifier")


def _transformer_layer(i: int) -> dict[str, str]:
    theirs, ours = f"transformer.qry_self_layers.{i}", f"transformer/deform{i}"
    table = _layer(f"{theirs}.sampling_offsets", f"{ours}/offsets")
    table |= _layer(f"{theirs}.attention_weights", f"{ours}/weights")
    table[f"{theirs}.value_proj.weight"] = f"{ours}/value/kernel"
    table[f"{theirs}.output_proj.weight"] = f"{ours}/out/kernel"
    theirs, ours = f"transformer.cross_layers.{i}", f"transformer/cross{i}"
    parts = {"q_fc": "query", "k_fc": "key", "v_fc": "value", "proj": "out"}
    table |= {f"{theirs}.{a}.weight": f"{ours}/{b}/kernel" for a, b in parts.items()}
    for j, part in enumerate(("deform", "cross")):
        theirs, ours = f"transformer.ffns.{2 * i + j}", f"transformer/ffn{i}_{part}"
        table[f"{theirs}.layers.0.0.weight"] = f"{ours}_1/kernel"
        table[f"{theirs}.layers.1.weight"] = f"{ours}_2/kernel"
    for j, part in enumerate(("deform", "ffn1", "cross", "ffn2")):
        theirs, ours = f"transformer.layer_norms.{4 * i + j}", f"transformer/norm{i}"
        table[f"{theirs}.weight"] = f"{ours}_{part}/scale"
        table[f"{theirs}.bias"] = f"{ours}_{part}/bias"
    return table


def to_params(
    tensors: Mapping[str, Float[np.ndarray, "..."]],
) -> PyTree[Float[np.ndarray, "..."]]:
    """Turns the 81 tensors of a checkpoint beside its backbone into our parameters."""
    flat = {path: layout(name, tensors[name]) for name, path in names().items()}
    return unflatten_dict(flat, sep="/")


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a tensor in a checkpoint by that of our parameter."""
    if name == "bg_prototype":
        return 1, *shape, 1, 1
    if name == "Dynamic_conv.weight":
        return shape[0], *shape[:2:-1], *shape[1:3]
    if len(shape) == 4:
        return *shape[:1:-1], *shape[:2]
    if len(shape) == 1 or name == "transformer.level_embed":
        return shape
    return shape[::-1] if name.startswith("transformer.") else (*shape[::-1], 1, 1)


def layout(name: str, tensor: np.ndarray) -> np.ndarray:
    """Brings a tensor into our layout, and a gradient of it likewise."""
    if name == "bg_prototype":
        return tensor.reshape(-1)
    if name == "Dynamic_conv.weight":
        return tensor.transpose(0, 3, 4, 2, 1)
    if name == "init_merge2.0.weight":
        # Ours puts the broadcast prototype last.
        c = tensor.shape[0]
        order = (slice(c), slice(2 * c, None), slice(c, 2 * c))
        tensor = np.concatenate([tensor[:, part] for part in order], axis=1)
    if tensor.ndim == 4:
        tensor = tensor.transpose(2, 3, 1, 0)
        return tensor[0, 0] if tensor.shape[:2] == (1, 1) else tensor
    return (
        tensor.T if tensor.ndim == 2 and name != "transformer.level_embed" else tensor
    )
