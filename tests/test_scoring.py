"""Evaluation with and without its cache of encoded images, bit for bit."""

import functools
import gc
import itertools
import weakref
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_protocol
from equations import FEATURES, draw_params

from qpenet_jax.backbones.registry import Backbone
from qpenet_jax.core.types import Episode
from qpenet_jax.data.episode_lists import FrozenEpisodes
from qpenet_jax.data.episodes import EpisodeSampler
from qpenet_jax.data.loader import load_episode
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.data.transforms import binary_mask
from qpenet_jax.evaluation.predictor import Predictor, qpenet_predictor
from qpenet_jax.evaluation.scoring import (
    plan_episodes,
    score,
    score_episodes,
)
from qpenet_jax.evaluation.training_free import (
    TrainingFreePredictor,
    nearest_prototype,
)
from qpenet_jax.models.qpenet import ROLES, QPENet
from qpenet_jax.training.step import episode_features

SIDE, CLASSES = 33, (1, 2, 3)


@pytest.mark.parametrize("capacity", [0, 1, 2, 3, 5, 12, 100])
def test_what_stays_is_what_was_used_last(capacity):
    counts = np.eye(4, dtype=int)[1 + np.arange(12) % 3]  # 12 images of three classes
    sampler = EpisodeSampler(counts, CLASSES, shots=2, seed=0, min_pixels=1)
    episodes = [sampler(i) for i in range(100)]
    plan = plan_episodes(episodes, capacity)
    assert sorted(planned.position for planned in plan) == list(range(100))
    sought = [(planned.ids.class_id, planned.ids.query) for planned in plan]
    assert len(list(itertools.groupby(sought))) == len(set(sought)), "neighbours share"
    used = []
    for planned in plan:
        assert planned.ids == episodes[planned.position]
        kept = list(dict.fromkeys(reversed(used)))[:capacity]
        images = planned.ids.query, *planned.ids.supports
        assert planned.missing == [image for image in images if image not in kept]
        used += images
    loads = Counter(image for planned in plan for image in planned.missing)
    if capacity >= 4:  # a class has 4 images of the 12
        assert set(loads.values()) == {1}


class Patches(nn.Module):
    """Every eighth pixel through one dense layer; notes when it is traced."""

    traces: str = "patches"

    @nn.compact
    def __call__(self, images):
        TRACES[self.traces] += 1
        return {"stage": nn.Dense(FEATURES, name="dense")(images[:, ::8, ::8])}


TRACES = Counter()
BACKBONE = Backbone(Patches(), ("stage",), FEATURES)
SMALL = {"channels": 16, "heads": 2, "ffn_features": 24}


@functools.cache
def weights():
    images = jnp.zeros((1, SIDE, SIDE, 3))
    return Patches().init(jax.random.key(0), images)["params"]


@functools.cache
def data():
    return Shapes("val", size=80, side=65)


def setting(shots, episodes=7, **changes):
    """Return the protocol and the samplers of two seeds."""
    protocol = toy_protocol(shots=shots, episodes=episodes, seeds=(0, 5), **changes)
    samplers = [
        EpisodeSampler(data().counts, CLASSES, shots, seed, min_pixels=1)
        for seed in protocol.seeds
    ]
    return protocol, samplers


def images_of(episodes):
    return {i for ids in episodes for i in (ids.query, *ids.supports)}


class Spy(Predictor):
    """A predictor that notes the margins and how many images it encodes."""

    def __init__(self, predict):
        self.predict, self.margins, self.encoded = predict, [], 0

    def encode(self, images, roles=ROLES, padding=None):
        self.encoded += isinstance(images, np.ndarray)  # not a traced shape
        return self.predict.encode(images, roles, padding)

    def decode(self, *inputs, named=False):
        self.margins.append(np.asarray(self.predict.decode(*inputs)))
        return self.margins[-1]


def bytes_of(predict):
    """Return the size of one encoded image."""
    encoded = predict.encode(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(encoded))


def make_eval_step(forward):
    """Return the network's own call over features of all images, as training does."""

    @jax.jit
    def step(params, weights, batch):
        supports, query = episode_features(BACKBONE, weights, batch)
        logits, _ = forward(params, supports, batch.support_masks, query)
        return logits[..., 1] - logits[..., 0]

    return step


