"""Paths and small data sets that several test files share."""

import atexit
import contextlib
import gc
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before anything imports jax; JAX_PLATFORMS=cuda on the command line overrules it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["no_proxy"] = "127.0.0.1"  # where tests start servers
# To compile takes far longer than to run what most tests run, in processes of theirs as
# well. JAX_DISABLE_MOST_OPTIMIZATIONS=0 lets all tests run the code that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What one process has compiled no other one of this run compiles again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="qpenet_jax_tests_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import cv2
import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook
from PIL import Image

# Fusion emitters take half of the time that little effort takes. Newer versions of XLA
# don't know the flag, and end the process that has it.
if (
    jax.config.values["jax_disable_most_optimizations"]
    and jax.__version_info__[:2] == (0, 10)
    and "fusion_emitters" not in os.environ.get("XLA_FLAGS", "")
):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()

# Every call in these rooms is checked against its annotations, shapes included, and JAX
# refuses to promote dtypes and ranks. What a test starts as a process runs unchecked.
CHECKED = ("backbones", "data", "evaluation", "models", "training")
install_import_hook([f"qpenet_jax.{room}" for room in CHECKED], "typecheck.checked")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# JAX makes so many objects while it traces that to look for lost ones as often as
# Python does by default is a tenth of the suite's time.
gc.set_threshold(200_000, 20, 100)

# What a shell starts in the background ignores Ctrl-C, and so does all that it starts;
# tests send Ctrl-C to processes of their own.
signal.signal(signal.SIGINT, signal.default_int_handler)

PARITY = ("torch", "torchvision", "efficientnet_lite_pytorch")
"""What tests marked `parity` compare with: the extra [parity]."""

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


COMPILED = "/jax/core/compile/backend_compile_duration"
"""The event of JAX that counts a compiled program, also one from the cache."""

compiled = 0


def count_compiled(event, duration, **_):
    global compiled
    compiled += event == COMPILED


jax.monitoring.register_event_duration_secs_listener(count_compiled)


def pytest_sessionfinish(session):
    """Hand the number of compiled programs to the process that starts the others."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["compiled"] = compiled


def pytest_testnodedown(node):
    global compiled
    compiled += getattr(node, "workeroutput", {}).get("compiled", 0)


def pytest_terminal_summary(terminalreporter):
    """Print what makes the tests slow, beside the ten slowest (`--durations=10`)."""
    terminalreporter.line(f"programs compiled in the tests' processes: {compiled}")


def pytest_runtest_setup(item):
    missing = [name for name in PARITY if importlib.util.find_spec(name) is None]
    if missing and item.get_closest_marker("parity"):
        pytest.skip(f"no {', '.join(missing)}: pip install -e .[parity]")


@pytest.fixture(autouse=True)
def _promotion(request):
    """Refuse to mix dtypes and ranks, unless the test is marked: some libraries do."""
    if request.node.get_closest_marker("standard_promotion") is None:
        yield
        return
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@contextlib.contextmanager
def stopped_after(step):
    """Let a training of this process get SIGTERM once it has logged a step.

    It saves the step after that one, and ends.
    """
    from qpenet_jax.training.events import Events

    write = Events.add_scalars

    def write_and_stop(events, group, values, number):
        write(events, group, values, number)
        if (group, number) == ("train", step):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Events, "add_scalars", write_and_stop)
        yield


def toy_protocol(**changes):
    """A protocol of three classes at 33 pixels."""
    from qpenet_jax.evaluation.protocols import Protocol

    fields = {"dataset": "toy", "split": "blocks", "fold": 1, "episodes": 6, "side": 33}
    return Protocol(**fields | {"classes": ("one", "two", "three")} | changes)


def scalars(folder, name):
    """Return the values that TensorBoard shows, by step; the later of a step's two."""
    # Here: most test files need no TensorBoard.
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@contextlib.contextmanager
def no_file_above(size):
    """Let writes beyond `size` bytes of a file fail, as all do on a full disk."""
    import resource  # Unix only

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def without_package(name):
    """Within this context a package can't be imported, as if it weren't installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        yield


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A run of random parameters (tests/untrained.py), not to be changed."""
    from untrained import untrained_run

    return untrained_run(tmp_path_factory.mktemp("untrained") / "run")


@pytest.fixture(scope="module")
def optimised_code():
    """Compile with all effort, where much is computed or the last digits matter."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def one_torch_thread():
    """PyTorch's threads wait by spinning, and take the cores from XLA's meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of tests/tiny.py, not to be changed, and what it printed."""
    from commands import passed, tiny

    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, passed(*tiny(workdir))


@pytest.fixture(scope="session")
def shared_voc() -> Path:
    """The folder with real VOC masks, on the machines that have one."""
    if not (SHARED_DATA / "voc").is_dir():
        pytest.skip(f"no real VOC data at {SHARED_DATA / 'voc'}")
    return SHARED_DATA / "voc"


@pytest.fixture(scope="session")
def write_voc() -> Callable[..., Path]:
    """A function that writes a small data set in VOC layout and returns its root."""
    return _write_voc


def _write_voc(root: Path, images: int, classes: int, seed: int = 0) -> Path:
    """Image i shows class i % classes + 1 as a rectangle; `ids.txt` lists them all."""
    rng = np.random.default_rng(seed)
    for folder in ("JPEGImages", "SegmentationClassAug"):
        (root / folder).mkdir(parents=True)
    names = [f"im_{i:03d}" for i in range(images)]
    for i, name in enumerate(names):
        height, width = rng.integers(70, 110, 2)
        coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
        pixels = cv2.resize(coarse, (int(width), int(height)))
        label = np.zeros((height, width), np.uint8)
        top, left = rng.integers(2, 20, 2)
        label[top - 1 : top + 46, left - 1 : left + 46] = 255
        label[top : top + 45, left : left + 45] = i % classes + 1
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
        save_palette(root / "SegmentationClassAug" / f"{name}.png", label)
    (root / "ids.txt").write_text("\n".join(names) + "\n")
    return root


def save_palette(path: Path, label: np.ndarray) -> None:
    """Save a label map as VOC does: mode P, colours unlike the indices."""
    image = Image.fromarray(label).convert("P")
    image.putdata(label.ravel().tolist())
    image.putpalette(
        [(37 * i + 128 * (j == 0)) % 256 for i in range(256) for j in range(3)]
    )
    image.save(path)
