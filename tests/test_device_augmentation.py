"""Augmentation by XLA against OpenCV's, with the same random draws."""

import contextlib
import functools
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from qpenet_jax.benchmark.made_up import made_up_photo
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import IGNORE
from qpenet_jax.data.augmentation import Augmentation
from qpenet_jax.data.device_augmentation import (
    RawEpisode,
    augment_episodes,
    scaled_side,
)
from qpenet_jax.data.episodes import EpisodeIds, EpisodeSampler
from qpenet_jax.data.loader import canvas_side, load_episode, load_raw_episode
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.runs.build import complete
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.datasets import build_dataset, build_train_sampler
from qpenet_jax.training import batches as training

pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("optimised_code")]

WIDE = (0.8, 1.25)
STILL = {"scale": (1.0, 1.0), "rotate": 0.0, "blur": False, "flip": False}
OPERATIONS = {"scale": WIDE, "rotate": 10.0, "blur": True, "flip": True}
"""What varies where it isn't still."""


class Pictures:
    """A data set of the arrays that it is given: images with labels of class 1."""

    classes = ("thing",)

    def __init__(self, pairs):
        self._pairs = list(pairs)
        self.names = [f"picture {i}" for i in range(len(self._pairs))]
        self.counts = np.array([[(label == 1).sum()] for _, label in self._pairs])

    def __len__(self):
        return len(self._pairs)

    def image(self, index):
        return self._pairs[index][0]

    def label(self, index):
        return self._pairs[index][1]


def photo(index: int, height: int, width: int):
    """A made-up photo of any size; its object is class 1."""
    image, label = made_up_photo(index)
    label = np.where(label == index % 4 + 1, 1, label).astype(np.uint8)
    label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), label


def episode_of(dataset, index: int) -> EpisodeIds:
    """The whole data set as one episode."""
    return EpisodeIds(index, 0, 1, tuple(range(1, len(dataset))))


def batch_of(episodes) -> RawEpisode:
    return jax.tree.map(lambda *parts: np.stack(parts), *episodes)


def on_device(dataset, index: int, side: int, augmentation: Augmentation, canvas: int):
    """Augmented images and masks, query first."""
    ids = episode_of(dataset, index)
    raw = load_raw_episode(dataset, ids, canvas, side, augmentation, seed=5)
    batch = batch_of([raw])
    # More room than scaling needs: one compilation serves all ranges.
    more = scaled_side(canvas, Augmentation(WIDE)) - batch.draws.nearest.shape[-1]
    nearest = np.pad(batch.draws.nearest, [(0, 0)] * 3 + [(0, more)])
    batch = batch._replace(draws=batch.draws._replace(nearest=nearest))
    return joined(augment_episodes(batch, side=side), 1)


def on_host(dataset, index: int, side: int, augmentation: Augmentation):
    """The same by OpenCV."""
    ids = episode_of(dataset, index)
    return joined(load_episode(dataset, ids, side, augmentation, seed=5), 0)


PADDED = 254


def joined(episode, axis: int):
    """Return images and masks, in which padding is told apart from other 255."""
    query_image, query_mask, images, masks, query_padding, padding = map(
        np.asarray, episode
    )
    assert (query_mask[query_padding] == IGNORE).all()
    assert (masks[padding] == IGNORE).all()
    query_mask = np.where(query_padding, np.uint8(PADDED), query_mask)
    masks = np.where(padding, np.uint8(PADDED), masks)
    images = np.concatenate([np.expand_dims(query_image, axis), images], axis)
    masks = np.concatenate([np.expand_dims(query_mask, axis), masks], axis)
    return images.reshape(-1, *images.shape[-3:]), masks.reshape(-1, *masks.shape[-2:])


def check_agreement(dataset, index: int, side: int, augmentation, canvas: int):
    """Within one grey level on 99 % of an image's pixels, 99.9 % of labels equal."""
    images, masks = on_device(dataset, index, side, augmentation, canvas)
    expected, expected_masks = on_host(dataset, index, side, augmentation)
    assert (images.dtype, masks.dtype) == (np.uint8, np.uint8)
    assert images.shape == expected.shape
    difference = np.abs(images.astype(int) - expected).max(axis=-1)
    assert (difference <= 1).mean(axis=(1, 2)).min() >= 0.99
    assert (masks == expected_masks).mean(axis=(1, 2)).min() >= 0.999


# --- Against OpenCV ---


@functools.cache
def photos() -> Pictures:
    """Landscape and portrait, larger and smaller than 473 and than 161."""
    sizes = [(375, 500), (500, 375), (500, 500), (120, 150), (100, 500)]
    return Pictures(photo(i, *size) for i, size in enumerate(sizes))


