"""PyTorch's steps in the speed benchmarks: the twin, in all ways of running it.

It needs the `[parity]` extra.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.flatten_util import ravel_pytree
from torch import Tensor

from qpenet_jax.backbones.torch_layout import to_flax
from qpenet_jax.benchmark import twin
from qpenet_jax.benchmark.jax_side import RATE, STEPS, Candidate, Weights, network_of
from qpenet_jax.benchmark.settings import Case
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.runtime import peak_memory
from qpenet_jax.core.types import Episode


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


def device_memory(device: str) -> int:
    """Returns the peak in bytes: of the device, or of the process on a CPU."""
    return peak_memory() if device == "cpu" else torch.cuda.max_memory_allocated()


def random_weights(case: Case) -> Weights:
    """Returns the weights that `torch_candidate` starts from."""
    net, model = _networks(case)
    tensors = {name: tensor.numpy() for name, tensor in net.net.state_dict().items()}
    both = to_flax(case.backbone, tensors), twin.to_flax(model.state_dict())
    return Weights(*jax.tree.map(jnp.asarray, both))


def _networks(case: Case) -> tuple[twin.Backbone, twin.TorchQPENet]:
    """Builds backbone and network, without dropout, with PyTorch's random weights."""
    torch.manual_seed(0)
    net, network = twin.backbone(case.backbone), network_of(case)
    sizes = network.channels, network.heads, network.ffn_features
    model = twin.TorchQPENet(net.channels, *sizes, network.shared_reducer)
    return net, twin.without_dropout(model).train(case.what == "train")


def torch_candidate(
    case: Case, variant: str, device: str, episodes: Episode
) -> Candidate:
    """Returns the twin's step of a case as it is timed.

    Raises InputError for a backbone that the twin doesn't have.
    """
    net, model = _networks(case)
    layout: Any = {} if variant == "eager" else {"memory_format": torch.channels_last}
    net, model = net.to(device, **layout), model.to(device, **layout)
    tensors: Any = (place(array, variant, device) for array in episodes[:4])
    batch = Episode(*tensors)
    if case.dtype == "bfloat16":
        net = net.bfloat16()
        model = model if case.what == "train" else model.bfloat16()
    if variant == "compile":
        torch.compiler.reset()
        net.compile()
        model.compile()
    step = {"train": _train, "eval": _evaluate, "backbone": _features}[case.what]
    candidate = step(net, model, batch)

    def call():
        with precision(case.dtype, device):
            result = candidate.call()
            if device == "cuda":
                torch.cuda.synchronize()
        return result

    return candidate._replace(call=call)


def place(array: np.ndarray, variant: str, device: str) -> Tensor:
    """Puts images or masks on the device; "eager" has the channels of images first."""
    tensor = torch.tensor(array, device=device)
    if variant == "eager" and array.shape[-1] == 3:
        return tensor.movedim(-1, -3).contiguous().movedim(-3, -1)
    return tensor


@contextlib.contextmanager
def precision(dtype: str, device: str) -> Iterator[None]:
    """Computes in bfloat16 where that is safe, or in float32 or TF32 products."""
    fast = dtype == "tf32"
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = fast
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        yield


def _train(net: twin.Backbone, model: twin.TorchQPENet, batch: Any) -> Candidate:
    optimizer = twin.build_optimizer(model.parameters(), STEPS, RATE)

    def numbers(result: Any) -> dict[str, np.ndarray]:
        state, names = optimizer[0].state, model.named_parameters()
        momentum = {name: state[p]["momentum_buffer"] for name, p in names}
        gradient, _ = ravel_pytree(twin.to_flax(momentum))
        return {"loss": _numpy(result["loss"]), "gradient": np.asarray(gradient)}

    return Candidate(lambda: twin.train_step(model, net, optimizer, batch), numbers)


def _evaluate(net: twin.Backbone, model: twin.TorchQPENet, batch: Any) -> Candidate:
    b, k = batch.support_images.shape[:2]
    features = _features(net, model, batch).call

    @torch.no_grad()
    def margin():
        maps = features()
        supports = maps[: b * k].unflatten(0, (b, k))
        logits, _ = model(supports, batch.support_masks, maps[b * k :])
        return logits[:, 1] - logits[:, 0]

    return Candidate(margin, lambda result: {"margin": _numpy(result)})


def _features(net: twin.Backbone, model: twin.TorchQPENet, batch: Any) -> Candidate:
    # Supports and queries as one batch: fewer, larger convolutions.
    images = torch.cat([batch.support_images.flatten(0, 1), batch.query_image])
    return Candidate(
        lambda: twin.features(net, images),
        lambda maps: {"features": _numpy(maps.movedim(1, -1))},
    )


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
