"""Photos that a page is given: read as `qpenet predict` reads them, named."""

from collections.abc import Sequence
from pathlib import Path

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import image_size, read_image
from qpenet_jax.demo.pictures import RGB
from qpenet_jax.masks.writers import COCO, SUMMARY

MOST_PIXELS = 50_000_000
"""Of a photo: those of telephones have up to 48 million. More would fill the memory."""


def read_photo(path: Path) -> RGB:
    """Returns a photo's pixels, upright, as `read_image`; messages name the file alone.

    Raises:
        InputError: no image, a broken one, or one of more than `MOST_PIXELS`.
    """
    height, width = image_size(path, path.name)
    if height * width > MOST_PIXELS:
        raise InputError(
            f"{path.name} has {width} x {height} pixels: scale it down to "
            f"{MOST_PIXELS // 1_000_000} million, or use qpenet predict"
        )
    return read_image(path, path.name)


def result_names(files: Sequence[Path]) -> list[Path]:
    """Returns what the results of files are called: their names, different ones.

    Telephones call all photos alike; a number is put behind the name then. No result
    is called as the files about all photos.
    """
    taken = {about.stem for about in (SUMMARY, *COCO.values())}
    names = []
    for file in files:
        name, number = file.stem, 1
        while taken & _like(name):
            number += 1
            name = f"{file.stem}_{number}"
        taken |= _like(name)
        names.append(Path(name))
    return names


def _like(name: str) -> set[str]:
    """Returns the names of a photo's results, as systems that ignore case see them."""
    return {f"{name}{ending}".casefold() for ending in ("", "_probability", "_overlay")}
