"""What PPG, DPE and GBC found in a query, as the tiles of `qpenet figures` show it.

Everything is drawn on what the network saw: its square, without the padding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from qpenet_jax.data.supports import fit_support
from qpenet_jax.data.transforms import content_size, fit
from qpenet_jax.demo.photos import Picture, SupportPhoto
from qpenet_jax.evaluation.pictures import PREDICTION, RGB, overlay, tile
from qpenet_jax.models.prototypes import foreground_margin
from qpenet_jax.paper.sheets import AUX, BACKGROUND, MAIN, at_input_size, heat_tile

PRE = "PPG. What the marked object's prototype P_pre finds (y_pre); its mean is P_psd"
SIMILAR = "DPE. How similar each place is to P_{0} (A_{0})"
GLOBAL = "GBC. What P_global takes for background (y_bg_q)"


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
    height, width = query.shape[:2]
    rows, columns = content_size(height, width, side)
    seen = fit(query, side)[:rows, :columns]

    def found(logits, colour):
        where = _found(logits)[:rows, :columns].astype(np.uint8)
        return tile(overlay(seen, where, colour))

    def similar(cosine, colour):
        return heat_tile(seen, at_input_size(cosine)[:rows, :columns], colour)

    drawings = {
        "y_pre": (found, PREDICTION, PRE),
        "A_main": (similar, MAIN, SIMILAR.format("main")),
        "A_aux": (similar, AUX, SIMILAR.format("aux")),
        "y_bg_q": (found, BACKGROUND, GLOBAL),
    }
    tiles = [
        (draw(out[name], colour), caption)
        for name, (draw, colour, caption) in drawings.items()
        if name in out
    ]
    tiles += [
        _of_support(support, logits, side)
        for support, logits in zip(supports, out.get("y_rev", ()), strict=False)
    ]
    return [Picture(np.asarray(drawn), caption) for drawn, caption in tiles]


def _of_support(
    support: SupportPhoto, logits: Any, side: int
) -> tuple[Image.Image, str]:
    """Returns the main and the auxiliary region of a support (eqs 5 and 6)."""
    seen, mask, beside = fit_support(support.pixels, support.mask, side)
    inside, found = mask == 1, _found(logits)
    picture = overlay(seen, (inside & found).astype(np.uint8), MAIN)
    picture = overlay(picture, (inside & ~found).astype(np.uint8), AUX)
    share = (inside & found).sum() / max(inside.sum(), 1)
    caption = (
        f"DPE. {support.name}: {100 * share:.0f} % of the object is found by P_psd "
        "(main), the rest is aux"
    )
    return tile(picture[~beside.all(1)][:, ~beside.all(0)]), caption


def _found(logits: Any) -> Bool[np.ndarray, "s s"]:
    """Returns where logits on the feature grid are foreground, at the input's size."""
    return at_input_size(np.asarray(foreground_margin(logits))) > 0
