"""Every row of Tables III to V against numpy, and what each row must not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_qpenet import (
    FEATURES,
    broadcast,
    cosine,
    count,
    cross,
    draw_params,
    head,
    pool,
    relu,
    residual,
    segment,
)
from test_training import BACKBONE

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Episode
from qpenet_jax.models import fem as fem_module
from qpenet_jax.models import qpenet
from qpenet_jax.models.fem import adaptive_average_pool, prior_mask
from qpenet_jax.models.losses import LossWeights, total_loss
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.variants import VARIANTS
from qpenet_jax.optimizer import Optimizer
from qpenet_jax.paper.results import ABLATION_RESULTS, rows_of
from qpenet_jax.training.step import init_state, make_train_step

HEIGHT, WIDTH = 33, 49
GRID = (5, 7)  # halves to 3 x 4, 2 x 2 and 1 x 1
SMALL = {"channels": 8, "heads": 2, "ffn_features": 12}
NO_DROPOUT = {f"{name}_dropout": 0.0 for name in ("channel", "head", "gate")}


# VARIANTS and PFENet's prior, which no row has, in either decoder.
CASES = {name: dict(variant.fields) for name, variant in VARIANTS.items()}
CASES["baseline_prior"] = CASES["baseline"] | {"prior": True}
CASES["full_prior"] = {"prior": True}


KINDS = ("baseline", "fgpe_bgpe", "fgpe_ffa", "main", "without_maps", "sgm")
"""Every kind of row; the others differ in numbers of channels alone."""

rows = pytest.mark.parametrize(
    "name",
    [
        name if name in KINDS else pytest.param(name, marks=pytest.mark.slow)
        for name in VARIANTS
    ],
)


def build(name, **fields):
    return QPENet(**SMALL, **CASES[name], **fields)


def draw_episodes(shots, batch=3, seed=1):
    """Return support features, support masks, query features; the last mask empty."""
    rng = np.random.default_rng(seed)
    support = rng.normal(size=(batch, shots, *GRID, FEATURES)).astype(np.float32)
    query = rng.normal(size=(batch, *GRID, FEATURES)).astype(np.float32)
    masks = rng.choice([0, 1, 1, 255], (batch, shots, HEIGHT, WIDTH)).astype(np.int32)
    masks[-1] = np.where(masks[-1] == 1, 0, masks[-1])
    return support, masks, query


@functools.cache
def random_params(name):
    return draw_params(build(name))


@functools.cache
def evaluator(name):
    """Jitted `(params, support, masks, query) -> logits, out`."""
    return jax.jit(
        lambda params, *episode: build(name).apply({"params": params}, *episode)
    )


@functools.cache
def trained(name):
    """Return (loss, terms, logits, out, its gradients, gradients of loss_final).

    Five shots in training mode, with every dropout rate 0.
    """
    model = build(name, attention_dropout=0.0, **NO_DROPOUT)
    support, masks, query = draw_episodes(5)

    def loss(params, weights):
        rngs = {"dropout": jax.random.key(0)}
        logits, out = model.apply(
            {"params": params}, support, masks, query, train=True, rngs=rngs
        )
        value, terms = total_loss(out, masks[:, 0], masks, LossWeights(**weights))
        return value, (terms, logits, out)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    every = dict.fromkeys(("pre", "rev", "final", "aux", "inner", "beta"), 1.0)
    only_final = dict.fromkeys(every, 0.0) | {"final": 1.0}
    params = random_params(name)
    (value, (terms, logits, out)), gradients = run(params, every)
    return value, terms, logits, out, gradients, run(params, only_final)[1]


# Numpy, float64, one episode at a time: specifications, not the code's operations.


def resize(x, size):
    """Resize linearly with the corners aligned, axis by axis."""
    for axis, target in enumerate(size):
        points = np.linspace(0, x.shape[axis] - 1, target)
        x = np.apply_along_axis(
            lambda line, at=points: np.interp(at, np.arange(len(line)), line), axis, x
        )
    return x


def windows(source, target):
    """Return the first and last index of each window of adaptive pooling."""
    return [
        slice(
            int(np.floor(r * source / target)), int(np.ceil((r + 1) * source / target))
        )
        for r in range(target)
    ]


def adaptive_pool(x, size):
    rows, cols = windows(x.shape[0], size[0]), windows(x.shape[1], size[1])
    return np.array([[x[r, c].mean((0, 1)) for c in cols] for r in rows])


def join(*features):
    return np.concatenate(features, axis=-1)


def prior_of(support, M_s, query):
    """S1.6 cell by cell: the best cosine with a foreground cell, stretched to 0..1."""
    priors = []
    for features, mask in zip(support, M_s, strict=True):
        tokens = (features * mask[..., None]).reshape(-1, FEATURES)
        best = np.zeros(GRID)
        for i, j in np.ndindex(*GRID):
            q = query[i, j]
            lengths = np.linalg.norm(tokens, axis=1) * np.linalg.norm(q)
            best[i, j] = (tokens @ q / (lengths + 1e-7)).max()
        priors.append((best - best.min()) / (best.max() - best.min() + 1e-7))
    return np.mean(priors, axis=0)


def fem(F_q, P_bg, vectors, maps, p):
    """PFENet's decoder with the background filtered out on every grid."""
    levels, inner = [], []
    for i, grid in enumerate([GRID, (3, 4), (2, 2), (1, 1)]):
        pooled = adaptive_pool(F_q, grid)
        e = relu(broadcast(pooled, P_bg) @ p[f"filter{i}"]["kernel"])
        m = join(e, *(resize(A[..., None], grid) for A in maps))
        for P in vectors:
            m = broadcast(m, P)
        m = relu(m @ p[f"merge{i}"]["kernel"])
        if i:
            finer = resize(levels[-1], grid)
            m = m + relu(join(m, finer) @ p[f"finer{i}"]["kernel"])
        m = residual(m, p[f"residual{i}"])
        inner.append(head(m, p[f"inner_head{i}"]))
        levels.append(resize(m, GRID))
    u = relu(join(*levels) @ p["reduce"]["kernel"])
    return {
        "y_inner": inner,
        "y_final": head(residual(u, p["reduce_residual"]), p["head"]),
    }


