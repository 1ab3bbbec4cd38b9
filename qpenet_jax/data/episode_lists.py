"""Frozen episodes: a CSV file that this and any other code can score exactly.

A row is one episode: seed, index, class_id, class, query, support_1 .. support_K, with
images by name. The first line holds the SHA-256 of all that follows.
"""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import write_whole
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.episodes import EpisodeIds, EpisodeSampler

HASH_LINE = "# sha256 "


def columns_of(shots: int) -> list[str]:
    """Returns the columns of a list of episodes with so many supports."""
    supports = [f"support_{k + 1}" for k in range(shots)]
    return ["seed", "index", "class_id", "class", "query", *supports]


@dataclass(frozen=True)
class FrozenEpisodes:
    """`episodes(i)` is row i of one seed in an episode list: an `EpisodeSampler`."""

    seed: int
    rows: tuple[EpisodeIds, ...]

    def __call__(self, index: int) -> EpisodeIds:
        """Returns episode `index`, below the number of rows."""
        return self.rows[index]

    @property
    def shown(self) -> tuple[int, ...]:
        """The ids of the classes that some episode shows."""
        return tuple(sorted({row.class_id for row in self.rows}))


class EpisodeList(NamedTuple):
    """What a file holds, and its hash."""

    samplers: list[FrozenEpisodes]
    sha256: str

    @property
    def fields(self) -> dict:
        """The fields of a `Protocol` that the list settles."""
        first = self.samplers[0].rows
        return {
            "shots": len(first[0].supports),
            "episodes": len(first),
            "seeds": tuple(sampler.seed for sampler in self.samplers),
            "episode_list": self.sha256,
            # What drawing goes by; here the list says it all.
            "order": "list",
            "targets": "any",
        }


def export_episodes(
    path: Path,
    dataset: SegmentationDataset,
    samplers: Sequence[EpisodeSampler],
    episodes: int,
) -> str:
    """Writes the first `episodes` of every sampler and returns the list's SHA-256."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns_of(samplers[0].shots))
    for sampler in samplers:
        for ids in map(sampler, range(episodes)):
            name = dataset.classes[ids.class_id - 1]
            images = [dataset.names[i] for i in (ids.query, *ids.supports)]
            writer.writerow([sampler.seed, ids.index, ids.class_id, name, *images])
    content = text.getvalue().encode()
    digest = hashlib.sha256(content).hexdigest()
    write_whole(path, f"{HASH_LINE}{digest}\n".encode() + content)
    return digest


def read_episodes(path: Path, dataset: SegmentationDataset) -> EpisodeList:
    """Reads an episode list for the images of a data set.

    A list without the hash line is taken as it is.

    Raises:
        InputError: the file was changed, is no episode list, or names an image or class
            that the data set doesn't have, or an image that doesn't show the class.
    """
    content = path.read_bytes()
    first, _, rest = content.partition(b"\n")
    if first.startswith(HASH_LINE.encode()):
        content = rest
    digest = hashlib.sha256(content).hexdigest()
    if content is rest and first.strip() != (HASH_LINE + digest).encode():
        raise InputError(
            f"{path} was changed: its content doesn't have the SHA-256 of the first "
            "line; get the original, or delete that line to accept the change"
        )
    seeds: dict[int, dict[int, EpisodeIds]] = {}
    position = {name: i for i, name in enumerate(dataset.names)}
    for number, row in enumerate(_rows(path, content), start=2):
        where = f"{path}, episode {number - 1}"
        seed, ids = _episode(row, dataset, position, where)
        rows = seeds.setdefault(seed, {})
        if ids.index in rows:
            raise InputError(f"{where}: seed {seed} has a second index {ids.index}")
        rows[ids.index] = ids
    if len({len(rows) for rows in seeds.values()}) != 1:
        raise InputError(
            f"{path}: every seed must have equally many episodes, one at least"
        )
    samplers = [FrozenEpisodes(s, tuple(rows.values())) for s, rows in seeds.items()]
    return EpisodeList(samplers, digest)


def _rows(path: Path, content: bytes) -> list[dict[str, str]]:
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig")))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error):
        raise InputError(f"{path} is no CSV file") from None
    columns = list(reader.fieldnames or ())
    expected = columns_of(max(len(columns) - len(columns_of(0)), 1))
    if sorted(columns) != sorted(expected):
        raise InputError(
            f"{path} is no episode list: its columns are {', '.join(columns)}, not "
            f"{', '.join(expected)} (the format is described in data/README.md)"
        )
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise InputError(
                f"{path}, episode {number}: give a value for each of the "
                f"{len(columns)} columns, and no more"
            )
    return rows


def _episode(
    row: dict[str, str],
    dataset: SegmentationDataset,
    position: dict[str, int],
    where: str,
) -> tuple[int, EpisodeIds]:
    """Returns the seed and the ids of one row."""
    try:
        seed, index, class_id = (int(row[k]) for k in ("seed", "index", "class_id"))
    except (TypeError, ValueError):
        raise InputError(
            f"{where}: seed, index and class_id must be whole numbers"
        ) from None
    if dict(enumerate(dataset.classes, start=1)).get(class_id) != row["class"]:
        raise InputError(
            f"{where}: class {class_id} {row['class']!r} is none of this data set; "
            "was the list made for another one?"
        )
    names = [row["query"], *(row[k] for k in row if k.startswith("support_"))]
    for name in names:
        if name not in position:
            raise InputError(
                f"{where}: image {name!r} isn't in this split of the data set; was the "
                "list made for another one?"
            )
        if not dataset.counts[position[name], class_id - 1]:
            raise InputError(f"{where}: image {name!r} shows no {row['class']}")
    query, *supports = (position[name] for name in names)
    if len({query, *supports}) != len(names):
        raise InputError(f"{where}: an image occurs twice")
    return seed, EpisodeIds(index, query, class_id, tuple(supports))
