"""What `speed.benchmark` measured as Markdown."""

from collections.abc import Sequence
from typing import Any

from qpenet_jax.benchmark.loading_speed import BATCH, ROUND
from qpenet_jax.benchmark.prediction_speed import prediction_report
from qpenet_jax.benchmark.runtimes import runtimes_report
from qpenet_jax.benchmark.settings import TWIN_VARIANTS
from qpenet_jax.core.markdown import table
from qpenet_jax.evaluation.scoring import CACHE_BYTES

NONE = "-"
"""In a cell of what wasn't measured."""


def benchmark_report(result: dict[str, Any]) -> str:
    """Returns what `benchmark` measured as Markdown: what, where, and the tables."""
    cases = result["cases"]
    plans = result.get("memory", [])
    # The others name their network.
    ran = result.get("runtimes", [])
    parts = [_network(result["facts"], cases)] if cases or plans or ran else []
    parts.append(_machine(result["facts"]))
    if cases:
        parts += _speed(result)
    if any("processes" in case for case in cases):
        parts += _processes(cases)
    if plans:
        parts += _memory_plans(plans)
    if ran:
        parts.append(runtimes_report(ran))
    if "protocol" in result:
        parts += _protocol(result["protocol"])
    if "predict" in result:
        parts.append(prediction_report(result["predict"]))
    if "data" in result:
        parts.append(loading_report(result["data"]))
    return "\n\n".join(parts)


def _network(facts: dict[str, Any], cases: Sequence[dict[str, Any]]) -> str:
    dropout = f", dropout {facts['dropout']}" if cases else ""
    return (
        f"{facts['backbone']}, {facts['size']} x {facts['size']} pixels, weights: "
        f"{facts['weights']}, seed {facts['seed']}{dropout}."
    )


def _machine(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    threads = facts.get("torch_threads")
    return (
        f"{facts['device']} ({facts['platform']}); {facts['cpu']}, {facts['cores']} "
        f"cores{f', PyTorch with {threads} threads' if threads else ''}; Python "
        f"{facts['python']}, {versions}; {facts['date']}."
    )


# --- single steps -----------------------------------------------------------------


def _speed(result: dict[str, Any]) -> list[str]:
    peaks = result["peak_flops"]
    header = (
        "step",
        "JAX",
        "PyTorch",
        "variant of PyTorch",
        "JAX / PyTorch",
        "GFLOP",
        "GFLOP/s",
        "share of peak",
    )
    rows = [_speed_row(case, peaks) for case in result["cases"]]
    variants = [_variants(case) for case in result["cases"] if "variants" in case]
    parts = [_speed_caption(peaks), table(header, rows, numbers=True)]
    if variants:
        parts += ["All variants of PyTorch:", "\n".join(variants)]
    return parts


def _speed_caption(peaks: dict[str, dict[str, float]]) -> str:
    rates = "; ".join(
        f"{dtype}: "
        + ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in found.items())
        for dtype, found in peaks.items()
    )
    return (
        "Time of one step, the median of several rounds. JAX and PyTorch take turns in "
        "one process, with the same weights and inputs, after their results were found "
        "equal. JAX / PyTorch is the median of the ratios of the rounds, with their "
        "first and third quartiles in brackets; below 1 JAX is faster. GFLOP counts "
        "plain convolutions and matrix products, and attention to all positions, "
        "whatever the step computes: a faster algorithm shows as more GFLOP/s. The "
        f"peak is the speed of one large matrix product ({rates}; the larger value is "
        "taken)."
    )


def _speed_row(case: dict[str, Any], peaks: dict[str, dict[str, float]]) -> list[str]:
    median = case["seconds"][1]
    rate, peak = case["flop"] / median, max(peaks[case["dtype"]].values())
    theirs = [NONE, NONE, NONE]
    if "ratio" in case:
        low, ratio, high = case["ratio"]
        theirs = [
            duration(case["torch_seconds"][1]),
            TWIN_VARIANTS[case["variant"]],
            f"{ratio:.2f} ({low:.2f}-{high:.2f})",
        ]
    work = [f"{case['flop'] / 1e9:,.1f}", f"{rate / 1e9:,.0f}", f"{rate / peak:.0%}"]
    return [case["name"], duration(median), *theirs, *work]


def _variants(case: dict[str, Any]) -> str:
    found = (f"{TWIN_VARIANTS[v]} {duration(t)}" for v, t in case["variants"].items())
    return f"- {case['name']}: {'; '.join(found)}"


# --- new processes ----------------------------------------------------------------


def _processes(cases: Sequence[dict[str, Any]]) -> list[str]:
    caption = (
        "In a new process: the time from its start to the end of its first step, and "
        "its peak memory after three steps. JAX runs twice: the first time it compiles "
        "everything, the second time it finds the compilations in its cache. The "
        "memory in brackets is what importing the libraries takes; the ratio is "
        "without it, with the cache."
    )
    header = (
        "step",
        "start, JAX",
        "JAX, cached",
        "PyTorch",
        "memory, JAX",
        "JAX, cached",
        "PyTorch",
        "JAX / PyTorch",
    )
    rows = [_process_row(case) for case in cases if "processes" in case]
    return [caption, table(header, rows, numbers=True)]


def _process_row(case: dict[str, Any]) -> list[str]:
    found = case["processes"]
    children = [found.get(kind) for kind in ("cold", "cached", "torch")]
    starts = (f"{child['start_s']:.1f} s" if child else NONE for child in children)
    ratio = f"{found['memory_ratio']:.2f}" if "memory_ratio" in found else NONE
    return [case["name"], *starts, *map(_memory, children), ratio]


