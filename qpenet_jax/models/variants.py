"""The rows of the paper's Tables III to V as networks; their scores are in `paper`.

A row of your own can be added from outside: docs/examples/add_variant.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qpenet_jax.models.qpenet import QPENet


class Variant(NamedTuple):
    """One row: QPENet's fields, and the choice made where the paper leaves it open.

    `network` is QPENet, or a subclass where a row needs other code and not only fields.
    """

    fields: Mapping[str, Any]
    choice: str
    network: type[QPENet] = QPENet


VARIANTS: dict[str, Variant] = {
    "baseline": Variant(
        {"fgpe": False, "bgpe": False, "decoder": "fem", "prototypes": ("pre",)},
        "The wiring of FEM with two prototypes is not given: P_global is filtered out "
        "on every grid before P_pre is merged (NERTNet's order). The background "
        "predictions and their loss stay, or nothing would teach P_global; PFENet's "
        "prior mask is left out, as it needs layer4 and no other row has it.",
    ),
    "fgpe": Variant(
        {"bgpe": False, "decoder": "fem"},
        "How FEM takes three prototypes is not given: P_pre is broadcast, P_main and "
        "P_aux are activation maps, as in eq 15, brought to every grid.",
    ),
    "fgpe_bgpe": Variant(
        {"decoder": "fem"},
        "P_bg of eq 11 takes the place of P_global in FEM; the rest as in `fgpe`.",
    ),
    "fgpe_ffa": Variant(
        {"bgpe": False},
        "Eq 12 filters by P_global; its background predictions and loss stay.",
    ),
    "full": Variant(
        {},
        "The network of Fig. 2.",
    ),
    "pre": Variant(
        {"prototypes": ("pre",)},
        "Not said if the unused prototypes are still made: they are, with the losses "
        "of y_pre and y_rev; eq 15 has fewer channels instead of zeros.",
    ),
    "main": Variant(
        {"prototypes": ("main",)},
        "P_main alone could be broadcast as P_pre is: it stays an activation map, so "
        "that rows differ in nothing but what they leave out.",
    ),
    "aux": Variant(
        {"prototypes": ("aux",)},
        "An activation map, as in `main`.",
    ),
    "main_aux": Variant(
        {"prototypes": ("main", "aux")},
        "Activation maps, as in `main`.",
    ),
    "without_maps": Variant(
        {"activation_maps": False},
        "The prototypes are said to join the query features directly: here in eq 15, "
        "whose F_q is filtered by eq 12, in the order P_pre, P_main, P_aux.",
    ),
    "sgm": Variant(
        {"sgm": True},
        "How much of SCL's module enters is not said: only eq 4's guide, P_pre (the "
        "mean of K) for P_psd. PPG and its loss stay, so the parameters are the same.",
    ),
}
