"""The front door on arrays: sizes, shots, bad input (test_train.py uses a real run)."""

import numpy as np
import pytest
from PIL import Image, ImageOps
from predictors import SIDE, Red, picture

from qpenet_jax import InputError, Segmenter

SEGMENT = Segmenter(Red(), SIDE)


@pytest.mark.parametrize("size", [(64, 64), (97, 40), (300, 500), (1, 1), (5000, 3)])
def test_the_mask_has_the_querys_size_and_place(size):
    query, truth = picture(*size)
    mask = SEGMENT(query, *picture(50, 60))
    assert mask.dtype == np.uint8
    assert mask.shape == size
    assert (mask == truth).mean() > (0.97 if min(size) > 3 else 0)
    query[...] = (255, 0, 0)
    assert SEGMENT(query, *picture(50, 60)).all()


def test_all_supports_reach_the_network_and_are_encoded_once():
    """Ten queries at five shots are fifteen encodings."""
    network = Red()
    supports = [picture(50 + k, 60 - 6 * k) for k in range(5)]
    images, masks = zip(*supports, strict=True)
    task = Segmenter(network, SIDE).learn(images, masks)
    assert [roles for roles, _ in network.encoded] == [("support",)] * 5
    for i in range(10):
        query, truth = picture(60, 40 + i)
        assert (task(query) == truth).mean() > 0.97
    assert [roles for roles, _ in network.encoded[5:]] == [("query",)] * 10
    encoded, seen = network.decoded[-1]
    assert [x.shape for x in encoded] == [(1, SIDE, SIDE, 3)] * 5
    assert seen.shape == (1, 5, SIDE, SIDE)
    assert (seen == 1).any((2, 3)).all()
    assert (seen == 255).any()  # padding counts nowhere


def test_a_probability_says_more_than_the_mask():
    image, mask = picture(40, 50)
    task = SEGMENT.learn(image, mask)
    query, truth = picture(90, 70)
    probability = task.probability(query)
    assert probability.shape == (90, 70)
    assert ((probability >= 0) & (probability <= 1)).all()
    np.testing.assert_array_equal(probability > 0.5, task(query) == 1)
    assert (probability > 0.99)[truth == 1].mean() > 0.9


def learned(image, mask):
    """Return the mask [s, s] that the network is given."""
    network = Red()
    Segmenter(network, SIDE)(picture(20, 20)[0], image, mask)
    ((_, masks),) = network.decoded
    return masks[0, 0]


@pytest.mark.parametrize(
    "given",
    [
        lambda mask: mask.astype(bool),
        lambda mask: mask.astype(np.int64),
        lambda mask: mask.astype(np.float32),
        lambda mask: 255 * mask,
        lambda mask: 255.0 * mask,
        lambda mask: 7 * mask,
        lambda mask: 257 * mask.astype(np.int32),
        lambda mask: mask[..., None],
        lambda mask: mask[::-1][::-1],
        lambda mask: mask.tolist(),
        Image.fromarray,
        lambda mask: Image.fromarray(255 * mask),
        lambda mask: Image.fromarray(255 * mask).convert("1"),
        lambda mask: Image.fromarray(mask.astype(np.int32)),
        lambda mask: Image.fromarray(300 * mask.astype(np.uint16)),
        lambda mask: Image.frombytes("P", mask.shape[::-1], (3 * mask).tobytes()),
    ],
)
def test_every_plain_kind_of_mask_means_the_same(given):
    image, mask = picture(40, 50)
    np.testing.assert_array_equal(learned(image, given(mask)), learned(image, mask))


