"""The page of `qpenet demo`: Gradio's components, and which calls they make."""

import functools
import html
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import IMAGE_SUFFIXES
from qpenet_jax.demo.photos import MOST_SUPPORTS, OPACITY
from qpenet_jax.demo.segmenting import (
    CHOSEN,
    LONGEST_LABEL,
    MOST_INTERMEDIATES,
    Calls,
)
from qpenet_jax.evaluation.pictures import SUPPORT


class Closing:
    """Ends the call that segments before its files go."""

    def __init__(self):
        self._closed, self.segmenting = threading.Event(), threading.Lock()

    def while_open(self, steps: Iterable[int]) -> Iterator[int]:
        """Yields steps of a call; raises InputError before the next one once closed."""
        for step in steps:
            if self._closed.is_set():
                raise InputError("the page has been closed")
            yield step

    def close(self) -> None:
        """Lets the call end after its next step, and waits until it has."""
        self._closed.set()
        self.segmenting.acquire()


LOOKED, KEPT = 600, 6 * 3600
"""Seconds between two searches for old photos and results, and how old those are."""

HOW_TO_MARK = (
    "Paint over the whole object. Or put a dot on it, or a line across it, and press "
    "*Find its edges*: they are found by colour, roughly."
)

PROBABILITIES = (
    "How sure it is of each place: dark is 0, orange 3/4, white 1. From 1/2 on a place "
    "belongs to the mask. It is the method's own estimate and isn't calibrated."
)

INSIDE = (
    "What the parts of QPENet made of the photos, as `qpenet figures` draws it; of the "
    f"first {MOST_INTERMEDIATES} photos that were segmented."
)

NOT_INSIDE = (
    "Nothing to see: the method prototype has no such parts. Start `qpenet demo` "
    "without it to see what PPG, DPE and GBC find."
)


def build(gr: Any, calls: Calls, work: Closing) -> Any:
    """Returns the page, a `Blocks` of Gradio (`gr`); `work` can end a call."""
    with gr.Blocks(
        title="qpenet demo", analytics_enabled=False, delete_cache=(LOOKED, KEPT)
    ) as page:
        gr.Markdown(introduction(calls.about))
        with gr.Row():
            examples = {
                name: gr.Button(f"Example: {name}", size="sm", min_width=90)
                for name in CHOSEN
            }
        with gr.Row():
            with gr.Column(min_width=320):
                gr.Markdown("## 1. Mark the object")
                files = _files(gr, f"One to {MOST_SUPPORTS} photos that show it")
                gr.Markdown(HOW_TO_MARK)
                columns, editors, buttons = zip(*_editors(gr), strict=True)
            with gr.Column(min_width=320):
                gr.Markdown("## 2. Where to look for it")
                queries = _files(gr, "Photos to segment")
                preview = _gallery(gr, "preview", columns=4)
                label = gr.Textbox(
                    label="What it is called in the files",
                    placeholder="object",
                    max_length=LONGEST_LABEL,
                )
                refine = gr.Checkbox(label="Draw masks to the edges of the photo")
                start = gr.Button("Segment", variant="primary")
        parts = [files, columns, editors, queries, preview, label]
        _connect_photos(gr, calls, parts, examples, buttons)
        start.click(
            _with_errors(gr, _segment(gr, calls, work)),
            [files, queries, label, refine, *editors],
            _results(gr, calls.trained),
            api_name="segment",
            concurrency_limit=1,  # one computes at a time, the others wait in a queue
        )
    return page


def _results(gr: Any, trained: bool) -> list[Any]:
    """Returns a column, which is shown once there are results, and what is in it."""
    notes = {
        "Masks": "",
        "Probability": PROBABILITIES,
        "Intermediates": INSIDE if trained else NOT_INSIDE,
        "Marked": "",
    }
    with gr.Column(visible=False) as column:
        gr.Markdown("## 3. What was found")
        download = gr.DownloadButton(
            "Download all as a zip: PNG, COCO, labelme, probabilities"
        )
        galleries = []
        for name, note in notes.items():
            with gr.Tab(name):
                gr.Markdown(note, visible=bool(note))
                columns = 4 if name == "Intermediates" else 2
                galleries.append(_gallery(gr, name.lower(), columns))
    return [column, download, *galleries]


