"""Segments marked photos for the page's buttons; nothing here needs a page.

Nothing is kept between calls: all that a visitor has done comes with each of them, so
that visitors can't get in each other's way. Files are those that the server stored.
"""

import dataclasses
import itertools
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.data.transforms import nearest
from qpenet_jax.demo.grabcut import object_around
from qpenet_jax.demo.intermediates import intermediate_pictures
from qpenet_jax.demo.photos import (
    CANVAS,
    EditorValue,
    Picture,
    SupportPhoto,
    check_number,
    editor_value,
    read_marks,
    read_photo,
    shrunk,
    supports_of,
)
from qpenet_jax.evaluation.pictures import (
    PREDICTION,
    RGB,
    SUPPORT,
    class_overlay,
    overlay,
)
from qpenet_jax.masks.annotations import UNNAMED
from qpenet_jax.masks.queries import Frame, Query
from qpenet_jax.masks.tasks import Segmentation
from qpenet_jax.masks.writers import COCO, SUMMARY, MaskWriter
from qpenet_jax.paper.sheets import DARK, heat
from qpenet_jax.segmenter import Segmenter

MOST_QUERIES = 50

LONGEST_LABEL = 60

ENDINGS = ("", "_probability", "_overlay")
"""What stands behind the name of a photo in those of its results."""

FORMATS = ("png", "coco", "coco_polygons", "labelme")

SHOWN = 1024
"""The longest side of a picture on the page; the zip holds masks of the full size."""

MOST_INTERMEDIATES = 3
"""Queries whose intermediates are shown."""


def result_names(files: Sequence[Path]) -> list[Path]:
    """Returns what the results of files are called: their names, different ones.

    Telephones call all photos alike; a number is put behind the name then. No result
    is called as the files about all photos, also where a system ignores case.

    Raises:
        InputError: no file, or more than `MOST_QUERIES`.
    """
    if not 1 <= len(files) <= MOST_QUERIES:
        raise InputError(
            f"{len(files) or 'no'} photos to segment: add 1 to {MOST_QUERIES}; for "
            "more, qpenet predict takes folders"
        )
    taken, names = {about.stem for about in (SUMMARY, *COCO.values())}, []
    for file in files:
        numbered = (f"{file.stem}_{number}" for number in itertools.count(2))
        for name in itertools.chain([file.stem], numbered):
            results = {f"{name}{end}".casefold() for end in ENDINGS}
            if not taken & results:
                break
        taken |= results
        names.append(Path(name))
    return names


def checked_label(label: str) -> str:
    """Returns what the object is called in files.

    Raises:
        InputError: signs that can't be printed, or too many.
    """
    name = label.strip() or UNNAMED
    if len(name) > LONGEST_LABEL or not name.isprintable():
        raise InputError(
            f"a name of {len(name)} signs: give up to {LONGEST_LABEL} on one line"
        )
    return name


def _marked(support: SupportPhoto) -> Picture:
    picture = shrunk(overlay(support.pixels, support.mask, SUPPORT), SHOWN)
    return Picture(picture, f"{support.name}: {_percent(support.mask == 1)}")


def _mask(name: str, pixels: RGB, found: Segmentation) -> Picture:
    (score,), share = found.scores, _percent(found.index == 1)
    result = "nothing found" if score is None else f"{share}, score {score:.2f}"
    picture = shrunk(class_overlay(pixels, found.index, 1), SHOWN)
    return Picture(picture, f"{name}: {result}")


def _probability(name: str, pixels: RGB, found: Segmentation) -> Picture:
    (probable,), below = found.probabilities, shrunk(pixels, SHOWN)
    small = cv2.resize(probable, below.shape[1::-1], interpolation=cv2.INTER_AREA)
    highest = f"{name}: at most {100 * float(probable.max()):.0f} %"
    return Picture(heat(small, DARK * below, PREDICTION), highest)


def _percent(where) -> str:
    share = 100 * float(np.mean(where))
    return f"{share:.{int(share < 1)}f} % of the photo"


CHOSEN = ("hexagon", "disc", "star")
"""Of the shapes that the first images show often enough, those that features of
EfficientNet-Lite0 find best without training; most others they find worse."""

EXAMPLE_SIDE, EXAMPLE_IMAGES = 321, 60

EXAMPLE_SUPPORTS, EXAMPLE_QUERIES = 3, 4

LEAST = 0.05
"""Share of its picture that a shape covers."""


THUMBNAIL = 320

