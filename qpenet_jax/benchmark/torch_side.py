"""PyTorch's steps in the speed benchmarks: the twin, in all ways of running it.

As a program, one case in a new process. It needs the `[parity]` extra.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from jaxtyping import Array, PyTree
from torch import Tensor, nn

from qpenet_jax.backbones.registry import backbone
from qpenet_jax.backbones.torch_layout import ORIGINALS
from qpenet_jax.benchmark import twin
from qpenet_jax.benchmark.contenders import Contender, made_up_episodes
from qpenet_jax.benchmark.jax_side import NO_DROPOUT, RATE, STEPS, Weights, flat
from qpenet_jax.benchmark.processes import child_report
from qpenet_jax.benchmark.settings import Case
from qpenet_jax.benchmark.timing import matmul_rate
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.runtime import keep_freed_memory, peak_memory
from qpenet_jax.core.types import Episode
from qpenet_jax.models.qpenet import QPENet


def threads() -> int:
    """Returns how many threads PyTorch computes with."""
    return torch.get_num_threads()


def device_for(platform: str) -> str:
    """Returns PyTorch's device for a platform of JAX; InputError if it has none."""
    if platform == "cpu":
        return "cpu"
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise InputError(
        f"JAX runs on {platform} and PyTorch {torch.__version__} can't: install "
        "PyTorch for it, or set JAX_PLATFORMS=cpu"
    )


def contender(
    case: Case,
    variant: str,
    device: str,
    episodes: Episode,
    weights: Weights | None = None,
) -> Contender:
    """Returns the twin as a contender of a case.

    Without `weights` they are those that PyTorch initialises. Raises InputError for a
    backbone that the twin doesn't have.
    """
    net, model = _networks(case, weights)
    layout: Any = {} if variant == "eager" else {"memory_format": torch.channels_last}
    net, model = net.to(device, **layout), model.to(device, **layout)
    placed: Any = (_place(x, variant, device) for x in episodes if x is not None)
    batch = Episode(*placed)
    if case.dtype == "bfloat16":
        net = net.bfloat16()
        model = model if case.what == "train" else model.bfloat16()
    if variant == "compile":
        torch.compiler.reset()
        net.compile()
        model.compile()
    make = {"train": _train, "eval": _eval, "backbone": _backbone}[case.what]
    made = make(net, model, batch)

    def timed():
        with precision(case.dtype, device):
            found = made.call()
            if device == "cuda":
                torch.cuda.synchronize()
        return found

    def first():
        with precision(case.dtype, device):
            return made.first()

    return Contender(first, timed)


def _networks(case: Case, weights: Weights | None) -> tuple[twin.Backbone, twin.QPENet]:
    """Builds backbone and network, without dropout, with the given weights."""
    torch.manual_seed(case.seed)
    net = twin.backbone(case.backbone)
    ours = QPENet(**{**NO_DROPOUT, **case.network})
    model = twin.QPENet(
        net.channels, ours.channels, ours.heads, ours.ffn_features, ours.shared_reducer
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    if weights is not None:
        state = backbone_state(case.backbone, weights.backbone)
        net.net.load_state_dict({**net.net.state_dict(), **state})
        model.load_state_dict(twin.from_flax(weights.params))
    return net, model.train(case.what == "train")


def backbone_state(name: str, weights: PyTree[Array]) -> dict[str, Tensor]:
    """Turns a Flax backbone's folded weights into PyTorch's state_dict.

    Batch norm is left with the shift alone; it is computed all the same. Layers that
    only PyTorch's network has are not in it.
    """
    original = ORIGINALS[type(backbone(name).module)]
    folded: dict = flatten_dict(weights, sep="/")
    state = {}
    for path in (p for p in folded if p.endswith("/kernel")):
        layer = path.removesuffix("/kernel")
        conv, norm = original.names(layer)
        kernel, bias = np.array(folded[path]), np.array(folded[f"{layer}/bias"])
        if kernel.ndim < 4:  # [c, o], or depthwise [k, k, c]
            kernel = kernel[None, None] if kernel.ndim == 2 else kernel[:, :, None]
        ones = np.ones_like(bias)
        arrays = {
            f"{conv}.weight": np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)),
            f"{norm}.weight": ones * np.float32(1 + original.epsilon) ** 0.5,
            f"{norm}.bias": bias,
            f"{norm}.running_mean": 0 * ones,
            f"{norm}.running_var": ones,
        }
        state |= {name: torch.from_numpy(array) for name, array in arrays.items()}
    return state


def _place(array: np.ndarray, variant: str, device: str) -> Tensor:
    """Puts images or masks on the device; images lie in memory as the variant asks."""
    tensor = torch.tensor(array, device=device)
    if variant == "eager" and array.shape[-1] == 3:
        return tensor.movedim(-1, -3).contiguous().movedim(-3, -1)
    return tensor


@contextlib.contextmanager
def precision(dtype: str, device: str) -> Iterator[None]:
    """Computes in bfloat16 where that is safe, or choose float32 or TF32 products."""
    fast = dtype == "tf32"
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = fast
    half = dtype == "bfloat16"
    with torch.autocast(device, torch.bfloat16, enabled=half):
        yield


# --- what is timed ----------------------------------------------------------------


def _images(batch: Episode) -> Any:
    """Returns supports and queries as one batch: fewer, larger convolutions."""
    supports: Any = batch.support_images
    return torch.cat([supports.flatten(0, 1), batch.query_image])  # pyright: ignore


def _eval(net: twin.Backbone, model: twin.QPENet, batch: Any) -> Contender:
    b, k = batch.support_images.shape[:2]
    images = _images(batch)

    @torch.no_grad()
    def call():
        maps = twin.features(net, images)
        supports = maps[: b * k].unflatten(0, (b, k))
        logits, _ = model(supports, batch.support_masks, maps[b * k :])
        return logits[:, 1] - logits[:, 0]

    return Contender(lambda: {"margin": _numpy(call())}, call)


def _backbone(net: twin.Backbone, model: twin.QPENet, batch: Any) -> Contender:
    images = _images(batch)

    def call():
        return twin.features(net, images)

    return Contender(lambda: {"features": _numpy(call().movedim(1, -1))}, call)


def _train(net: twin.Backbone, model: twin.QPENet, batch: Any) -> Contender:
    optimizer = twin.build_optimizer(model.parameters(), STEPS, RATE)

    def call():
        return twin.train_step(model, net, optimizer, batch)

    def first():
        loss = _numpy(call()["loss"])
        state = optimizer[0].state
        momentum = {n: state[p]["momentum_buffer"] for n, p in model.named_parameters()}
        return {"loss": loss, "gradient": flat(twin.to_flax(momentum))}

    return Contender(first, call)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def peak_rate(dtype: str, device: str, n: int) -> float:
    """Returns the FLOP/s of a product of two n x n matrices."""
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    a = torch.ones(n, n, dtype=kind, device=device)

    def product():
        torch.matmul(a, a)
        if device == "cuda":
            torch.cuda.synchronize()

    with precision("float32" if dtype == "bfloat16" else dtype, device):
        return matmul_rate(product, n)


def main() -> None:
    """Runs the case of the JSON argument `{case, variant, device, started}`."""
    told = json.loads(sys.argv[1])
    keep_freed_memory()
    on_cpu = told["device"] == "cpu"
    at_import = peak_memory() if on_cpu else 0
    case = Case(**told["case"])
    twins = contender(case, told["variant"], told["device"], made_up_episodes(case))
    memory = peak_memory if on_cpu else torch.cuda.max_memory_allocated
    child_report(twins, told["started"], at_import, memory)


if __name__ == "__main__":
    main()
