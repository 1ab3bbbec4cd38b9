"""The paper's equations 1 to 16 in NumPy, for every row of Tables III to V.

In float64 and for one episode at a time: a specification, not the code's operations.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.variants import VARIANTS

FEATURES, GRID, SIDES = 12, (5, 7), (33, 49)  # halves to 3 x 4, 2 x 2 and 1 x 1
SMALL = {"channels": 8, "heads": 2, "ffn_features": 12}

# VARIANTS and PFENet's prior, which no row has, in either decoder.
CASES = {name: dict(variant.fields) for name, variant in VARIANTS.items()}
CASES["baseline_prior"] = CASES["baseline"] | {"prior": True}
CASES["full_prior"] = {"prior": True}

FEM_ROWS = ("baseline", "baseline_prior", "fgpe", "fgpe_bgpe")
GLOBAL_ROWS = ("baseline", "baseline_prior", "fgpe", "fgpe_ffa")

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
"""What a row's decoder is given, vectors to broadcast and maps, if not as in eq 15."""


def normal(*shape, seed=0):
    """Standard normal numbers of float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(name="full", **fields):
    """A small network of a row."""
    return QPENet(**SMALL, **CASES[name], **fields)


def shapes(model, features=FEATURES):
    """The shapes of the parameters."""
    return jax.eval_shape(
        model.init,
        jax.random.key(0),
        jnp.zeros((1, 1, 3, 3, features)),
        jnp.zeros((1, 1, 17, 17), jnp.int32),
        jnp.zeros((1, 3, 3, features)),
    )["params"]


def draw_params(model):
    """Random weights larger than the initial ones, so that masks come out mixed."""
    leaves, tree = jax.tree.flatten(shapes(model))

    def one(i, leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return normal(*leaf.shape, seed=54_000 + i) * np.float32(1.4 / np.sqrt(fan_in))

    return tree.unflatten([one(*pair) for pair in enumerate(leaves)])


def draw_episodes(shots, seed=1):
    """Support features, support masks, query features of three; the last mask empty."""
    rng = np.random.default_rng(seed)
    support = rng.normal(size=(3, shots, *GRID, FEATURES)).astype(np.float32)
    query = rng.normal(size=(3, *GRID, FEATURES)).astype(np.float32)
    masks = rng.choice([0, 1, 1, 255], (3, shots, *SIDES)).astype(np.int32)
    masks[-1] = np.where(masks[-1] == 1, 0, masks[-1])
    return support, masks, query


def relu(x):
    return np.maximum(x, 0)


def conv1x1(x, p):
    return relu(x @ p["kernel"])


def conv3x3(x, p):
    h, w, _ = x.shape
    x = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    taps = np.ndindex(3, 3)
    return relu(sum(x[u : u + h, v : v + w] @ p["kernel"][u, v] for u, v in taps))


def broadcast(F, *prototypes):
    return np.concatenate(
        [F, *(np.broadcast_to(P, (*F.shape[:2], len(P))) for P in prototypes)], axis=-1
    )


def residual(x, p):
    return x + conv3x3(conv3x3(x, p["conv1"]), p["conv2"])


def head(x, p):
    hidden = conv3x3(x, p["conv"])
    return hidden @ p["classifier"]["kernel"] + p["classifier"]["bias"]


def segment(F, P, p):
    """Convs(Concat(F, BC(P)))."""
    return head(
        residual(conv1x1(broadcast(F, P), p["merge"]), p["residual"]), p["head"]
    )


def pool(F, mask):
    return (F * mask[..., None]).sum((0, 1)) / (mask.sum() + 5e-4)


def cosine(F, P):
    lengths = np.linalg.norm(F, axis=-1), np.linalg.norm(P)
    return F @ P / np.prod(np.maximum(1e-8, np.broadcast_arrays(*lengths)), axis=0)


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * p["scale"] + p["bias"]


def cross(x, tokens, p, heads=2):
    """Attend from `x` [n, c] to `tokens` [m, c], the supports' foreground."""
    d = x.shape[1] // heads
    given = {"query": x, "key": tokens, "value": tokens}
    q, k, v = (t @ p[name]["kernel"] for name, t in given.items())
    attended = []
    for i in range(heads):
        part = np.s_[:, i * d : (i + 1) * d]
        weights = np.exp(q[part] @ k[part].T / np.sqrt(d))
        attended.append(weights / weights.sum(1, keepdims=True) @ v[part])
    update = np.concatenate(attended, axis=1) @ p["out"]["kernel"]
    x = layer_norm(x + update, p["norm1"])
    update = relu(x @ p["ffn1"]["kernel"]) @ p["ffn2"]["kernel"]
    return layer_norm(x + update, p["norm2"])


def resize(x, size):
    """Resize `[..., h, w, c]` linearly with the corners aligned, axis by axis."""
    for axis, target in zip((-3, -2), size, strict=True):
        points = np.linspace(0, x.shape[axis] - 1, target)
        x = np.apply_along_axis(
            lambda line, at=points: np.interp(at, np.arange(len(line)), line), axis, x
        )
    return x


def windows(source, target):
    """The first and last index of each window of adaptive pooling."""
    edges = [r * source / target for r in range(target + 1)]
    pairs = itertools.pairwise(edges)
    return [slice(int(np.floor(a)), int(np.ceil(b))) for a, b in pairs]


def adaptive_pool(x, size):
    rows, cols = windows(x.shape[0], size[0]), windows(x.shape[1], size[1])
    return np.array([[x[r, c].mean((0, 1)) for c in cols] for r in rows])


