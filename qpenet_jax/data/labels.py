"""What a user's label map means, before it is taken for class numbers."""

import numpy as np
from jaxtyping import UInt8

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import IGNORE


def check_numbered(label: UInt8[np.ndarray, "h w"], name: str) -> None:
    """Refuses a label map that marks pixels with 255 and nothing else.

    Drawing programs save masks so, and `read_mask` takes such a file for one object; in
    a data set 255 means ignored, and nothing would be left of the object.

    Raises:
        InputError: naming the file.
    """
    if label.any() and label[label > 0].min() == IGNORE:
        raise InputError(
            f"{name}: 255 is its only value beside 0; in a data set 255 is ignored, so "
            "write the number of the class (1 for the first of the list) instead, or "
            "take the image out"
        )
