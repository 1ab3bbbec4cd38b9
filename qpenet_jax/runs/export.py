"""A run's network as files for other run times: StableHLO by JAX, and ONNX.

It is written in parts, functions of arrays that have names: `encode_support` and
`encode_query` take one photo; `decode_Kshot` takes what they return, that of K supports
stacked, and the supports' masks.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import PyTree

from qpenet_jax.backbones.convolutions import fold_statistics
from qpenet_jax.backbones.precision import in_dtype
from qpenet_jax.backbones.registry import Backbone, deep_part, features, with_deep
from qpenet_jax.core.choices import EXPORT_FORMATS
from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.files import local_path, new_folder, write_whole
from qpenet_jax.core.types import Array
from qpenet_jax.evaluation.report import write_json
from qpenet_jax.models.ops.devices import only_defaults
from qpenet_jax.models.prototypes import foreground_margin
from qpenet_jax.models.qpenet import Role
from qpenet_jax.runs.build import build_backbone, build_model, identity
from qpenet_jax.runs.folder import open_run

ABOUT = "export.json"

PLATFORMS = ("cpu", "cuda", "tpu")

ONNX_PACKAGES = ("onnx", "jax2onnx")

Arrays = dict[str, Array]
Shapes = dict[str, jax.ShapeDtypeStruct]


class Part(NamedTuple):
    """A function of arrays by their names, which returns arrays by theirs."""

    function: Callable[..., Arrays]
    inputs: Shapes

    @property
    def outputs(self) -> Shapes:
        """The shapes of what it returns."""
        found: Any = jax.eval_shape(self.function, **self.inputs)
        return found


def export(
    workdir: str | Path,
    out: str | Path,
    *,
    format: str,
    shots: Sequence[int] = (1,),
    overrides: Sequence[str] = (),
) -> Path:
    """Writes a run's network into a folder and returns it (docs/export.md).

    `format` is one of EXPORT_FORMATS. The folder holds a file for each part, with the
    weights in it, and `export.json`, which lists their inputs and outputs. Nothing is
    left behind if anything fails.

    Raises:
        InputError: as `open_run` and `network_parts`; `out` exists and isn't empty; a
            package is missing, or ONNX has no such operation.
    """
    check_choice("--format ", format, EXPORT_FORMATS)
    if format == "onnx":
        _check_packages()
    serialize = {"stablehlo": stablehlo, "onnx": onnx}[format]
    with new_folder(local_path(out)) as made:
        run, parts = open_run(local_path(workdir), overrides), {}
        networks = build_model(run.config), build_backbone(run.config)
        params, weights = fold_statistics(run.params, run.weights)
        side = run.config.side
        found = network_parts(networks, params, weights, side, shots)
        for name, part in found.items():
            file = f"{name}.{format}"
            write_whole(made / file, serialize(part, name))
            parts[name] = {
                "file": file,
                "inputs": _listed(part.inputs),
                "outputs": _listed(part.outputs),
            }
        about = {
            "format": format,
            "made_by": f"qpenet_jax {importlib.metadata.version('qpenet-jax')}",
            "run": identity(run.config)[:12],
            "step": run.step,
            "side": side,
            "shots": list(dict.fromkeys(shots)),
            "image": "uint8 RGB, 0 to 255: normalisation is part of the network",
            "masks": "uint8: 1 is the object, 0 is not, 255 is padding or ignored",
            "platforms": list(PLATFORMS) if format == "stablehlo" else "any",
            "parts": parts,
        }
        write_json(made / ABOUT, about)
    return local_path(out)


def _listed(shapes: Shapes) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(x.shape), "dtype": str(x.dtype)}
        for name, x in shapes.items()
    ]


def network_parts(
    networks: tuple[nn.Module, Backbone],
    params: PyTree[Array],
    weights: PyTree[Array],
    side: int,
    shots: Sequence[int] = (1,),
) -> dict[str, Part]:
    """Returns the parts of a network in float32, with its weights in them.

    `networks` are QPENet and its backbone, with their `params` and `weights`. Photos
    are uint8 RGB [1, side, side, 3]; their normalisation is in the network. Masks are
    uint8 [1, K, side, side], where 1 is the object. The released network also takes
    `padding`, where a square holds no photo. `decode_Kshot` returns the foreground's
    `margin` and its `probability`, [1, side, side].

    Raises:
        InputError: `shots` aren't numbers from 1 on.
    """
    if not shots or min(shots) < 1:
        raise InputError("--shots: give numbers from 1 on, such as 1,5")
    model, net = in_dtype(*networks, "float32")
    roles: tuple[Role, Role] = ("support", "query")

    def encode(role: Role, **inputs: Array) -> Arrays:
        maps = features(net, weights, inputs["image"])
        padding = [inputs["padding"]] if "padding" in inputs else []
        variables = with_deep(params, weights)
        found = model.apply(variables, maps, *padding, roles=(role,), method="encode")
        return {f"{role}_{name}": array for name, array in found.items()}

    def decode(**inputs: Array) -> Arrays:
        variables = with_deep(params, deep_part(weights))
        support, query = (
            {
                name.removeprefix(f"{role}_"): x
                for name, x in inputs.items()
                if name.startswith(role)
            }
            for role in roles
        )
        given = support, inputs["masks"], query
        logits, _ = model.apply(variables, *given, method="decode")
        margin = foreground_margin(logits)
        return {"margin": margin, "probability": jax.nn.sigmoid(margin)}

    photo: Shapes = {"image": jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)}
    if model.sees_padding:
        photo["padding"] = jax.ShapeDtypeStruct((1, side, side), np.bool_)
    encoders = [Part(functools.partial(encode, role), photo) for role in roles]
    support, query = (part.outputs for part in encoders)
    parts = {f"encode_{role}": encoders[i] for i, role in enumerate(roles)}
    for k in dict.fromkeys(shots):
        masks = {"masks": jax.ShapeDtypeStruct((1, k, side, side), np.uint8)}
        stacked = {
            name: jax.ShapeDtypeStruct((1, k, *x.shape[1:]), x.dtype)
            for name, x in support.items()
        }
        parts[f"decode_{k}shot"] = Part(decode, {**stacked, **masks, **query})
    return parts


def stablehlo(part: Part, name: str) -> bytes:
    """Returns a part as `jax.export` serialises it, for all of PLATFORMS."""
    del name
    exported = jax.export.export(jax.jit(part.function), platforms=PLATFORMS)
    return bytes(exported(**part.inputs).serialize())


def onnx(part: Part, name: str) -> bytes:
    """Returns a part as an ONNX model, by jax2onnx.

    Raises:
        InputError: it has an operation that jax2onnx doesn't know.
    """
    from jax2onnx import to_onnx

    names, outputs = list(part.inputs), sorted(part.outputs)  # as a dict is flattened
    try:
        with only_defaults(True):
            model: Any = to_onnx(
                lambda *arrays: part.function(**dict(zip(names, arrays, strict=True))),
                list(part.inputs.values()),
                model_name=name,
                input_names=names,
                output_names=outputs,
            )
    except NotImplementedError as error:
        raise InputError(
            f"{name}: jax2onnx can't write an operation of this network ({error}): "
            "choose --format stablehlo"
        ) from None
    return model.SerializeToString()


def _check_packages() -> None:
    for package in ONNX_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"--format onnx needs {package}, which isn't installed: run `pip "
                'install "qpenet-jax[export]"` and `pip install --no-deps jax2onnx`'
            )