def ffa(F_q, F_s, M_s, P_bg, vectors, maps, p):
    x = join(
        relu(broadcast(F_q, P_bg) @ p["filter"]["kernel"]),
        *(A[..., None] for A in maps),
    )
    for P in vectors:
        x = broadcast(x, P)
    x = residual(relu(x @ p["activate"]["kernel"]), p["activate_residual"])
    y_aux = head(x, p["auxiliary_head"])
    tokens = F_s[M_s] if M_s.any() else F_s.reshape(-1, F_s.shape[-1])
    x = x.reshape(-1, x.shape[-1])
    x = cross(cross(x, tokens, p["cross1"]), tokens, p["cross2"])
    x = relu(x @ p["reduce"]["kernel"]).reshape(*GRID, -1)
    return {
        "y_aux": y_aux,
        "y_final": head(residual(x, p["reduce_residual"]), p["head"]),
    }


# What each row's decoder is given: vectors to broadcast, then maps.
GIVEN = {
    "baseline": (["P_pre"], []),
    "baseline_prior": (["P_pre"], ["prior"]),
    "full_prior": (["P_pre"], ["A_main", "A_aux", "prior"]),
    "pre": (["P_pre"], []),
    "main": ([], ["A_main"]),
    "aux": ([], ["A_aux"]),
    "main_aux": ([], ["A_main", "A_aux"]),
    "without_maps": (["P_pre", "P_main", "P_aux"], []),
}
FEM_ROWS = ("baseline", "baseline_prior", "fgpe", "fgpe_bgpe")
GLOBAL_ROWS = ("baseline", "baseline_prior", "fgpe", "fgpe_ffa")


def evolve_foreground(name, o, F_q, F_s, p):
    pairs = list(zip(F_s, o["M_s"], strict=True))
    o["y_pre"] = segment(F_q, o["P_pre"], p)
    o["P_psd"] = pool(F_q, o["y_pre"].argmax(-1))
    guide = o["P_pre"] if name == "sgm" else o["P_psd"]
    o["y_rev"] = np.stack([segment(F, guide, p) for F in F_s])
    R = o["y_rev"].argmax(-1)
    for region, chosen in (("P_main", R), ("P_aux", 1 - R)):
        each = [pool(F, M * r) for (F, M), r in zip(pairs, chosen, strict=True)]
        o[region] = np.mean(each, axis=0)