def _memory(child: dict[str, float] | None) -> str:
    if child is None:
        return NONE
    peak, imports = (child[k] / 2**20 for k in ("peak_bytes", "import_bytes"))
    return f"{peak:,.0f} MiB ({imports:,.0f})"


# --- memory, before anything is run ---------------------------------------------


PLATFORMS = {"cpu": "CPU", "cuda": "NVIDIA GPU", "rocm": "AMD GPU", "tpu": "TPU"}


def _memory_plans(plans: Sequence[dict[str, Any]]) -> list[str]:
    platforms = list(plans[0]["plans"])
    names = [PLATFORMS.get(name, name) for name in platforms]
    caption = (
        "Memory of one step in GiB, as XLA plans it, with dropout; nothing was run. "
        "Temporaries, and with them the weights, the optimiser's state and the batch. "
        f"An evaluation keeps encoded images as well, up to {CACHE_BYTES / 2**30:g} "
        "GiB."
    )
    if len(platforms) > 1:
        caption += (
            f" The plan for {names[1]} is an estimate: it is XLA's CPU compiler's, of "
            "the formulations that GPUs and TPUs take. A GPU's compiler merges more of "
            "them; CUDA itself, and the workspace of cuDNN's convolutions, come on top."
        )
    header = ["step"]
    for name in names:
        header += [f"{name}: temporaries", "in all"]
    rows = []
    for plan in plans:
        row = [plan["name"]]
        for found in plan["plans"].values():
            each = found["temporaries"], found["temporaries"] + found["inputs"]
            row += [f"{size / 2**30:.2f}" for size in each]
        rows.append(row)
    return [caption, table(header, rows, numbers=True)]


# --- a whole evaluation -----------------------------------------------------------


def _protocol(runs: Sequence[dict[str, Any]]) -> list[str]:
    caption = (
        "A whole evaluation, with loading and scoring: its time for each episode, "
        "beside the time in which the same network predicts one episode from its "
        "images (means). An evaluation encodes every image once, however many episodes "
        "show it."
    )
    header = (
        "shots",
        "dtype",
        "episodes x seeds",
        "evaluation, per episode",
        "one prediction",
        "ratio",
    )
    rows = [
        [
            str(run["shots"]),
            run["dtype"],
            f"{run['episodes']} x {run['seeds']}",
            duration(run["seconds_per_episode"]),
            duration(run["step_seconds"]),
            f"{run['ratio']:.2f}",
        ]
        for run in runs
    ]
    networks = "\n".join(f"- {run['network']}; {run['protocol']}" for run in runs)
    return [caption, table(header, rows, numbers=True), networks]


# --- loading ----------------------------------------------------------------------


def loading_report(result: dict[str, Any]) -> str:
    """Returns what `benchmark_data` measured as Markdown."""
    return "\n\n".join(
        [
            f"Training episodes at {result['side']} pixels from {result['data']}, "
            f"{result['images']} images.",
            f"{result['machine']}.",
            "On one core, in this process (cv2.setNumThreads(0), freed memory is kept)."
            " A plain float32 pipeline with OpenCV makes the same episodes, in turns "
            f"with ours; medians of rounds of {ROUND} episodes, and the quartiles of "
            "the ratio in brackets. The last two columns are what is left to the host "
            "where the device augments, from images that are already decoded.",
            _one_core(result["one_core"]),
            f"Batches of {BATCH} episodes from Grain (cv2.setNumThreads(0)).",
            _grain(result["grain"]),
            "Milliseconds for each image on one core, in episodes of "
            f"{result['one_core'][0]['shots']} shot(s). Ours isn't normalised here: "
            "the device gets uint8 and does it.",
            _stages(result["stages"]),
        ]
    )


def _one_core(rows: Sequence[dict[str, Any]]) -> str:
    header = (
        "shots",
        "episodes/s",
        "images/s",
        "plain: episodes/s",
        "images/s",
        "ours / plain",
        "device augments: episodes/s",
        "images/s",
    )
    return table(header, map(_one_core_row, rows), numbers=True)


def _one_core_row(row: dict[str, Any]) -> list[str]:
    images, (low, high) = row["shots"] + 1, row["ratio_quartiles"]
    rates = ("episodes_per_s", "plain_episodes_per_s", "raw_episodes_per_s")
    ours, plain, raw = ([f"{row[r]:.1f}", f"{row[r] * images:.0f}"] for r in rates)
    ratio = f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"
    return [str(row["shots"]), *ours, *plain, ratio, *raw]


def _grain(rows: Sequence[dict[str, Any]]) -> str:
    header = (
        "augments",
        "shots",
        "workers",
        "episodes/s",
        "images/s",
        "images/s per worker",
    )
    return table(header, map(_grain_row, rows), numbers=True)


def _grain_row(row: dict[str, Any]) -> list[str]:
    workers, rate = row["workers"], row["episodes_per_s"]
    images = rate * (row["shots"] + 1)
    return [
        row["augmenting"],
        str(row["shots"]),
        f"{workers or '0 (a thread)'}",
        f"{rate:.1f}",
        f"{images:.0f}",
        f"{images / max(workers, 1):.0f}",
    ]


def _stages(stages: dict[str, list[float]]) -> str:
    all_ours, all_plain = stages["all"]
    rows = (
        [name, f"{a:.3f}", f"{a / all_ours:.0%}", f"{b:.3f}", f"{b / all_plain:.0%}"]
        for name, (a, b) in stages.items()
    )
    header = "stage", "ours: ms", "share", "plain: ms", "share"
    return table(header, rows, numbers=True)


def duration(seconds: float | str) -> str:
    """Returns seconds for readers; words, which tell why there are none, as they are."""
    if isinstance(seconds, str):
        return seconds
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