Files = Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Calls:
    """Calls of a page about one segmenter, whose files go into the folder `cache`.

    `about` is what summaries say of it. All raise InputError, which the page shows.
    """

    segmenter: Segmenter
    about: Mapping[str, Any]
    cache: Path

    @property
    def trained(self) -> bool:
        """Whether there is a network with parts to look into."""
        return self.about["method"] != "prototype"

    def show_marks(
        self, files: Files, before: Files, *values: EditorValue
    ) -> list[dict[str, Any]]:
        """Returns the editors' values for these files; marks stay with their file.

        `before` are the files that the editors showed, and `values` theirs.
        """
        check_number(_paths(files))
        known = dict(zip(before or (), map(read_marks, values), strict=False))
        return [editor_value(file, known.get(str(file))) for file in _paths(files)]

    def find_object(
        self, number: int, files: Files, value: EditorValue
    ) -> dict[str, Any]:
        """Returns an editor's value with the painted object marked up to its edges."""
        file, mask = _paths(files)[number], read_marks(value)
        if mask is not None:
            picture = shrunk(read_photo(file), CANVAS)
            touched = nearest(mask.astype(np.uint8), *picture.shape[1::-1]) == 1
            mask = object_around(picture, touched)
        return editor_value(file, mask)

    def show_queries(self, files: Files) -> list[Picture]:
        """Returns small pictures of photos to segment."""
        return [
            Picture(shrunk(read_photo(file), THUMBNAIL), file.name)
            for file in _paths(files)
        ]

    def show_example(
        self, name: str
    ) -> tuple[list[str], list[dict[str, Any]], list[str], list[Picture], str]:
        """Returns what an example fills in, of pictures of shapes drawn on the spot.

        These are pictures that show the shape `name`, their editors' values with it
        marked, pictures to segment, the same small, and the label. They are the first
        in which it is large enough, none is left out.
        """
        source, folder = Shapes("val", EXAMPLE_IMAGES, EXAMPLE_SIDE), self._new_folder()
        class_id, files, masks = source.classes.index(name) + 1, [], []
        for i in range(EXAMPLE_IMAGES):
            mask = source.label(i) == class_id
            if mask.mean() >= LEAST and len(files) < EXAMPLE_SUPPORTS + EXAMPLE_QUERIES:
                files.append(str(folder / f"{source.names[i]}.png"))
                masks.append(mask)
                PIL.Image.fromarray(source.image(i)).save(files[-1])
        supports, queries = files[:EXAMPLE_SUPPORTS], files[EXAMPLE_SUPPORTS:]
        values = list(map(editor_value, _paths(supports), masks))
        return supports, values, queries, self.show_queries(queries), name

    def segment(
        self,
        files: Files,
        values: Sequence[EditorValue],
        queries: Files,
        label: str,
        refine: bool,
        bar: Callable[[Sequence[int]], Iterable[int]] = iter,
    ) -> tuple[str, list[Picture], list[Picture], list[Picture], list[Picture]]:
        """Segments photos and writes all results into a zip.

        It holds what `qpenet predict --probability` writes in `FORMATS`, for photos
        that lie beside the results. Returns its path, and pictures of masks, of
        probabilities, of the first photos' intermediates, and of what was marked. `bar`
        may show how far it is. One photo at a time is in memory.
        """
        supports, photos = supports_of(_paths(files), values), _paths(queries)
        name, out = checked_label(label), self._new_folder()
        names = result_names(photos)
        tasks = self.segmenter.learn_classes(
            {name: ([s.pixels for s in supports], [s.mask for s in supports])}
        )
        results = MaskWriter(
            out, (name,), FORMATS, probabilities=True, about=self.about, photos=out
        )
        masks, probabilities, inside = [], [], []
        for i in bar(range(len(photos))):
            pixels = read_photo(photos[i])
            found = tasks.find(pixels, refine=refine, probabilities=True)
            photo = names[i].with_name(f"{names[i]}{photos[i].suffix}")
            results.add(Query(photo, names[i], photo), Frame(pixels, names[i]), found)
            masks.append(_mask(photo.name, pixels, found))
            probabilities.append(_probability(photo.name, pixels, found))
            if self.trained and i < MOST_INTERMEDIATES:
                seen = tasks.tasks[name].intermediates(pixels)
                drawn = intermediate_pictures(
                    pixels, supports, seen, self.segmenter.side
                )
                inside += [Picture(x, f"{photo.name}: {note}") for x, note in drawn]
        results.finish()
        archive = shutil.make_archive(str(self._new_folder() / "masks"), "zip", out)
        shutil.rmtree(out)
        return archive, masks, probabilities, inside, list(map(_marked, supports))

    def _new_folder(self) -> Path:
        """Returns a folder whose name nobody can guess."""
        folder = self.cache / secrets.token_hex(16)
        folder.mkdir()
        return folder


def _paths(files: Files) -> list[Path]:
    return [Path(file) for file in files or ()]