def forward(name, params, support, masks, query):
    """The row `name` of the tables."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    support, query = support.astype(np.float64), query.astype(np.float64)
    F_s, F_q = (
        relu(x @ p[f"reduce_{who}"]["kernel"])
        for x, who in ((support, "support"), (query, "query"))
    )
    o = {"F_s": F_s, "F_q": F_q, "M_s": masks[:, ::8, ::8] == 1}
    o["P_pre"] = np.mean([pool(*x) for x in zip(F_s, o["M_s"], strict=True)], axis=0)
    if not name.startswith("baseline"):
        evolve_foreground(name, o, F_q, F_s, p["convs"])

    g = p["gbc"]
    o["y_bg_q"] = segment(F_q, g["P_global"], g["convs"])
    o["P_bg"] = g["P_global"]
    if name not in GLOBAL_ROWS:
        z = (F_q * o["y_bg_q"].argmax(-1)[..., None]).mean((0, 1))
        z = relu(z @ g["fc1"]["kernel"] + g["fc1"]["bias"])
        z = z @ g["fc2"]["kernel"] + g["fc2"]["bias"]
        o["P_bg"] = g["P_global"] / (1 + np.exp(-z))

    vectors, maps = GIVEN.get(name, (["P_pre"], ["A_main", "A_aux"]))
    o |= {A: cosine(F_q, o["P" + A[1:]]) for A in maps if A != "prior"}
    if "prior" in maps:
        o["prior"] = prior_of(support, o["M_s"], query)
    cues = o["P_bg"], [o[P] for P in vectors], [o[A] for A in maps]
    if name in FEM_ROWS:
        o |= fem(F_q, *cues, p["fem"])
    else:
        o |= ffa(F_q, F_s, o["M_s"], *cues, p["ffa"])
    return resize(o["y_final"], (HEIGHT, WIDTH)), o


def check_all(name, episodes, logits, out):
    for b in range(3):
        one = jax.tree.map(lambda x, b=b: x[b], out)
        params = random_params(name)
        expected_logits, expected = forward(name, params, *(x[b] for x in episodes))
        assert one.keys() == expected.keys()
        inner = zip(one.pop("y_inner", ()), expected.pop("y_inner", ()), strict=True)
        for mine, theirs in [(logits[b], expected_logits), *inner]:
            np.testing.assert_allclose(mine, theirs, atol=2e-4 * np.abs(theirs).max())
        for key, value in expected.items():
            np.testing.assert_allclose(
                one[key], value, rtol=1e-4, atol=2e-4, err_msg=key
            )
    # The comparison means little unless the hard masks of eq 5 are mixed.
    if "y_rev" in out:
        assert 0.1 < np.mean(np.asarray(out["y_rev"])[:2].argmax(-1)) < 0.9


@rows
def test_every_intermediate_is_numpys_and_every_prediction_has_a_loss(name):
    """Five shots; the last episode has no foreground."""
    value, terms, logits, out, *_ = trained(name)
    expected = {"final", "bg_s", "bg_q"}
    expected |= {"inner"} if name in FEM_ROWS else {"aux"}
    expected |= set() if name == "baseline" else {"pre", "rev"}
    assert terms.keys() == {f"loss_{term}" for term in expected}
    np.testing.assert_allclose(value, sum(terms.values()), rtol=1e-5)
    assert ("y_inner" in out) == (name in FEM_ROWS)
    assert out["y_bg_s"].shape == (3, 5, *GRID, 2)
    out = {key: value for key, value in out.items() if key != "y_bg_s"}
    check_all(name, draw_episodes(5), logits, out)


@pytest.mark.parametrize("name", ["sgm", "baseline_prior", "full_prior"])
def test_one_shot_evaluation_is_numpys(name):
    episodes = draw_episodes(1)
    check_all(name, episodes, *evaluator(name)(random_params(name), *episodes))


@rows
def test_gradients_reach_what_they_should_and_nothing_else(name):
    """An episode without foreground is among them.

    The masks between the segmentations are hard, so the final prediction teaches
    neither the `Convs` that make them nor the heads that only have a loss.
    """
    value, *_, every, of_final = trained(name)
    assert np.isfinite(value)
    untaught = []
    for (path, leaf), final in zip(
        jax.tree_util.tree_leaves_with_path(every),
        jax.tree.leaves(of_final),
        strict=True,
    ):
        path = "/".join(key.key for key in path)
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
        if not np.any(final):
            untaught.append("/".join(path.split("/")[:2]))
    expected = {"gbc/convs"}
    if name != "baseline":
        expected |= {f"convs/{layer}" for layer in ("merge", "residual", "head")}
    if name in FEM_ROWS:
        expected |= {f"fem/inner_head{i}" for i in range(4)}
    else:
        expected |= {"ffa/auxiliary_head"}
    assert set(untaught) == expected


@rows
def test_a_train_step_reports_what_the_variant_has(name):
    model, optimizer = build(name), Optimizer().build(10)
    images = jnp.zeros((2, 33, 33, 3), jnp.uint8)
    mask = jnp.zeros((2, 33, 33), jnp.uint8)
    batch = Episode(images, mask, images[:, None], mask[:, None])
    step = make_train_step(model, BACKBONE, optimizer, LossWeights())
    key = jax.random.key(0)
    weights = jax.eval_shape(BACKBONE.module.init, key, jnp.zeros((1, 33, 33, 3)))
    start = functools.partial(init_state, model, optimizer, channels=12)
    state = jax.eval_shape(lambda key: start(key=key), key)
    new, metrics = jax.eval_shape(step, state, weights["params"], batch, key)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    watched = {name for name in metrics if name.startswith("empty_")}
    evolved = set() if name == "baseline" else {"empty_pre", "empty_rev"}
    decoded = {"empty_final"} if name in FEM_ROWS else {"empty_final", "empty_aux"}
    assert watched == {"empty_bg"} | evolved | decoded


@pytest.mark.parametrize(("name", "guided"), [("fgpe", True), ("sgm", False)])
def test_with_sgm_the_query_has_no_say_in_the_supports_regions(name, guided):
    (support, masks, query), other = draw_episodes(1), draw_episodes(1, seed=2)[2]
    run = functools.partial(evaluator(name), random_params(name), support, masks)
    (_, one), (_, two) = run(query), run(other)
    for key in ("y_rev", "P_main", "P_aux"):
        assert np.array_equal(one[key][:2], two[key][:2]) == (not guided), key
    assert not np.array_equal(one["y_final"], two["y_final"])


@pytest.mark.parametrize("seen", ["main", pytest.param("aux", marks=pytest.mark.slow)])
def test_decoders_depend_on_the_prototypes_they_see_only(monkeypatch, seen):
    """Move P_main or P_aux behind the network's back."""
    model, original = build(seen), qpenet.dual_prototypes
    params, episodes = random_params(seen), draw_episodes(1)

    @jax.jit
    def logits(shift):
        def shifted(*args, **kwargs):
            found = original(*args, **kwargs)
            return found | {P: found[P] + shift[P][None] for P in shift}

        monkeypatch.setattr(qpenet, "dual_prototypes", shifted)
        return model.apply({"params": params}, *episodes)[0]

    shift = np.linspace(-1, 1, 8, dtype=np.float32)
    still = logits({"P_main": 0 * shift, "P_aux": 0 * shift})
    for moved in ("main", "aux"):
        result = logits({f"P_{n}": shift * (n == moved) for n in ("main", "aux")})
        assert np.array_equal(result, still) == (moved != seen), moved