@pytest.mark.parametrize("name", [*OPERATIONS, "all", "default"])
@pytest.mark.parametrize("side", [473, 161])
def test_photos(side, name):
    alone = STILL | {name: OPERATIONS.get(name)}
    changes = {"all": OPERATIONS, "default": {}}.get(name, alone)
    check_agreement(photos(), 0, side, Augmentation(**changes), 512)


@pytest.mark.parametrize("shape", [(1, 1), (2, 90), (90, 2), (33, 33), (60, 75)])
def test_any_size_and_noise(shape):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (5, *shape, 3), np.uint8)
    dataset = Pictures((image, np.ones(shape, np.uint8)) for image in images)
    for index in range(4):
        check_agreement(dataset, index, 33, Augmentation((0.3, 1.25)), 96)


def test_without_resampling_every_pixel_is_opencvs():
    rng = np.random.default_rng(0)
    pairs = []
    for shape in [(60, 60), (40, 90), (90, 40), (20, 30), (33, 33)]:
        label = np.zeros(shape, np.uint8)
        label[5:17, -16:-4] = 1
        label[3:5] = IGNORE
        pairs.append((rng.integers(0, 256, (*shape, 3), np.uint8), label))
    still = Augmentation((1.0, 1.0), rotate=0.0)
    for index in range(10):
        ours = on_device(Pictures(pairs), index, 33, still, 96)
        theirs = on_host(Pictures(pairs), index, 33, still)
        assert all(map(np.array_equal, ours, theirs))


def test_crops_are_redrawn_as_on_the_host():
    image = np.zeros((90, 90, 3), np.uint8)
    ramp = np.arange(90, dtype=np.uint8)
    image[..., 0], image[..., 1] = ramp, ramp[:, None]  # These pixels tell the crop.
    labels = [np.zeros((90, 90), np.uint8) for _ in range(5)]
    labels[0][40:50, 40:50] = 1  # Many crops hold it;
    labels[1][10:20, 10:20] = 1  # few do, perhaps none;
    labels[2][::89, ::89] = 1  # none does; labels[3] is empty.
    labels[4][40, 35:55] = 1  # 17 of 20 pixels are enough, 16 aren't.
    still = Augmentation(**STILL)
    dataset, kept = Pictures((image, label) for label in labels), []
    for index in range(40):
        ours, masks = on_device(dataset, index, 33, still, 96)
        theirs, _ = on_host(dataset, index, 33, still)
        assert (ours == theirs).all()
        kept.append((masks == 1).sum(axis=(1, 2)))
    assert (np.min(kept, axis=0)[[0, 4]] >= [85, 17]).all()
    assert 17 in np.transpose(kept)[4]
    assert {n >= 85 for n in np.transpose(kept)[1]} == {False, True}


# --- Episodes ---


@pytest.fixture(scope="module")
def shapes():
    dataset = Shapes("train", 40, 64)
    classes = tuple(range(1, 21))
    sampler = EpisodeSampler(
        dataset.counts, classes, shots=2, seed=0, min_pixels=100, on_few="drop"
    )
    return dataset, sampler


def shapes_batch(shapes, indices) -> RawEpisode:
    dataset, sampler = shapes
    return batch_of(
        load_raw_episode(dataset, sampler(i), 64, 49, Augmentation(), seed=3)
        for i in indices
    )


def augmented(batch: RawEpisode):
    return [np.asarray(x) for x in augment_episodes(batch, side=49)]


def test_an_episode_is_that_of_load_episode_whatever_the_batch(shapes):
    """And the same inputs give the same bits."""
    dataset, sampler = shapes
    together = augmented(shapes_batch(shapes, (0, 1, 2)))
    for index in range(3):
        expected = load_episode(dataset, sampler(index), 49, Augmentation(), seed=3)
        for ours, theirs in zip(together, expected, strict=True):
            assert_close(ours[index], theirs, share=0.99)
    again = augmented(shapes_batch(shapes, (0, 1, 2)))
    turned = augmented(shapes_batch(shapes, (2, 0, 1)))
    alone = augmented(shapes_batch(shapes, (1,)))
    for a, b, c, d in zip(together, again, turned, alone, strict=True):
        assert (a == b).all()
        assert (a == c[[1, 2, 0]]).all()
        assert (a[1] == d[0]).all()


def test_what_lies_beside_an_image_on_the_canvas_is_never_read():
    dataset = Pictures(photo(i, 60 + i, 50) for i in range(5))
    ids = episode_of(dataset, 0)
    raw = load_raw_episode(dataset, ids, 96, 33, Augmentation(WIDE), seed=1)
    junk = RawEpisode(raw.images.copy(), raw.masks.copy(), raw.draws)
    for slot, (height, width) in enumerate(raw.draws.size):
        for array in (junk.images, junk.masks):
            array[slot, height:] = array[slot, :, width:] = 77
    clean, other = (augment_episodes(batch_of([x]), side=33) for x in (raw, junk))
    assert all(map(np.array_equal, clean, other))


