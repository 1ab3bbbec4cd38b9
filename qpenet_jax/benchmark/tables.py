"""What `speed.benchmark` measured as Markdown and as a bar chart."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from qpenet_jax.benchmark import data
from qpenet_jax.benchmark.measure import TWIN_VARIANTS
from qpenet_jax.evaluation.pictures import INK, PAPER, PREDICTION, SUPPORT, Colour

# --- Markdown ---------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """Return what `benchmark` measured as Markdown tables."""
    facts = result["facts"]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    threads = facts.get("torch_threads")
    lines = []
    if result["cases"]:  # The others tell what theirs are.
        lines.append(
            f"{facts['backbone']}, {facts['size']} x {facts['size']} pixels, weights "
            f"{facts['weights']}, seed {facts['seed']}, dropout {facts['dropout']}."
        )
    lines += [
        f"{facts['device']} ({facts['platform']}); {facts['cpu']}, {facts['cores']} "
        f"cores{f', {threads} threads of PyTorch' if threads else ''}; Python "
        f"{facts['python']}, {versions}; {facts['date']}.",
        "",
    ]
    if result["cases"]:
        lines += _speed(result)
    if any("processes" in case for case in result["cases"]):
        lines += _processes(result)
    if "protocol" in result:
        lines += _protocol(result)
    if "data" in result:
        lines += [data.markdown(result["data"])]
    return "\n".join(lines).rstrip()


def _speed(result: dict[str, Any]) -> list[str]:
    peaks = "; ".join(
        f"{dtype} "
        + ", ".join(f"{side} {rate / 1e9:,.0f} GFLOP/s" for side, rate in rates.items())
        for dtype, rates in result["peak_flops"].items()
    )
    rows = [_speed_row(case, result["peak_flops"]) for case in result["cases"]]
    tried = [
        f"- {case['name']}: "
        + "; ".join(
            f"{TWIN_VARIANTS[v]} {_time(t)}" for v, t in case["variants"].items()
        )
        for case in result["cases"]
        if "variants" in case
    ]
    return [
        "Medians of rounds in which the sides take turns on the same weights and "
        "inputs, their outputs found equal first; in brackets the quartiles of the "
        "rounds' ratios. GFLOP are those of plain convolutions and products and of "
        "attention to all keys (what is saved shows as speed); the peak is that of a "
        f"large matrix product ({peaks}; the largest counts).",
        "",
        *data.table(
            "step | JAX | PyTorch | its variant | JAX / PyTorch | GFLOP | GFLOP/s | "
            "share of peak",
            rows,
        ),
        "",
        *(["The twin's variants:", "", *tried, ""] if tried else []),
    ]


def _speed_row(case: dict[str, Any], peaks: dict[str, dict[str, float]]) -> str:
    median = case["seconds"][1]
    rate, peak = case["flop"] / median, max(peaks[case["dtype"]].values())
    theirs = "not measured | |"
    if "ratio" in case:
        low, ratio, high = case["ratio"]
        theirs = (
            f"{_time(case['torch_seconds'][1])} | {TWIN_VARIANTS[case['variant']]} | "
            f"{ratio:.2f} ({low:.2f}-{high:.2f})"
        )
    return (
        f"{case['name']} | {_time(median)} | {theirs} | {case['flop'] / 1e9:,.1f} | "
        f"{rate / 1e9:,.0f} | {rate / peak:.0%}"
    )


def _processes(result: dict[str, Any]) -> list[str]:
    rows = [_process_row(case) for case in result["cases"] if "processes" in case]
    return [
        "From the start of a fresh process to the end of its first step, with an empty "
        "compilation cache and with a filled one; peak memory of three steps, and in "
        "brackets what the imports took, which the ratio leaves out.",
        "",
        *data.table(
            "step | cold | cached | PyTorch | memory, cold | cached | PyTorch | "
            "cached / PyTorch",
            rows,
        ),
        "",
    ]


def _process_row(case: dict[str, Any]) -> str:
    children = [case["processes"].get(k) for k in ("cold", "cached", "torch")]
    starts = (f"{child['start_s']:.1f} s" if child else "" for child in children)
    ratio = case["processes"].get("memory_ratio")
    return " | ".join(
        [
            case["name"],
            *starts,
            *map(_memory, children),
            f"{ratio:.2f}" if ratio else "",
        ]
    )


def _memory(child: dict[str, float] | None) -> str:
    if child is None:
        return ""
    peak, imports = (child[k] / 2**20 for k in ("peak_bytes", "import_bytes"))
    return f"{peak:,.0f} MiB ({imports:,.0f})"


def _protocol(result: dict[str, Any]) -> list[str]:
    rows = [
        f"{run['shots']} | {run['episodes']} x {run['seeds']} | "
        f"{_time(run['seconds_per_episode'])} | {_time(run['step_seconds'])} | "
        f"{run['ratio']:.2f}"
        for run in result["protocol"]
    ]
    return [
        "An episode of an evaluation, all included, beside the eval step of an "
        "episode from its images; means.",
        "",
        *data.table("shots | episodes x seeds | an episode | eval step | ratio", rows),
        "",
        *(f"{run['network']}; {run['protocol']}  " for run in result["protocol"]),
        "",
    ]


def _time(seconds: float | str) -> str:
    if isinstance(seconds, str):
        return seconds  # why there is none
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


# --- bar chart --------------------------------------------------------------------

BAR, GAP, MARGIN, LENGTH = 22, 14, 16, 420


class Bar(NamedTuple):
    """A bar of so many seconds, with its value in words."""

    seconds: float
    text: str
    colour: Colour


def chart(result: dict[str, Any], path: str | Path) -> None:
    """Draw the seconds of every step as bars and save them as an image.

    Every kind of step has a scale of its own, from 0. Raises ValueError if no step was
    measured.
    """
    groups = {
        what: list(cases)
        for what, cases in itertools.groupby(result["cases"], lambda case: case["what"])
    }
    if not groups:
        raise ValueError("no step was measured: nothing to draw")
    facts = result["facts"]
    title = (
        f"{facts['backbone']}, {facts['size']} pixels: time of a step, less is better"
    )
    subtitle = f"{facts['device']}, {facts['cpu']}, {facts['cores']} cores"
    page = Image.new("RGB", _page_size(groups, title, subtitle), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, font=_font(20))
    draw.text((MARGIN, MARGIN + 28), subtitle, INK, font=_font(15))
    compared = any("ratio" in case for case in result["cases"])
    _legend(draw, MARGIN + 54, compared)
    top = MARGIN + 90
    left = 2 * MARGIN + _labels_width(groups)
    for cases in groups.values():
        longest = max(bar.seconds for case in cases for bar in _bars(case))
        for case in cases:
            top = _draw_case(draw, case, (left, top), longest)
        top += GAP
    page.save(path)


def _bars(case: dict[str, Any]) -> list[Bar]:
    ours = case["seconds"][1]
    if "ratio" not in case:
        return [Bar(ours, _time(ours), PREDICTION)]
    theirs, ratio = case["torch_seconds"][1], case["ratio"][1]
    return [
        Bar(ours, f"{_time(ours)} ({ratio:.2f} of PyTorch's)", PREDICTION),
        Bar(theirs, f"{_time(theirs)} ({TWIN_VARIANTS[case['variant']]})", SUPPORT),
    ]


def _draw_case(
    draw: ImageDraw.ImageDraw,
    case: dict[str, Any],
    corner: tuple[int, int],
    longest: float,
) -> int:
    """Draw a case's label and bars; return the top of the next."""
    (left, top), bars = corner, _bars(case)
    middle = top + BAR * len(bars) // 2
    draw.text((left - MARGIN, middle), case["name"], INK, font=_font(16), anchor="rm")
    for bar in bars:
        right = left + max(1, round(LENGTH * bar.seconds / longest))
        draw.rectangle((left, top + 1, right, top + BAR - 2), fill=bar.colour)
        position = right + 8, top + BAR // 2
        draw.text(position, bar.text, INK, font=_font(15), anchor="lm")
        top += BAR
    draw.line((left, top - BAR * len(bars), left, top), INK, 2)
    return top + GAP