def test_dropout_reaches_every_head_of_fem():
    model = build("baseline", **NO_DROPOUT | {"head_dropout": 0.5})
    params, episodes = random_params("baseline"), draw_episodes(1)

    @jax.jit
    def run(key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, *episodes, train=True, rngs=rngs)[1]

    one, two = run(jax.random.key(0)), run(jax.random.key(1))
    for mine, others in zip(
        [one["y_final"], *one["y_inner"]],
        [two["y_final"], *two["y_inner"]],
        strict=True,
    ):
        assert np.abs(mine - others).max() > 1e-3


def test_windows_of_the_papers_grid_are_uneven():
    assert [(w.start, w.stop) for w in windows(60, 8)[:4]] == [
        (0, 8),
        (7, 15),
        (15, 23),
        (22, 30),
    ]


@pytest.mark.parametrize(
    "grids",
    [((60, 60), (8, 8)), ((60, 60), (15, 30)), ((5, 9), (3, 2)), ((7, 7), (7, 7))],
)
def test_adaptive_pooling_is_the_mean_of_every_window(grids):
    source, target = grids
    x = np.random.default_rng(0).normal(size=(2, *source, 3)).astype(np.float32)
    pooled = adaptive_average_pool(x, target)
    for b in range(2):
        np.testing.assert_allclose(pooled[b], adaptive_pool(x[b], target), atol=1e-6)


def test_prior_of_a_support_that_is_the_query_peaks_where_it_was_marked():
    """The cosine of a cell to itself is 1; orthogonal cells stay at 0."""
    features = np.eye(6, dtype=np.float32).reshape(1, 2, 3, 6)
    mask = np.array([[[[True, False, False], [False, True, False]]]])
    prior = prior_mask(features[None], mask, features)
    np.testing.assert_allclose(prior[0], mask[0, 0], atol=1e-6)
    np.testing.assert_array_equal(prior_mask(features[None], mask & False, features), 0)


