"""What a process knows and sets up: processor, memory, compilations, libraries."""

import contextlib
import ctypes
import platform
import sys
from pathlib import Path

import jax

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import cache_folder

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def processor() -> str:
    """Returns the processor's name as Linux names it, elsewhere its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(": ")[1]
    return platform.machine()


def refuse_64_bits() -> None:
    """Refuses to compute where JAX makes numbers of 64 bits: networks here need 32.

    Raises:
        InputError: jax_enable_x64 is set; commands switch it off.
    """
    if jax.config.values["jax_enable_x64"]:
        raise InputError(
            "JAX is set to 64 bits, and qpenet_jax computes in 32: unset "
            'JAX_ENABLE_X64, or call jax.config.update("jax_enable_x64", False) first'
        )


def check_platform() -> None:
    """Refuses a choice of platforms (JAX_PLATFORMS) that JAX can't use here.

    Raises:
        InputError: with JAX's reason.
    """
    chosen = jax.config.values["jax_platforms"]
    if chosen in (None, "", "cpu"):  # there is always a CPU
        return
    try:
        jax.devices()
    except Exception as error:  # of several types, without a text where no plugin is
        reason = " ".join(str(error).split()) or "JAX is installed without it"
        raise InputError(
            f"JAX_PLATFORMS={chosen} can't be used: {reason}; set JAX_PLATFORMS=cpu, "
            "or install JAX for this device"
        ) from None


def keep_compilations() -> None:
    """Lets XLA's compilations of a second or more be found by later processes.

    A folder that the user has chosen (JAX_COMPILATION_CACHE_DIR) is kept.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = cache_folder("xla")
        jax.config.update("jax_compilation_cache_dir", str(cache))


def keep_freed_memory() -> None:
    """Lets the memory that a step has freed serve the next step, on a CPU.

    XLA allocates its temporaries anew in every step; by default each returns to the
    kernel and is zeroed and mapped again, page by page. On 2 cores a train step with
    EfficientNet-Lite0 at 321 pixels, batch 4, took 3.4 s without and 2.5 s with it. And
    a step that is dispatched before the one before has ended allocates beside it, which
    doubles the peak. C libraries other than glibc are left alone. To be called before
    JAX's first computation.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)
        mallopt(M_ARENA_MAX, 1)


def peak_memory() -> int:
    """Returns the most bytes of memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage counts the parent's memory, too
        lines = status.read_text().splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
