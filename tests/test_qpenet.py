"""QPENet against a numpy forward pass written from the paper, and its invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError

from qpenet_jax.models.losses import total_loss
from qpenet_jax.models.qpenet import QPENet

# Bits are compared.
pytestmark = pytest.mark.usefixtures("optimised_code")

CHANNELS, FEATURES, SIDE, GRID = 16, 12, 33, 5
MODEL = QPENet(channels=CHANNELS, heads=2, ffn_features=24)


def draw(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_params(model=MODEL, seed=0):
    """Random weights larger than the initial ones, so that masks come out mixed."""
    initial = init(model)
    leaves, tree = jax.tree.flatten(initial)
    keys = range(1000 * seed, 1000 * seed + len(leaves))

    def one(leaf, key):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return draw(leaf.shape, key) * np.float32(1.4 / np.sqrt(fan_in))

    return tree.unflatten(list(map(one, leaves, keys)))


def init(model, features=FEATURES):
    """Return the shapes of the parameters."""
    return jax.eval_shape(
        model.init,
        jax.random.key(0),
        jnp.zeros((1, 1, 3, 3, features)),
        jnp.zeros((1, 1, 17, 17), jnp.int32),
        jnp.zeros((1, 3, 3, features)),
    )["params"]


def draw_episodes(shots, batch=2, seed=1):
    """Return (support features, support masks, query features) of a batch."""
    rng = np.random.default_rng(seed)
    support = rng.normal(size=(batch, shots, GRID, GRID, FEATURES)).astype(np.float32)
    query = rng.normal(size=(batch, GRID, GRID, FEATURES)).astype(np.float32)
    masks = rng.choice([0, 1, 1, 255], (batch, shots, SIDE, SIDE)).astype(np.int32)
    return support, masks, query


@pytest.fixture(scope="module")
def params():
    return draw_params()


@pytest.fixture(scope="module")
def evaluate():
    """Jitted `(params, support, masks, query) -> logits, out`, dropout off."""
    return jax.jit(lambda params, *episode: MODEL.apply({"params": params}, *episode))


@pytest.fixture(scope="module")
def train():
    """Jitted `(params, episode, query mask, dropout key) -> loss, out, gradients`."""

    def loss(params, episode, query_mask, key):
        rngs = {"dropout": key}
        _, out = MODEL.apply({"params": params}, *episode, train=True, rngs=rngs)
        return total_loss(out, query_mask, episode[1])[0], out

    grad = jax.value_and_grad(loss, has_aux=True)

    def run(params, episode, query_mask, key):
        (value, out), gradients = grad(params, episode, query_mask, key)
        return value, out, gradients

    # Unoptimised code: here compiling takes a hundred times longer than running.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


# The paper's equations in numpy, one episode at a time, in float64.


def relu(x):
    return np.maximum(x, 0)


def conv3x3(x, kernel):
    h, w, _ = x.shape
    x = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    return sum(
        x[u : u + h, v : v + w] @ kernel[u, v] for u in (0, 1, 2) for v in range(3)
    )


def broadcast(F, P):
    return np.concatenate([F, np.broadcast_to(P, (*F.shape[:2], len(P)))], axis=-1)


def residual(x, p):
    hidden = relu(conv3x3(x, p["conv1"]["kernel"]))
    return x + relu(conv3x3(hidden, p["conv2"]["kernel"]))


def head(x, p):
    hidden = relu(conv3x3(x, p["conv"]["kernel"]))
    return hidden @ p["classifier"]["kernel"] + p["classifier"]["bias"]


def segment(F, P, p):
    merged = relu(broadcast(F, P) @ p["merge"]["kernel"])
    return head(residual(merged, p["residual"]), p["head"])


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
    q, k, v = (
        t @ p[name]["kernel"]
        for t, name in ((x, "query"), (tokens, "key"), (tokens, "value"))
    )
    attended = []
    for i in range(heads):
        part = np.s_[:, i * d : (i + 1) * d]
        weights = np.exp(q[part] @ k[part].T / np.sqrt(d))
        attended.append(weights / weights.sum(1, keepdims=True) @ v[part])
    update = np.concatenate(attended, axis=1) @ p["out"]["kernel"]
    x = layer_norm(x + update, p["norm1"])
    update = relu(x @ p["ffn1"]["kernel"]) @ p["ffn2"]["kernel"]
    return layer_norm(x + update, p["norm2"])


def upsample(x):
    """Repeat 5 x 5 samples to 33 x 33, linear in between."""
    grid, pixels = np.arange(GRID) * 8, np.arange(SIDE)
    lines = [np.interp(pixels, grid, np.eye(GRID)[i]) for i in range(GRID)]
    return np.einsum("iy,ijc,jx->yxc", lines, x, lines)


def paper_forward(params, support, masks, query):
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    o = {}
    F_s = [relu(s @ p["reduce_support"]["kernel"]) for s in support.astype(np.float64)]
    F_q = relu(query.astype(np.float64) @ p["reduce_query"]["kernel"])
    o["F_s"], o["F_q"], o["M_s"] = np.stack(F_s), F_q, masks[:, ::8, ::8] == 1
    pairs = list(zip(F_s, o["M_s"], strict=True))

    o["P_pre"] = np.mean([pool(F, M) for F, M in pairs], axis=0)  # eq 1
    o["y_pre"] = segment(F_q, o["P_pre"], p["convs"])  # eq 2
    o["P_psd"] = pool(F_q, o["y_pre"].argmax(-1))  # eq 3
    o["y_rev"] = np.stack([segment(F, o["P_psd"], p["convs"]) for F in F_s])  # eq 4
    R = o["y_rev"].argmax(-1)
    main = [pool(F, M * r) for (F, M), r in zip(pairs, R, strict=True)]  # eqs 5, 7
    aux = [pool(F, M * (1 - r)) for (F, M), r in zip(pairs, R, strict=True)]  # 6, 8
    o["P_main"], o["P_aux"] = np.mean(main, axis=0), np.mean(aux, axis=0)

    g = p["gbc"]
    o["y_bg_q"] = segment(F_q, g["P_global"], g["convs"])  # eq 10
    z = (F_q * o["y_bg_q"].argmax(-1)[..., None]).mean((0, 1))
    z = relu(z @ g["fc1"]["kernel"] + g["fc1"]["bias"])
    z = z @ g["fc2"]["kernel"] + g["fc2"]["bias"]
    o["P_bg"] = g["P_global"] / (1 + np.exp(-z))  # eq 11

    f = p["ffa"]
    F_dot = relu(broadcast(F_q, o["P_bg"]) @ f["filter"]["kernel"])  # eq 12
    o["A_main"], o["A_aux"] = cosine(F_q, o["P_main"]), cosine(F_q, o["P_aux"])
    maps = np.stack([o["A_main"], o["A_aux"]], axis=-1)
    x = broadcast(np.concatenate([F_dot, maps], axis=-1), o["P_pre"])  # eq 15
    x = residual(relu(x @ f["activate"]["kernel"]), f["activate_residual"])
    o["y_aux"] = head(x, f["auxiliary_head"])
    attended = o["M_s"] if o["M_s"].any() else np.ones_like(o["M_s"])
    tokens = np.stack(F_s)[attended]
    x = x.reshape(-1, CHANNELS)
    x = cross(cross(x, tokens, f["cross1"]), tokens, f["cross2"])  # eq 16
    x = relu(x @ f["reduce"]["kernel"]).reshape(GRID, GRID, CHANNELS)
    o["y_final"] = head(residual(x, f["reduce_residual"]), f["head"])
    return upsample(o["y_final"]), o


@pytest.mark.parametrize("shots", [1, 3])
def test_every_intermediate_is_the_papers(evaluate, params, shots):
    episodes = draw_episodes(shots)
    logits, out = evaluate(params, *episodes)
    for b in range(2):
        expected_logits, expected = paper_forward(params, *(x[b] for x in episodes))
        assert out.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(out[name][b], value, atol=2e-4, err_msg=name)
        np.testing.assert_allclose(logits[b], expected_logits, atol=2e-4)
    # The comparison means little unless every hard mask is mixed.
    for name in ("y_pre", "y_rev", "y_bg_q"):
        found = np.asarray(out[name]).argmax(-1)
        assert (np.abs(found.reshape(2, -1).mean(axis=1) - 0.5) < 0.4).all(), name
    assert (np.abs(out["P_main"] - out["P_aux"]).max(axis=1) > 0.1).all()


def test_a_single_support_is_the_mean_of_its_copies(evaluate, params):
    support, masks, query = draw_episodes(1)
    copies = np.repeat(support, 3, axis=1), np.repeat(masks, 3, axis=1), query
    logits, out = evaluate(params, support, masks, query)
    logits3, out3 = evaluate(params, *copies)
    np.testing.assert_allclose(logits3, logits, atol=1e-4)
    for name in ("P_pre", "P_psd", "P_main", "P_aux", "P_bg"):
        np.testing.assert_allclose(out3[name], out[name], atol=1e-5)


def test_the_order_of_supports_is_irrelevant(evaluate, params):
    support, masks, query = draw_episodes(3)
    order = [2, 0, 1]
    logits, _ = evaluate(params, support, masks, query)
    shuffled, _ = evaluate(params, support[:, order], masks[:, order], query)
    np.testing.assert_allclose(shuffled, logits, atol=1e-4)
    other, _ = evaluate(params, support[:, order], masks, query)
    assert np.abs(other - logits).max() > 1e-2, "masks belong to their images"


def test_batch_neighbours_are_irrelevant_and_evaluation_is_bit_identical(
    evaluate, params
):
    episodes, others = draw_episodes(1), draw_episodes(1, seed=2)
    mixed = [np.stack([x[1], y[0]]) for x, y in zip(episodes, others, strict=True)]
    logits, _ = evaluate(params, *episodes)
    again, _ = evaluate(params, *episodes)
    np.testing.assert_array_equal(again, logits)
    np.testing.assert_allclose(evaluate(params, *mixed)[0][0], logits[1], atol=1e-5)


def test_without_foreground_the_decoder_attends_to_all_support_cells(evaluate, params):
    support, masks, query = draw_episodes(1)
    logits, out = evaluate(params, support, 0 * masks, query)
    for name in ("P_pre", "P_main", "P_aux", "A_main", "A_aux"):
        np.testing.assert_array_equal(out[name], 0)
    for b in range(2):
        expected, _ = paper_forward(params, support[b], 0 * masks[b], query[b])
        np.testing.assert_allclose(logits[b], expected, atol=2e-4)


@pytest.mark.parametrize("label", [0, 1, 255])
def test_uniform_masks_give_finite_values_and_gradients(train, params, label):
    support, masks, query = draw_episodes(2)
    masks = np.full_like(masks, label)
    value, out, gradients = train(
        params, (support, masks, query), masks[:, 0], jax.random.key(0)
    )
    assert np.isfinite(value)
    for path, leaf in jax.tree_util.tree_leaves_with_path((out, gradients)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


def test_training_reaches_every_parameter_through_dropout(train, params):
    support, masks, query = draw_episodes(2)
    args = params, (support, masks, query), masks[:, 0]
    value, out, gradients = train(*args, jax.random.key(1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    assert gradients["gbc"]["P_global"].shape == (CHANNELS,)

    again, _, same = train(*args, jax.random.key(1))
    assert value == again
    jax.tree.map(np.testing.assert_array_equal, gradients, same)
    other, other_out, _ = train(*args, jax.random.key(2))
    assert other != value
    # Whole channels drop out, so about half of a prototype's entries are 0.
    assert (np.asarray(out["P_pre"]) == 0).any()
    assert np.abs(out["P_pre"] - other_out["P_pre"]).max() > 1e-2


def test_support_background_is_predicted_in_training_only(train, evaluate, params):
    episode = draw_episodes(2)
    _, out, _ = train(params, episode, episode[1][:, 0], jax.random.key(0))
    assert out["y_bg_s"].shape == (2, 2, GRID, GRID, 2)
    assert "y_bg_s" not in jax.eval_shape(evaluate, params, *episode)[1]


def count(model, features):
    return sum(leaf.size for leaf in jax.tree.leaves(init(model, features)))


@pytest.mark.parametrize("features", [1536, 344])
def test_exact_parameter_counts(features):
    c, ffn = 256, 768
    conv3x3 = 9 * c * c
    residual = 2 * conv3x3
    head = conv3x3 + 2 * c + 2
    convs = 2 * c * c + residual + head  # eqs 2 and 4; once more for 9 and 10
    gbc = c + convs + 2 * (c * c + c)  # P_global, Convs, two FC with bias
    cross = 4 * c * c + 2 * c * ffn + 2 * (2 * c)  # q k v out, FFN, two norms
    activate = (2 * c + 2) * c  # F_dot, P_pre and two maps
    decoder = 2 * c * c + activate + 2 * cross + c * c + head
    reducer = features * c
    paper = 2 * reducer + convs + gbc + decoder
    released = paper + 2 * residual + head  # two residual blocks, auxiliary head
    assert count(QPENet(), features) == released
    assert count(QPENet(residual=False), features) == released - 2 * residual
    assert count(QPENet(auxiliary_head=False), features) == released - head
    assert count(QPENet(shared_reducer=True), features) == released - reducer
    assert released == {1536: 9_901_320, 344: 9_291_016}[features]


def test_masks_that_do_not_fit_are_refused(evaluate, params):
    support, masks, query = draw_episodes(1)
    with pytest.raises(ValueError, match="32 x 33 do not fit"):
        jax.eval_shape(evaluate, params, support, masks[:, :, :-1], query)


def test_parameters_of_other_features_are_refused_as_flax_does(evaluate, params):
    supports, masks, query = draw_episodes(1)
    wider = [np.concatenate([f, f], axis=-1) for f in (supports, query)]
    told = r'"kernel" in "reduce_support", .* \(24, 16\), .* has shape \(12, 16\)'
    with pytest.raises(ScopeParamShapeError, match=told):
        evaluate(params, wider[0], masks, wider[1])