def check(predict, step, params, shots):
    """Evaluate with room for everything, for one image and for none; and batched."""
    protocol, samplers = setting(shots)
    drawn = [(s.seed, s(i)) for s in samplers for i in range(protocol.episodes)]
    episodes = [ids for _, ids in drawn]
    plan = plan_episodes(episodes, 1)
    order = [planned.position for planned in plan]
    size = bytes_of(predict)
    for limit, encoded in (
        (100 * size, len(images_of(episodes))),
        (0, len(drawn) * (shots + 1)),
        # Room for an episode's images and for one that stays.
        (size * (shots + 2), sum(len(planned.missing) for planned in plan)),
    ):
        spy = Spy(predict)
        scores = score_episodes(spy, data(), protocol, samplers, cache_bytes=limit)
        assert spy.encoded == encoded
        if limit == 100 * size:
            first, rows = spy.margins, scores.rows
        np.testing.assert_array_equal(spy.margins, first)
        np.testing.assert_array_equal(scores.rows, rows)
    assert len({m.tobytes() for m in first}) > len(drawn) // 2, "they differ"

    by_position = dict(zip(order, first, strict=True))
    for n, (seed, ids) in enumerate(drawn):
        loaded = load_episode(data(), ids, SIDE)
        episode = Episode(*(x[None] for x in loaded))
        batched = np.asarray(step(params, weights(), episode))
        np.testing.assert_allclose(by_position[n], batched, atol=2e-4)
        np.testing.assert_array_equal(predict(episode), by_position[n])
        mask = binary_mask(data().label(ids.query), ids.class_id)
        counts = score(by_position[n][0], loaded.query_mask, mask, protocol)
        assert rows[n].tolist() == [seed, ids.index, ids.query, ids.class_id, *counts]


CASES = {  # shots, fields, and how many numbers an image is encoded as
    # F_s, F_q and y_bg_q on the grid, and P_bg.
    "separate": (1, {}, 5 * 5 * (16 + 16 + 2) + 16),
    "shared": (5, {"shared_reducer": True}, 5 * 5 * (16 + 2) + 16),
    "prior": (1, {"prior": True}, 5 * 5 * (16 + 16 + 2 + FEATURES) + 16),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cache_changes_no_bit_of_qpenet(name):
    shots, fields, floats = CASES[name]
    model = QPENet(**SMALL, **fields)
    params = draw_params(model)

    def forward(params, *inputs):
        return model.apply({"params": params}, *inputs)

    predict = qpenet_predictor(model, BACKBONE, params, weights())
    assert bytes_of(predict) == 4 * floats
    check(predict, make_eval_step(forward), params, shots)


def test_the_cache_changes_no_bit_of_the_baseline():
    step = make_eval_step(lambda _, *inputs: nearest_prototype(*inputs))
    check(TrainingFreePredictor(BACKBONE, weights()), step, {}, shots=5)


class Counting(Predictor):
    """A predictor of constant margins that counts its encoded images in memory."""

    def __init__(self):
        self.encoded, self.most = [], 0

    def encode(self, images, roles=ROLES, padding=None):
        encoded = jnp.asarray(images)
        if isinstance(images, np.ndarray):  # not a traced shape
            self.encoded.append(weakref.ref(encoded))
        return encoded

    def decode(self, supports, masks, query, *, named=False):
        gc.collect()  # JAX's arrays are in cycles
        self.most = max(self.most, sum(ref() is not None for ref in self.encoded))
        return np.ones((1, SIDE, SIDE), np.float32)


@pytest.mark.parametrize("images", [1, 9, 100])
def test_memory_is_bounded(images):
    """Three images at least, as a 2-shot episode has so many."""
    protocol, samplers = setting(shots=2, episodes=20)
    limit, counting = images * SIDE * SIDE * 3, Counting()
    gc.collect()
    gc.freeze()  # what was there before isn't searched every time
    try:
        score_episodes(counting, data(), protocol, samplers, cache_bytes=limit)
    finally:
        gc.unfreeze()
    assert counting.most <= max(images, 3)
    if images == 100:
        assert counting.most == len(
            images_of([s(i) for s in samplers for i in range(20)])
        )


def test_other_parameters_need_no_compilation():
    """As the evaluations for the selection while training have."""
    net = Backbone(Patches("once"), ("stage",), FEATURES)
    protocol, samplers = setting(shots=1, episodes=2)
    found = []
    for factor in (1, 2):
        model = QPENet(**SMALL)  # equal, but another object
        params = jax.tree.map(lambda x, n=factor: n * x, draw_params(model))
        predict = qpenet_predictor(model, net, params, weights())
        found.append(Spy(predict))
        score_episodes(found[-1], data(), protocol, samplers)
    assert TRACES["once"] == 1
    assert not np.array_equal(found[0].margins, found[1].margins)


def test_frozen_episodes_and_workers_change_nothing():
    protocol, samplers = setting(shots=2, scoring="input", resize="squash")
    predict = TrainingFreePredictor(BACKBONE, weights())
    drawn = score_episodes(predict, data(), protocol, samplers).rows
    frozen = [
        FrozenEpisodes(s.seed, tuple(map(s, range(protocol.episodes))))
        for s in samplers
    ]
    again = score_episodes(predict, data(), protocol, frozen, workers=1).rows
    np.testing.assert_array_equal(again, drawn)
    padded, _ = setting(shots=2, scoring="input")
    assert (score_episodes(predict, data(), padded, samplers).rows != drawn).any()


def test_devices_share_the_episodes():
    """One device stands for several; 14 episodes leave parts of other lengths."""
    predict = TrainingFreePredictor(BACKBONE, weights())
    protocol, samplers = setting(shots=2)
    inputs = predict, data(), protocol, samplers
    alone = score_episodes(*inputs).rows
    for count in (2, 20):  # of 20 some have nothing to do
        rows = score_episodes(*inputs, devices=jax.devices() * count).rows
        np.testing.assert_array_equal(rows, alone)
