"""What PPG, DPE and GBC found in a query, as the tiles of `qpenet figures` show it.

Everything is drawn on what the network saw: its square, without the padding.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from qpenet_jax.data.supports import fit_support
from qpenet_jax.data.transforms import content_size, fit
from qpenet_jax.demo.marks import SupportPhoto
from qpenet_jax.demo.photos import RGB, Picture
from qpenet_jax.evaluation.pictures import PREDICTION, overlay, tile
from qpenet_jax.models.prototypes import foreground_margin
from qpenet_jax.paper.sheets import AUX, BACKGROUND, MAIN, at_input_size, heat_tile


def intermediate_pictures(
    query: RGB,
    supports: Sequence[SupportPhoto],
    out: Mapping[str, Any],
    side: int,
) -> list[Picture]:
    """Returns pictures of what a network's parts found in a query.

    `out` is what `Task.intermediates` returns; what a variant lacks is left
    out. `side` is that of the network's input.
    """
    tiles = [*_of_query(query, out, side), *_of_supports(supports, out, side)]
    return [Picture(np.asarray(drawn), caption) for drawn, caption in tiles]


def _of_query(query, out, side) -> Iterator[tuple[Image.Image, str]]:
    height, width = query.shape[:2]
    rows, columns = content_size(height, width, side)
    seen = fit(query, side)[:rows, :columns]

    def shown(logits, colour):
        found = _margin(logits)[:rows, :columns] > 0
        return tile(overlay(seen, found.astype(np.uint8), colour))

    if "y_pre" in out:
        yield (
            shown(out["y_pre"], PREDICTION),
            "PPG. What the marked object's prototype P_pre finds (y_pre); its mean is "
            "P_psd",
        )
    for map_name, colour, part in (("A_main", MAIN, "main"), ("A_aux", AUX, "aux")):
        if map_name in out:
            cosine = at_input_size(out[map_name])[:rows, :columns]
            yield (
                heat_tile(seen, cosine, colour),
                f"DPE. How similar each place is to P_{part} ({map_name})",
            )
    if "y_bg_q" in out:
        yield (
            shown(out["y_bg_q"], BACKGROUND),
            "GBC. What P_global takes for background (y_bg_q)",
        )


def _of_supports(supports, out, side) -> Iterator[tuple[Image.Image, str]]:
    if "y_rev" not in out:
        return
    for support, logits in zip(supports, out["y_rev"], strict=True):
        seen, mask, beside = fit_support(support.pixels, support.mask, side)
        main, aux = _regions(mask, _margin(logits) > 0)
        picture = overlay(overlay(seen, main, MAIN), aux, AUX)
        share = main.sum() / max(main.sum() + aux.sum(), 1)
        yield (
            tile(picture[~beside.all(1)][:, ~beside.all(0)]),
            f"DPE. {support.name}: {100 * share:.0f} % of the object is found by P_psd "
            "(main), the rest is aux",
        )


def _regions(
    mask: UInt8[np.ndarray, "s s"], found: Bool[np.ndarray, "s s"]
) -> tuple[UInt8[np.ndarray, "s s"], UInt8[np.ndarray, "s s"]]:
    """Returns main and auxiliary region of a support (eqs 5 and 6)."""
    inside = mask == 1
    return (inside & found).astype(np.uint8), (inside & ~found).astype(np.uint8)


def _margin(logits):
    return at_input_size(np.asarray(foreground_margin(logits)))