def test_255_beside_another_value_is_ignored_whatever_the_type():
    image, mask = picture(40, 50)
    whole = learned(image, mask)
    mask[:20] = 255
    expected = learned(image, mask)
    assert (expected == 255).sum() > (whole == 255).sum()
    for kind in (np.int64, np.float64):
        np.testing.assert_array_equal(learned(image, mask.astype(kind)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda mask: mask + 6 * np.eye(*mask.shape, dtype=np.uint8),
            "values, 1, 6, 7",
        ),
        (lambda mask: np.where(mask == 1, 7, 257), "values, 7, 257;"),
        (lambda mask: 0.97 * mask, "0.97, which is no label"),
        (lambda mask: np.where(mask == 1, np.nan, 0), "nan, which is no label"),
        (lambda mask: np.where(mask == 1, np.inf, 0), "inf, which is no label"),
        (lambda mask: np.where(mask == 1, 1e30, 0), "1e\\+30, which is no label"),
        (lambda mask: -mask.astype(int), "value -1"),
        (lambda mask: mask.astype(complex), "complex128: give booleans"),
        (lambda mask: mask.astype(str), "give booleans"),
        (lambda mask: mask.astype(object), "object: give booleans"),
        (lambda mask: np.stack([mask] * 3, -1), r"\[40, 50, 3\]: give \[height, width"),
        (lambda mask: Image.fromarray(mask).convert("RGB"), r"\[40, 50, 3\]"),
        (lambda mask: mask[None], r"\[1, 40, 50\]"),
        (lambda mask: mask.T, "40x50 pixels for an image of 50x40"),
        (lambda mask: None, r"\[\]: give"),
    ],
)
def test_a_mask_that_could_mean_something_else_is_refused(change, message):
    image, mask = picture(40, 50)
    with pytest.raises(InputError, match=f"mask 1.*{message}") as error:
        SEGMENT.learn(image, change(mask))
    assert "\n" not in str(error.value)


def test_images_may_be_pil_images_and_views_of_arrays():
    query, mask = picture(40, 50)
    expected = SEGMENT(query, query, mask)
    assert (expected == mask).mean() > 0.97
    bgr = query[..., ::-1].copy()
    for given in (
        Image.fromarray(query),
        bgr[..., ::-1],
        Image.fromarray(query, "RGB"),
    ):
        np.testing.assert_array_equal(SEGMENT(given, given, mask), expected)
        found = SEGMENT.learn([given, given], [mask, mask])(given)
        np.testing.assert_array_equal(found, expected)
    grey = Image.fromarray(query).convert("L")
    assert SEGMENT(grey, query, mask).shape == (40, 50)


def test_a_pil_image_that_its_metadata_turn_is_refused(tmp_path):
    """Its mask may be drawn either way, and so may the result be wanted."""
    query, mask = picture(40, 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(query).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        with pytest.raises(InputError, match=r"support image 1: .*exif_transpose"):
            SEGMENT.learn(turned, mask)
        with pytest.raises(InputError, match=r"query image: .*exif_transpose"):
            SEGMENT(turned, query, mask)
        upright = ImageOps.exif_transpose(turned)
    assert SEGMENT(upright, query, mask).shape == (50, 40)


def test_a_broken_pil_image_is_one_line(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / "cut.jpg"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-600])
    with Image.open(path) as cut, pytest.raises(InputError, match="image: broken"):
        SEGMENT(cut, *picture(40, 50))


def test_small_objects_of_one_photograph_are_tasks_of_their_own():
    colours = {(500, 700): (250, 0, 0), (2803, 3700): (0, 0, 250)}
    photograph = np.full((3000, 4000, 3), 90, np.uint8)
    for (y, x), colour in colours.items():
        photograph[y : y + 10, x : x + 10] = colour
    for (y, x), colour in colours.items():
        mask = np.zeros(photograph.shape[:2], np.uint8)
        mask[y : y + 10, x : x + 10] = 1
        task = SEGMENT.learn(photograph, mask)
        cells = task.masks[0, 0, ::8, ::8] == 1
        mean = task.supports[0][0, ::8, ::8][cells].mean(0)
        assert abs(mean - colour).max() < 80


def test_bad_input_is_one_line():
    image, mask = picture(40, 40)
    for message, query, supports, masks in (
        ("no foreground", image, image, np.zeros_like(mask)),
        ("make them equal", image, image, mask[:-1]),
        ("one mask for every support", image, [image, image], [mask]),
        ("one mask for every support", image, [], []),
        ("uint8 RGB", image[..., 0], image, mask),
        ("uint8 RGB", image.astype(np.float32), image, mask),
        ("support image 2 is uint8", image, [image, image[..., :2]], [mask, mask]),
        ("no pixel", image[:0], image, mask),
    ):
        with pytest.raises(InputError, match=message):
            SEGMENT(query, supports, masks)
