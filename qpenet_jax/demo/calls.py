"""What the page's buttons and strokes call; nothing here needs a page.

Nothing is kept between calls: all that a visitor has done comes with each of them, so
that visitors can't get in each other's way. Files are those that the server stored.
"""

import dataclasses
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qpenet_jax.demo.answers import answer
from qpenet_jax.demo.drawn import draw_example
from qpenet_jax.demo.marks import add_object, canvases, read_marks, supports_of
from qpenet_jax.demo.photos import read_photo
from qpenet_jax.demo.pictures import Picture, grid, sections, shrunk
from qpenet_jax.segmenter import Segmenter

THUMBNAIL = 320

Files = Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Calls:
    """Calls of a page about one segmenter, whose files go into the folder `cache`.

    `about` is what summaries tell of it. All raise InputError, which the page tells.
    """

    segmenter: Segmenter
    about: Mapping[str, Any]
    cache: Path

    @property
    def trained(self) -> bool:
        """Whether there is a network with parts to look into."""
        return self.about["method"] != "prototype"

    def show_marks(self, files: Files, text: str | None) -> str:
        """Returns the value of the board for these files; strokes of others go."""
        return canvases(_paths(files), read_marks(text))

    def find_object(self, files: Files, text: str | None) -> str:
        """Returns the value of the board with the clicked object marked."""
        return add_object(_paths(files), text)

    def show_queries(self, files: Files) -> str:
        """Returns small pictures of photos to segment."""
        pictures = (
            Picture(shrunk(read_photo(file), THUMBNAIL), file.name)
            for file in _paths(files)
        )
        return grid(pictures)

    def show_example(self, name: str) -> tuple[list[str], str, list[str], str, str]:
        """Returns supports, board, queries, their small pictures and the label."""
        made = draw_example(name, self._new_folder())
        marks = dict(zip(map(str, made.supports), made.masks, strict=True))
        files, queries = (list(map(str, x)) for x in (made.supports, made.queries))
        text = canvases(made.supports, marks)
        return files, text, queries, self.show_queries(queries), name

    def segment(
        self,
        files: Files,
        text: str | None,
        queries: Files,
        label: str,
        refine: bool,
        bar: Callable[[Sequence[int]], Iterable[int]] = iter,
    ) -> tuple[str, str, str, str, str]:
        """Returns the zip's path and grids: masks, probability, inside, marked."""
        archive = self._new_folder() / "masks.zip"
        shown = answer(
            self.segmenter,
            supports_of(_paths(files), text),
            _paths(queries),
            archive,
            about=self.about,
            label=label,
            refine=refine,
            look=self.trained,
            bar=bar,
        )
        return (
            str(archive),
            grid(shown.masks),
            grid(shown.probabilities),
            sections(shown.inside),
            grid(shown.marked),
        )

    def _new_folder(self) -> Path:
        """Returns a folder whose name nobody can guess."""
        folder = self.cache / secrets.token_hex(16)
        folder.mkdir()
        return folder


def _paths(files: Files) -> list[Path]:
    return [Path(file) for file in files or ()]