def _legend(draw: ImageDraw.ImageDraw, top: int, compared: bool) -> None:
    left = MARGIN
    names = {"qpenet_jax": PREDICTION} | ({"PyTorch twin": SUPPORT} if compared else {})
    for name, colour in names.items():
        draw.rectangle((left, top + 3, left + 14, top + 17), fill=colour)
        draw.text((left + 22, top), name, INK, font=_font(16))
        left += 160


def _page_size(
    groups: dict[str, list[dict[str, Any]]], title: str, subtitle: str
) -> tuple[int, int]:
    """Return width and height that hold all words."""
    cases = [case for group in groups.values() for case in group]
    bars = [bar for case in cases for bar in _bars(case)]
    values = max(_font(15).getlength(bar.text) for bar in bars)
    width = 3 * MARGIN + _labels_width(groups) + LENGTH + values + 8
    words = max(_font(20).getlength(title), _font(15).getlength(subtitle)) + 2 * MARGIN
    height = MARGIN + 90 + BAR * len(bars) + GAP * (len(cases) + len(groups)) + MARGIN
    return round(max(width, words)), height


def _labels_width(groups: dict[str, list[dict[str, Any]]]) -> int:
    names = (case["name"] for group in groups.values() for case in group)
    return round(max(_font(16).getlength(name) for name in names))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