def test_canvases_hold_the_largest_image_up_to_a_cap():
    assert canvas_side(np.array([[375, 500], [480, 333]]), 473) == 512
    assert canvas_side(np.array([[640, 333]]), 473) == 640
    assert canvas_side(np.array([[3, 641]]), 473) == 672
    assert canvas_side(np.array([[375, 500], [3000, 4000]]), 473) == 1024
    assert canvas_side(np.array([[3000, 4000]]), 1041) == 1056, "as a crop needs"
    assert scaled_side(512, Augmentation(WIDE)) == 640
    assert scaled_side(512, Augmentation((0.3, 0.5))) == 256


@pytest.mark.parametrize("scale", [(0.9, 1.1), (0.2, 0.3)])
def test_what_is_larger_than_the_canvas_is_the_hosts_to_the_last_bit(scale):
    """In one batch with images that fit, in any order of their sizes."""
    shapes = [(40, 97), (90, 60), (300, 401), (33, 33)]
    dataset = Pictures(photo(i, *shape) for i, shape in enumerate(shapes))
    ids, varied = episode_of(dataset, 0), Augmentation(scale)
    for seed in range(4):
        raw = load_raw_episode(dataset, ids, 96, 49, varied, seed)
        assert raw.images.shape == (4, 96, 96, 3)
        device = joined(augment_episodes(batch_of([raw]), side=49), 1)
        host = joined(load_episode(dataset, ids, 49, varied, seed=seed), 0)
        for ours, theirs in zip(device, host, strict=True):
            for larger in (0, 2):
                np.testing.assert_array_equal(ours[larger], theirs[larger])
            assert_close(ours, theirs, share=0.99)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where decoded images are kept, in place of the user's folder."""
    monkeypatch.setattr(training, "DECODED", tmp_path)


CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"


@pytest.mark.usefixtures("cache")
def test_one_huge_photo_is_named_and_leaves_the_batch_small(capsys):
    words = ["--config.augment_on=device", "--config.side=65"]
    pictures = [photo(0, 3000, 4000), photo(1, 60, 90), photo(2, 70, 70)]
    config = complete(load_config(CONFIG, words))
    load = training.training_loader(config, Pictures(pictures))
    assert capsys.readouterr().err.endswith(
        "1 of 3 images are larger than 1024 pixels: the host augments them\n"
    )
    raw = load(EpisodeIds(0, 0, 1, (1,)))
    assert raw.images.nbytes + raw.masks.nbytes == 2 * 1024**2 * 4


# --- Devices ---


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_it_lowers_for_accelerators(shapes, platform):
    augmenter = jax.jit(functools.partial(augment_episodes, side=49))
    batch = shapes_batch(shapes, range(2))
    exported = jax.export.export(augmenter, platforms=[platform])(batch)
    assert exported.platforms == (platform,)
    expected = jax.eval_shape(augmenter, batch)
    assert [(x.shape, x.dtype) for x in exported.out_avals] == [
        (x.shape, x.dtype) for x in expected
    ]


@pytest.mark.usefixtures("cache")
def test_a_run_trains_on_the_same_batches():
    """config.augment_on chooses; the steps see what the host would have made."""
    words = ["--config.side=65", "--config.dataset.side=97", "--config.seed=3"]
    words += ["--config.dataset.train_images=40", "--config.dataset.on_few=drop"]
    made, split = {}, training.shardings(4)[1]
    for where in ("host", "device", "auto"):
        settings = [*words, f"--config.augment_on={where}"]
        config = complete(load_config(CONFIG, settings))
        dataset = build_dataset(config, "train")
        sampler = build_train_sampler(config, dataset)
        stream = training.build_batches(config, dataset, sampler)
        with contextlib.closing(stream):
            made[where] = training.on_devices(config, next(stream), split)
        # The tests' device is a CPU.
        assert training.augments_on_device(config) == (where == "device")
    for host, device, auto in zip(*made.values(), strict=True):
        assert_close(np.asarray(device), host)
        np.testing.assert_array_equal(auto, host)
    config = load_config(CONFIG, ["--config.augment_on=gpu"])
    with pytest.raises(InputError, match="augment_on='gpu': choose auto, device, host"):
        complete(config)


def assert_close(ours, expected, share=0.999):
    difference = np.abs(ours.astype(int) - expected.astype(int))
    assert ours.shape == expected.shape
    assert np.mean(difference <= 1) >= share