# Trainable parameters over ResNet features (1536) at 256 channels.
C = 256
CONVS = 2 * C * C + 3 * 9 * C * C + 2 * C + 2  # 1x1, three 3x3, classifier
RESIDUAL, HEAD = 2 * 9 * C * C, 9 * C * C + 2 * C + 2
COMMON = 2 * 1536 * C + C + CONVS  # reducers, P_global, its Convs
CLEANER = 2 * (C * C + C)
CROSS = 4 * C * C + 2 * C * 768 + 4 * C
# Filter, activate without its cues, residuals, heads, attention, reduce.
FFA = 2 * C * C + C * C + 2 * RESIDUAL + 2 * HEAD + 2 * CROSS + C * C
# On four grids: filter, merge without its cues, residual, head; on three: from the
# finer grid; then reduce, residual and head.
FEM = 4 * (2 * C * C + C * C + RESIDUAL + HEAD) + 3 * 2 * C * C
FEM += 4 * C * C + RESIDUAL + HEAD
MAP, VECTOR = C, C * C  # what a cue adds to the convolution that takes it
COUNTS = {
    "baseline": (COMMON + FEM + 4 * VECTOR, 13_241_612),
    "fgpe": (COMMON + CONVS + FEM + 4 * (VECTOR + 2 * MAP), 15_144_718),
    "fgpe_bgpe": (
        COMMON + CONVS + CLEANER + FEM + 4 * (VECTOR + 2 * MAP),
        15_276_302,
    ),
    "fgpe_ffa": (COMMON + CONVS + FFA + VECTOR + 2 * MAP, 9_769_736),
    "full": (COMMON + CONVS + CLEANER + FFA + VECTOR + 2 * MAP, 9_901_320),
    "pre": (COMMON + CONVS + CLEANER + FFA + VECTOR, 9_900_808),
    "main": (COMMON + CONVS + CLEANER + FFA + MAP, 9_835_528),
    "aux": (COMMON + CONVS + CLEANER + FFA + MAP, 9_835_528),
    "main_aux": (COMMON + CONVS + CLEANER + FFA + 2 * MAP, 9_835_784),
    "without_maps": (COMMON + CONVS + CLEANER + FFA + 3 * VECTOR, 10_031_880),
    "sgm": (COMMON + CONVS + CLEANER + FFA + VECTOR + 2 * MAP, 9_901_320),
}


def test_every_variant_has_an_exact_parameter_count():
    assert COUNTS.keys() == VARIANTS.keys()
    for name, (by_hand, written) in COUNTS.items():
        model = QPENet(**VARIANTS[name].fields)
        assert count(model, 1536) == by_hand == written, name


def test_what_a_variant_lacks_has_no_parameters():
    trees = {name: random_params(name) for name in VARIANTS}
    assert "convs" not in trees["baseline"]
    for name, tree in trees.items():
        assert ("fc1" in tree["gbc"]) == (name not in GLOBAL_ROWS)
        assert ("fem" in tree) == (name in FEM_ROWS) == ("ffa" not in tree)


def test_rows_are_the_papers():
    """Class mIoU from top to bottom, as printed."""
    printed = {
        3: [62.4, 64.1, 64.5, 64.8, 65.2],
        4: [63.3, 61.8, 58.1, 64.1, 65.2],
        5: [61.6, 63.5, 65.2],
    }
    for table, values in printed.items():
        results = [r for r in ABLATION_RESULTS.values() if table in r.rows]
        rows = {result.rows[table]: result.miou for result in results}
        assert rows == dict(enumerate(values, start=1))
        in_order = [ABLATION_RESULTS[name].miou for name in rows_of(f"table{table}")]
        assert in_order == values


def test_every_variant_has_its_result():
    assert list(ABLATION_RESULTS) == list(VARIANTS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder": "FEM"}, "decoder 'FEM': choose ffa, fem"),
        ({"prototypes": ("psd",)}, "fgpe=True, prototype 'psd': choose pre, main"),
        ({"fgpe": False}, "with fgpe=False, prototype 'main': choose pre"),
    ],
)
def test_fields_that_name_no_network_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        QPENet(**fields)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_prior_is_the_same_off_the_cpu(share):
    """What a CPU computes from the foreground's cells, others do from all at once."""
    rng = np.random.default_rng(0)
    support, query = (
        jnp.asarray(rng.normal(size=(n, 16)), jnp.float32) for n in (1000, 70)
    )
    mask = jnp.asarray(rng.random(1000) < share)
    plain = fem_module._best_cosine(support, mask, query)
    in_blocks = fem_module._best_cosine_in_blocks(support, mask, query)
    np.testing.assert_allclose(plain, in_blocks, atol=1e-6)