def prior_of(support, M_s, query):
    """Cell by cell: the best cosine with a foreground cell, stretched to 0..1."""
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
        filtered = conv1x1(broadcast(adaptive_pool(F_q, grid), P_bg), p[f"filter{i}"])
        cues = np.dstack([filtered, *(resize(A[..., None], grid) for A in maps)])
        m = conv1x1(broadcast(cues, *vectors), p[f"merge{i}"])
        if i:
            finer = resize(levels[-1], grid)
            m = m + conv1x1(np.dstack([m, finer]), p[f"finer{i}"])
        m = residual(m, p[f"residual{i}"])
        inner.append(head(m, p[f"inner_head{i}"]))
        levels.append(resize(m, GRID))
    u = residual(conv1x1(np.dstack(levels), p["reduce"]), p["reduce_residual"])
    return {"y_inner": inner, "y_final": head(u, p["head"])}


def ffa(F_q, F_s, M_s, P_bg, vectors, maps, p):
    F_dot = conv1x1(broadcast(F_q, P_bg), p["filter"])  # eq 12
    x = conv1x1(broadcast(np.dstack([F_dot, *maps]), *vectors), p["activate"])  # eq 15
    x = residual(x, p["activate_residual"])
    y_aux = head(x, p["auxiliary_head"])
    tokens = F_s[M_s] if M_s.any() else F_s.reshape(-1, F_s.shape[-1])
    x = x.reshape(-1, x.shape[-1])
    x = cross(cross(x, tokens, p["cross1"]), tokens, p["cross2"])  # eq 16
    x = residual(conv1x1(x, p["reduce"]).reshape(*GRID, -1), p["reduce_residual"])
    return {"y_aux": y_aux, "y_final": head(x, p["head"])}


def evolve_foreground(name, o, p):
    F_s, F_q = o["F_s"], o["F_q"]
    o["y_pre"] = segment(F_q, o["P_pre"], p)  # eq 2
    o["P_psd"] = pool(F_q, o["y_pre"].argmax(-1))  # eq 3
    guide = o["P_pre"] if name == "sgm" else o["P_psd"]
    o["y_rev"] = np.stack([segment(F, guide, p) for F in F_s])  # eq 4
    R = o["y_rev"].argmax(-1)
    for region, chosen in (("P_main", R), ("P_aux", 1 - R)):  # eqs 5 to 8
        each = [pool(F, m) for F, m in zip(F_s, o["M_s"] * chosen, strict=True)]
        o[region] = np.mean(each, axis=0)


def forward(name, params, support, masks, query):
    """The logits of the row `name` of the tables, and every intermediate."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    support, query = support.astype(np.float64), query.astype(np.float64)
    F_s, F_q = conv1x1(support, p["reduce_support"]), conv1x1(query, p["reduce_query"])
    M_s = masks[:, ::8, ::8] == 1
    o = {"F_s": F_s, "F_q": F_q, "M_s": M_s}
    o["P_pre"] = np.mean([pool(*x) for x in zip(F_s, M_s, strict=True)], axis=0)  # eq 1
    if not name.startswith("baseline"):
        evolve_foreground(name, o, p["convs"])

    g = p["gbc"]
    o["y_bg_q"] = segment(F_q, g["P_global"], g["convs"])  # eq 10
    o["P_bg"] = g["P_global"]
    if name not in GLOBAL_ROWS:
        z = (F_q * o["y_bg_q"].argmax(-1)[..., None]).mean((0, 1))
        z = relu(z @ g["fc1"]["kernel"] + g["fc1"]["bias"])
        z = z @ g["fc2"]["kernel"] + g["fc2"]["bias"]
        o["P_bg"] = g["P_global"] / (1 + np.exp(-z))  # eq 11

    vectors, maps = GIVEN.get(name, (["P_pre"], ["A_main", "A_aux"]))
    o |= {A: cosine(F_q, o["P" + A[1:]]) for A in maps if A != "prior"}  # eqs 13, 14
    if "prior" in maps:
        o["prior"] = prior_of(support, M_s, query)
    cues = o["P_bg"], [o[P] for P in vectors], [o[A] for A in maps]
    if name in FEM_ROWS:
        o |= fem(F_q, *cues, p["fem"])
    else:
        o |= ffa(F_q, F_s, M_s, *cues, p["ffa"])
    return resize(o["y_final"], SIDES), o


def check(name, params, episodes, logits, out):
    """Compare all that a network returned for drawn episodes."""
    for b in range(3):
        one = jax.tree.map(lambda x, b=b: x[b], out)
        expected_logits, expected = forward(name, params, *(x[b] for x in episodes))
        assert one.keys() == expected.keys()
        inner = zip(one.pop("y_inner", ()), expected.pop("y_inner", ()), strict=True)
        for mine, theirs in [(logits[b], expected_logits), *inner]:
            np.testing.assert_allclose(mine, theirs, atol=2e-4 * np.abs(theirs).max())
        for key, value in expected.items():
            np.testing.assert_allclose(
                one[key], value, rtol=1e-4, atol=2e-4, err_msg=key
            )
    # The last episode has no foreground.
    empty = {"P_pre", "P_main", "P_aux", "A_main", "A_aux", "prior"}
    for key in empty & out.keys():
        np.testing.assert_array_equal(out[key][-1], 0)
    # The comparison means little unless the hard masks are mixed.
    cleansed = set() if name in GLOBAL_ROWS else {"y_bg_q"}
    for key in {"y_pre", "y_rev"} & out.keys() | cleansed:
        found = np.asarray(out[key])[:2].argmax(-1)
        assert (np.abs(found.reshape(2, -1).mean(axis=1) - 0.5) < 0.4).all(), key
    if "P_main" in out:
        assert (np.abs(out["P_main"] - out["P_aux"])[:2].max(axis=1) > 0.1).all()
