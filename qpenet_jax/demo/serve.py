"""The server of `qpenet demo`: on this machine alone, quiet, and gone without a trace.

Gradio is imported when it is needed: without it everything else here works.
"""

import importlib
import importlib.util
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpenet_jax.core.errors import InputError
from qpenet_jax.demo.page import Closing, build
from qpenet_jax.demo.segmenting import Calls
from qpenet_jax.segmenter import Segmenter

ADDRESS = "127.0.0.1"
"""Of this machine alone: there is no password, and photos may be private."""

QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Gradio would count its users and look for new versions of itself."""

LARGEST_FILE = "100mb"


def check_gradio() -> None:
    """Looks whether Gradio is there, without the seconds that it takes to import it.

    Raises:
        InputError: it isn't installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError(
            "the demo needs Gradio, which isn't installed: pip install "
            "'qpenet-jax[demo]'"
        )


def serve(
    segmenter: Segmenter,
    about: Mapping[str, Any],
    *,
    port: int,
    open_browser: bool = False,
) -> None:
    """Shows the page until Ctrl-C or SIGTERM; then takes away all that it stored.

    `about` is what summaries say of the segmenter.

    Raises:
        KeyboardInterrupt: at the end, always.
        InputError: the port is in use, or Gradio isn't installed.
    """
    check_gradio()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with tempfile.TemporaryDirectory(prefix="qpenet_demo_") as folder:
        os.environ.update(QUIET, GRADIO_TEMP_DIR=folder)  # read by the import
        gradio: Any = importlib.import_module("gradio")
        work = Closing()
        page = build(gradio, Calls(segmenter, about, Path(folder)), work)
        try:
            page.launch(
                server_name=ADDRESS,
                server_port=port,
                share=False,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                quiet=True,
                max_file_size=LARGEST_FILE,
                footer_links=[],
                ssr_mode=False,
                theme=gradio.themes.Default(primary_hue="blue", secondary_hue="blue"),
            )
        except OSError:
            raise InputError(
                f"port {port} is in use or not allowed: give another, --port N"
            ) from None
        try:
            print(f"the page is at http://{ADDRESS}:{port}; Ctrl-C ends it", flush=True)
            while True:
                time.sleep(60)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the page is closed") from None
        finally:
            work.close()
            page.close(verbose=False)
