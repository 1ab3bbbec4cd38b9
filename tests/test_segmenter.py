"""The front door on arrays: sizes, shots, bad input (test_train.py uses a real run)."""

import numpy as np
import pytest

from qpenet_jax import InputError, Segmenter

SIDE = 65


def red(episode):
    """A stand-in for the network: red query pixels are foreground."""
    images = episode.query_image.astype(np.float32)
    return images[..., 0] - images[..., 1] - 60


SEGMENT = Segmenter(red, SIDE)


def picture(height, width):
    """A red left half on grey."""
    image = np.full((height, width, 3), 128, np.uint8)
    image[:, : width // 2] = (255, 0, 0)
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 1
    return image, mask


@pytest.mark.parametrize("size", [(64, 64), (97, 40), (40, 97), (300, 500)])
def test_the_mask_has_the_querys_size_and_place(size):
    query, truth = picture(*size)
    support, support_mask = picture(50, 60)
    mask = SEGMENT(query, support, support_mask)
    assert mask.dtype == np.uint8
    assert mask.shape == size
    assert (mask == truth).mean() > 0.97


@pytest.mark.parametrize("size", [(1, 1), (5000, 3), (3, 5000)])
def test_extreme_sizes_work(size):
    support, support_mask = picture(50, 60)
    query = np.zeros((*size, 3), np.uint8)
    query[..., 0] = 255
    assert SEGMENT(query, support, support_mask).shape == size
    assert SEGMENT(query, support, support_mask).any()


def test_all_supports_reach_the_network():
    seen = []

    def predict(episode):
        seen.append(episode)
        return red(episode)

    supports = [picture(50, 60), picture(80, 30), picture(31, 31)]
    images, masks = zip(*supports, strict=True)
    Segmenter(predict, SIDE)(picture(40, 40)[0], images, masks)
    assert seen[0].support_images.shape == (1, 3, SIDE, SIDE, 3)
    assert seen[0].support_masks.shape == (1, 3, SIDE, SIDE)
    assert (seen[0].support_masks == 1).any((2, 3)).all()
    assert (seen[0].support_masks == 255).any()  # padding counts nowhere


def test_masks_may_be_boolean_or_of_any_integer_type():
    seen = []
    image, mask = picture(40, 50)
    for kind in (np.uint8, bool, np.int64):
        Segmenter(lambda e: seen.append(e) or red(e), SIDE)(
            image, image, mask.astype(kind)
        )
    for episode in seen[1:]:
        np.testing.assert_array_equal(episode.support_masks, seen[0].support_masks)


def test_bad_input_is_told_in_one_line():
    image, mask = picture(40, 40)
    with pytest.raises(InputError, match="no foreground"):
        SEGMENT(image, image, np.zeros_like(mask))
    with pytest.raises(InputError, match="make them equal"):
        SEGMENT(image, image, mask[:-1])
    with pytest.raises(InputError, match="one mask for every support"):
        SEGMENT(image, [image, image], [mask])
    with pytest.raises(InputError, match="one mask for every support"):
        SEGMENT(image, [], [])
    with pytest.raises(InputError, match="uint8 RGB"):
        SEGMENT(image[..., 0], image, mask)
    with pytest.raises(InputError, match="uint8 RGB"):
        SEGMENT(image.astype(np.float32), image, mask)
