"""Segment a photo by another one that is marked.

python docs/examples/segment.py RUN PHOTO MASK QUERY OUT
"""

import sys

from PIL import Image

import qpenet_jax


def segment(run, photo, mask, query, out):
    """Writes the query's mask, 255 where the object is."""
    segmenter = qpenet_jax.load(run)
    task = segmenter.learn([Image.open(photo)], [Image.open(mask)])  # or several
    found = task(Image.open(query))  # uint8 [height, width]: 1 object, 0 background
    Image.fromarray(255 * found).save(out)


if __name__ == "__main__":
    segment(*sys.argv[1:])
