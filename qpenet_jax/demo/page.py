"""The page of `qpenet demo`: Gradio's components, and which calls they make."""

import contextlib
import functools
import html
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.images import IMAGE_SUFFIXES
from qpenet_jax.demo.examples import CHOSEN
from qpenet_jax.demo.marks import MOST_SUPPORTS
from qpenet_jax.demo.segmenting import LONGEST_LABEL, MOST_INTERMEDIATES, Calls


class RunningCalls:
    """Counts calls, lets those that take long stop early, and waits for the last."""

    def __init__(self):
        self._changed = threading.Condition()
        self._calls, self._closed = 0, False

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Counts what is done meanwhile; raises InputError after `close`."""
        with self._changed:
            self._refuse_if_closed()
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def while_open(self, steps: Iterable[int]) -> Iterator[int]:
        """Yields steps of a call; raises InputError before the next one once closed."""
        for step in steps:
            self._refuse_if_closed()
            yield step

    def close(self) -> None:
        """Lets no call begin, and wait until those that have begun are through."""
        self._closed = True
        with self._changed:
            self._changed.wait_for(lambda: not self._calls)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise InputError("the page has been closed")


LOOKED, KEPT = 600, 6 * 3600
"""Seconds between two searches for old photos and results, and how old those are."""

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


class InputParts(NamedTuple):
    """What a visitor sets."""

    files: Any
    board: Any
    queries: Any
    label: Any
    refine: Any


class ResultParts(NamedTuple):
    """What a visitor gets; the first holds all others."""

    column: Any
    download: Any
    masks: Any
    probabilities: Any
    inside: Any
    marked: Any


def build(gr: Any, calls: Calls, work: RunningCalls) -> Any:
    """Returns the page, a `Blocks` of Gradio (`gr`); `work` counts its calls."""
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
                board = _board(gr)
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
        inputs = InputParts(files, board, queries, label, refine)
        with_errors = _with_errors(gr, work)
        _connect_photos(with_errors, calls, inputs, preview, examples)
        segment = with_errors(_segment(gr, calls, work))
        start.click(
            segment,
            list(inputs),
            list(_results(gr, calls.trained)),
            api_name="segment",
            concurrency_limit=1,  # one computes at a time, the others wait in a queue
        )
    return page


def _results(gr: Any, trained: bool) -> ResultParts:
    with gr.Column(visible=False) as column:
        gr.Markdown("## 3. What was found")
        download = gr.DownloadButton(
            "Download all as a zip: PNG, COCO, labelme, probabilities"
        )
        with gr.Tab("Masks"):
            masks = _gallery(gr, "masks")
        with gr.Tab("Probability"):
            gr.Markdown(PROBABILITIES)
            probabilities = _gallery(gr, "probabilities")
        with gr.Tab("Intermediates"):
            gr.Markdown(INSIDE if trained else NOT_INSIDE)
            inside = _gallery(gr, "inside", columns=4)
        with gr.Tab("Marked"):
            marked = _gallery(gr, "marked")
    return ResultParts(column, download, masks, probabilities, inside, marked)


def _connect_photos(
    with_errors, calls: Calls, inputs: InputParts, preview, examples
) -> None:
    """Lets photos and strokes show, whenever one comes or goes."""
    files, board, queries, label, _ = inputs
    inner = {"api_visibility": "private"}
    for event in (files.upload, files.delete, files.clear):
        event(with_errors(calls.show_marks), [files, board], board, **inner)
    board.select(with_errors(calls.find_object), [files, board], board, **inner)
    for event in (queries.upload, queries.delete, queries.clear):
        event(with_errors(calls.show_queries), queries, preview, **inner)
    for name, button in examples.items():
        show = with_errors(functools.partial(calls.show_example, name))
        button.click(show, None, [files, board, queries, preview, label], **inner)


def _segment(gr: Any, calls: Calls, work: RunningCalls) -> Callable[..., Any]:
    """Returns `calls.segment` with a bar that shows how far it is."""
    bar = gr.Progress()  # Gradio finds it as a default value

    def segment(files, text, queries, label, refine, progress=bar):
        def counted(steps):
            photos = progress.tqdm(steps, desc="segmenting", unit="photos")
            return work.while_open(photos)

        found = calls.segment(files, text, queries, label, refine, counted)
        return gr.Column(visible=True), *found

    return segment


def _with_errors(gr: Any, work: RunningCalls) -> Callable[[Callable], Callable]:
    """Returns a decorator that lets the page show an `InputError` as its one line."""

    def decorate(function):
        def called(*given):
            try:
                with work.call():
                    return function(*given)
            except InputError as error:
                message = html.escape(str(error))  # a file's name may hold tags
                raise gr.Error(message, print_exception=False) from None

        return functools.update_wrapper(called, function)

    return decorate


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


def _board(gr: Any) -> Any:
    """Returns what photos are marked on; demo/marks.py describes its value."""
    return gr.HTML(
        "[]",
        html_template=_read("brush.html"),
        css_template=_read("brush.css"),
        js_on_load=_read("brush.js"),
        apply_default_css=False,
        elem_id="board",
    )


def _gallery(gr: Any, name: str, columns: int = 2) -> Any:
    """Returns a component that shows pictures with captions; a click enlarges one."""
    return gr.Gallery(
        elem_id=name,
        columns=columns,
        format="jpeg",
        height="auto",
        object_fit="contain",
        interactive=False,
        show_label=False,
        buttons=["fullscreen"],
    )


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
