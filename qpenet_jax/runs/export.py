"""A run's network as files for other run times: StableHLO by JAX, and ONNX."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.files import local_path, new_folder, write_whole
from qpenet_jax.evaluation.report import write_json
from qpenet_jax.models.ops.devices import default_formulations
from qpenet_jax.runs.build import identity
from qpenet_jax.runs.folder import open_run
from qpenet_jax.runs.parts import Part, Shapes, parts_of

ABOUT = "export.json"

PLATFORMS = ("cpu", "cuda", "tpu")

ONNX_PACKAGES = ("onnx", "jax2onnx")


def export(
    workdir: str | Path,
    out: str | Path,
    *,
    format: str,
    shots: Sequence[int] = (1,),
    overrides: Sequence[str] = (),
) -> Path:
    """Writes a run's network into a folder and returns it (docs/export.md).

    `format` is one of FORMATS. The folder holds a file for each part (`runs/parts.py`),
    the weights in them, and `export.json`, which tells their inputs and outputs.
    Nothing is left behind if anything fails.

    Raises:
        InputError: as `open_run` and `parts_of`; `out` exists and isn't empty; a
            package is missing, or ONNX has no such operation.
    """
    check_choice("--format ", format, FORMATS)
    if format == "onnx":
        _check_packages()
    with new_folder(local_path(out)) as made:
        run, told = open_run(local_path(workdir), overrides), {}
        for name, part in parts_of(run, shots).items():
            file = f"{name}.{format}"
            write_whole(made / file, FORMATS[format](part, name))
            told[name] = {
                "file": file,
                "inputs": _told(part.inputs),
                "outputs": _told(part.outputs),
            }
        about = {
            "format": format,
            "made_by": f"qpenet_jax {importlib.metadata.version('qpenet-jax')}",
            "run": identity(run.config)[:12],
            "step": run.step,
            "side": run.config.side,
            "shots": list(dict.fromkeys(shots)),
            "image": "uint8 RGB, 0 to 255: normalisation is part of the network",
            "masks": "uint8: 1 is the object, 0 is not, 255 is padding or ignored",
            "platforms": list(PLATFORMS) if format == "stablehlo" else "any",
            "parts": told,
        }
        write_json(made / ABOUT, about)
    return local_path(out)


def _told(shapes: Shapes) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(x.shape), "dtype": str(x.dtype)}
        for name, x in shapes.items()
    ]


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
        with default_formulations():
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


FORMATS: dict[str, Callable[[Part, str], bytes]] = {
    "stablehlo": stablehlo,
    "onnx": onnx,
}


def _check_packages() -> None:
    for package in ONNX_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"--format onnx needs {package}, which isn't installed: run `pip "
                'install "qpenet-jax[export]"` and `pip install --no-deps jax2onnx`'
            )