def _connect_photos(
    gr: Any,
    calls: Calls,
    parts: Sequence[Any],
    examples: Mapping[str, Any],
    buttons: Sequence[Any],
) -> None:
    """Lets photos and marks show, whenever one comes or goes."""
    files, columns, editors, queries, preview, label = parts
    inner, shown = {"api_visibility": "private"}, gr.State([])
    marked = [shown, *columns, *editors]

    def show(paths, before, *values):
        return _in_editors(gr, paths, calls.show_marks(paths, before, *values))

    def show_example(name):
        paths, values, *others = calls.show_example(name)
        return *_in_editors(gr, paths, values), paths, *others

    for event in (files.upload, files.delete, files.clear):
        given = [files, shown, *editors]
        event(_with_errors(gr, show), given, marked, **inner)
    for number, (editor, button) in enumerate(zip(editors, buttons, strict=True)):
        find = _with_errors(gr, functools.partial(calls.find_object, number))
        button.click(find, [files, editor], editor, **inner)
    for event in (queries.upload, queries.delete, queries.clear):
        event(_with_errors(gr, calls.show_queries), queries, preview, **inner)
    filled = [*marked, files, queries, preview, label]
    for name, button in examples.items():
        act = _with_errors(gr, functools.partial(show_example, name))
        button.click(act, None, filled, **inner)


def _in_editors(gr: Any, files: Sequence[str] | None, values: Sequence[Any]) -> list:
    """Returns the files, columns that show as many editors, and the editors' values.

    An editor's canvas has the size of its picture: else Gradio draws marks elsewhere.
    """
    columns = [gr.Column(visible=n < len(values)) for n in range(MOST_SUPPORTS)]
    editors = [
        gr.ImageEditor(
            value=value,
            label=Path(file).name,
            canvas_size=value["background"].shape[1::-1],
        )
        for file, value in zip(files or (), values, strict=True)
    ]
    return [files or [], *columns, *editors, *[None] * (MOST_SUPPORTS - len(values))]


def _segment(gr: Any, calls: Calls, work: Closing) -> Callable[..., Any]:
    """Returns `calls.segment` with a bar that shows how far it is."""
    bar = gr.Progress()  # Gradio finds it as a default value

    def segment(files, queries, label, refine, progress=bar, *values):
        def counted(steps):
            photos = progress.tqdm(steps, desc="segmenting", unit="photos")
            return work.while_open(photos)

        with work.segmenting:
            found = calls.segment(files, values, queries, label, refine, counted)
        return gr.Column(visible=True), *found

    return segment


def _with_errors(gr: Any, function: Callable) -> Callable:
    """Returns a function of which the page shows an `InputError` as its one line."""

    def called(*given):
        try:
            return function(*given)
        except InputError as error:
            message = html.escape(str(error))  # a file's name may hold tags
            raise gr.Error(message, print_exception=False) from None

    return functools.update_wrapper(called, function)


def introduction(about: Mapping[str, Any]) -> str:
    """Returns the page's first lines as Markdown: what it does, and by what."""
    if about["method"] == "qpenet":
        what = f"the trained network of `{about['run']}`"
    elif about["method"] == "starter":
        what = "a small network that comes with this program, with features compared"
    else:
        features = about.get("backbone") or f"the run {about['run']}"
        what = f"features of `{features}` are compared, nothing is trained for it"
    return (
        "# Few-shot segmentation\nMark an object in one to five photos, and it is "
        f"looked for in others. What segments: {what}. Photos stay on this machine."
    )


def _files(gr: Any, label: str) -> Any:
    kinds = sorted(IMAGE_SUFFIXES)
    return gr.File(label=label, file_count="multiple", file_types=kinds, height=130)


def _editors(gr: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yields for each photo to mark a column, the editor in it, and what finds edges.

    demo/photos.py describes an editor's value.
    """
    for _ in range(MOST_SUPPORTS):
        with gr.Column(visible=False) as column:
            editor = gr.ImageEditor(
                type="numpy",
                image_mode="RGBA",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(
                    16, colors=[(f"rgb{SUPPORT}", OPACITY)], color_mode="fixed"
                ),
                eraser=gr.Eraser(16),
                height=300,
                elem_classes="mark",
            )
            button = gr.Button("Find its edges", size="sm")
        yield column, editor, button


def _gallery(gr: Any, name: str, columns: int = 2) -> Any:
    """Returns a component that shows pictures with captions; a click enlarges one."""
    return gr.Gallery(
        elem_id=name,
        columns=columns,
        format="jpeg",
        height="max-content",  # with "auto", the lower rows are cut off
        object_fit="contain",
        interactive=False,
        show_label=False,
        buttons=["fullscreen"],
    )
