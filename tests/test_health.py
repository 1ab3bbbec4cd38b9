"""Which heads count as dead, and when a warning says so."""

import math

import pytest

from qpenet_jax.training.health import CHANCE, HEADS, LOSSES, DeadHeads, dead_heads

ALIVE = {"loss_pre": 0.3, "loss_rev": 0.3, "loss_bg_q": 0.6, "loss_aux": 0.3}
ALIVE |= {"loss_final": 0.3, **{f"empty_{head}": 0.25 for head in HEADS}}


def test_chance_is_the_loss_of_a_head_that_answers_everywhere_the_same():
    """On a grid of answers; L_bm has its foreground term and half of the other."""
    answers = [i / 1000 for i in range(1, 1000)]
    mining = min(-math.log(p) - 0.5 * math.log(1 - p) for p in answers)
    assert CHANCE["bg"] == pytest.approx(mining, abs=1e-5)
    assert CHANCE["pre"] == CHANCE["final"] == math.log(2)


LEAN = {k: v for k, v in ALIVE.items() if "pre" not in k and "aux" not in k}
"""What a variant measures that lacks two heads."""


@pytest.mark.parametrize(
    "measured", [[ALIVE] * 5, [LEAN] * 5, [ALIVE | {"loss_pre": 1.5}] + [ALIVE] * 3]
)
def test_heads_are_alive_that_find_something_in_most_batches(measured):
    assert dead_heads(measured) == {}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_dead_if_it_never_finds_anything(head):
    empty = ALIVE | {f"empty_{head}": 1.0}
    assert dead_heads([empty] * 5) == {HEADS[head]: "has found nothing"}
    assert dead_heads([empty] * 4 + [ALIVE]) == {}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("excess", [0.0, 0.5, math.nan])
def test_a_head_is_dead_if_its_loss_is_not_below_chance(head, excess):
    lost = ALIVE | {LOSSES[head]: CHANCE[head] + excess}
    found = dead_heads([lost] * 5)
    assert list(found) == [HEADS[head]]
    assert "chance" in found[HEADS[head]]


def test_a_warning_comes_once_of_each_head_and_names_the_remedy():
    warnings, empty = DeadHeads(), ALIVE | {"empty_rev": 1.0}
    assert warnings([empty] * 199) == []
    (warning,) = warnings([empty] * 10)
    assert "y_rev has found nothing for 200 steps" in warning
    assert "--config.recipe=stable" in warning
    assert "\n" not in warning
    assert warnings([empty] * 500) == []
    (later,) = warnings([empty | {"empty_bg": 1.0}] * 200)
    assert "y_bg_q" in later
    # The count starts anew when a head finds something.
    warnings = DeadHeads()
    assert warnings([empty] * 199 + [ALIVE] + [empty] * 199) == []
    assert len(warnings([empty])) == 1
