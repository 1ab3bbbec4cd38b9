"""`qpenet demo` in a real headless Chromium: `.ci/browser`.

Skipped where Gradio, Playwright or a Chromium of the system is missing; Playwright's
own would be a download.
"""

import concurrent.futures
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="no gradio: pip install -e .[demo]")
httpx = pytest.importorskip("httpx")
sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium: apt-get install chromium"
    ),
    # Of Gradio's client and Playwright, which are not ours.
    pytest.mark.filterwarnings("default"),
]

AT_ONCE = 50


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


DEMO = [sys.executable, "-m", "qpenet_jax.cli", "demo", "--port"]


@contextlib.contextmanager
def served(port, folder):
    """Start the demo; give the process once its page is there."""
    process = subprocess.Popen(
        [*DEMO, port, "--config.side=161"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line, process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    port = free_port()
    with served(port, tmp_path_factory.mktemp("server")):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def chromium():
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium, address):
    """A page that was opened; all it asks for comes from this machine."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    tab = context.new_page()
    asked, errors = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("dialog", lambda dialog: errors.append(dialog.message))
    tab.goto(address)
    tab.get_by_role("button", name="Segment", exact=True).wait_for()
    yield tab
    context.close()
    elsewhere = (address, "data:", "blob:")
    assert [url for url in asked if not url.startswith(elsewhere)] == []
    assert errors == []


def picture(folder, name, left):
    """Write a photo of a red square on grey."""
    pixels = np.full((120, 160, 3), 128, np.uint8)
    pixels += np.random.default_rng(0).integers(0, 30, pixels.shape, np.uint8)
    pixels[30:90, left : left + 60] = (220, 20, 20)
    Image.fromarray(pixels).save(folder / name)
    return str(folder / name)


def overlap(mask, left):
    """Returns the IoU of a mask, as PNG, with the red square of `picture`."""
    found = np.array(Image.open(io.BytesIO(mask))) == 255
    truth = np.zeros((120, 160), bool)
    truth[30:90, left : left + 60] = True
    return (found & truth).sum() / (found | truth).sum()


def unzipped(archive):
    with zipfile.ZipFile(archive) as files:
        return {name: files.read(name) for name in files.namelist()}


def give(tab, number, *files):
    tab.locator("input[type=file][multiple]").nth(number).set_input_files(files)


def stroke(tab, *points):
    """Draws a line through pixels of the photo of 160 x 120 that is to be marked."""
    editor = tab.locator(".mark").first
    editor.scroll_into_view_if_needed()
    box = editor.locator("canvas").first.bounding_box()
    zoom = int(re.search(r"(\d+)%", editor.inner_text())[1]) / 100
    left = box["x"] + box["width"] / 2 - 80 * zoom
    top = box["y"] + box["height"] / 2 - 60 * zoom
    (x, y), *_ = points
    tab.mouse.move(left + x * zoom, top + y * zoom)
    tab.mouse.down()
    for x, y in points:
        tab.mouse.move(left + x * zoom, top + y * zoom, steps=5)
    tab.mouse.up()


def show(tab, folder):
    """Gives a photo to mark and waits until it can be painted on."""
    give(tab, 0, picture(folder, "marked.png", 20))
    tab.wait_for_function("document.querySelector('.mark')?.innerText.includes('%')")
    tab.wait_for_timeout(1000)


def shown_share(tab):
    """Returns the share of marked pixels by the caption of the result."""
    segment(tab)
    tab.wait_for_selector("#masks img", state="attached", timeout=120_000)
    tab.get_by_role("tab", name="Marked").click()
    tab.wait_for_timeout(4000)  # an earlier result may be there for a while
    caption = tab.locator("#marked").inner_text()
    return float(re.search(r"([\d.]+) % of the photo", caption)[1])


def segment(tab):
    tab.get_by_role("button", name="Segment", exact=True).click()


def downloaded(tab):
    """Return the files of the zip."""
    with tab.expect_download() as waiting:
        tab.get_by_role("button", name="Download").click()
    return unzipped(waiting.value.path())


def test_brush_segment_download(tab, tmp_path):
    show(tab, tmp_path)
    give(tab, 1, picture(tmp_path, "a.png", 60), picture(tmp_path, "b.jpg", 80))
    tab.wait_for_function("document.querySelectorAll('#preview img').length == 2")
    for y in range(35, 90, 8):
        stroke(tab, (26, y), (74, y))
    segment(tab)
    tab.wait_for_selector("#masks img", timeout=120_000)
    assert "a.png" in tab.locator("#masks").inner_text()
    files = downloaded(tab)
    formats = {"a.png", "b.png", "a.json", "b.json", "coco.json", "predictions.json"}
    assert formats <= set(files)
    assert overlap(files["a.png"], 60) > 0.6
    summary = json.loads(files["predictions.json"])
    assert [image["file"] for image in summary["images"]] == ["a.png", "b.jpg"]
    tab.get_by_role("tab", name="Intermediates").click()
    tab.wait_for_selector("#intermediates img")
    captions = tab.locator("#intermediates").inner_text()
    assert all(part in captions for part in ("PPG.", "DPE.", "GBC."))


def test_edges_are_found_and_marks_taken_back(tab, tmp_path):
    """Each share is of what is sent directly after the mouse was released."""
    show(tab, tmp_path)
    give(tab, 1, picture(tmp_path, "a.png", 60))
    tab.wait_for_selector("#preview img")
    square = 100 * 60 * 60 / 19200
    stroke(tab, (45, 60), (50, 60))
    line = shown_share(tab)
    assert 0 < line < 0.5 * square
    tab.get_by_role("button", name="Find its edges").first.click()
    tab.wait_for_timeout(3000)
    found = shown_share(tab)
    assert found == pytest.approx(square, abs=3)
    mark = tab.locator(".mark").first
    mark.get_by_label("Erase").click()
    stroke(tab, (50, 45), (50, 60))
    assert shown_share(tab) < found
    mark.get_by_role("button", name="Undo").click()
    assert shown_share(tab) == found


def test_an_example_takes_two_clicks(tab):
    tab.get_by_role("button", name="Example: star").click()
    tab.wait_for_function("document.querySelectorAll('#preview img').length == 4")
    segment(tab)
    tab.wait_for_selector("#masks img", timeout=120_000)
    assert tab.locator("#masks img").count() == 4
    assert any(b'"star"' in content for content in downloaded(tab).values())


def error_shown(tab):
    """Return the error that the page shows, and take it away."""
    toast = tab.locator(".toast-body")
    toast.first.wait_for()
    text = toast.first.inner_text()
    tab.locator(".toast-close").first.click()
    toast.first.wait_for(state="detached")
    return text


def test_mistakes_are_one_line_on_the_page(tab, tmp_path):
    segment(tab)
    assert "no photo shows the object yet" in error_shown(tab)
    attack = tmp_path / "<img src=x onerror=alert(1)>.png"
    attack.write_bytes(b"no image")
    give(tab, 1, str(attack))
    message = error_shown(tab)
    assert "not an image; replace the file" in message
    assert "Traceback" not in message
    show(tab, tmp_path)
    segment(tab)
    assert "marked.png: nothing is marked in this photo" in error_shown(tab)


def test_names_of_files_do_no_harm_on_the_page(tab, tmp_path):
    give(tab, 1, picture(tmp_path, "<b onclick=alert(1)>x.png", 20))
    tab.wait_for_selector("#preview img")
    assert tab.locator("#preview b").count() == 0


def stored(client, file):
    """Upload a file; return it as calls name it."""
    with open(file, "rb") as content:
        answer = client.post("/gradio_api/upload", files={"files": content})
    return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}


def called(client, file, mask):
    """Segment without a page; return how that ended and what came back."""
    editor = {"background": None, "layers": [mask], "composite": None}
    data = [[file], [file], "", False, editor, *[None] * 4]
    event = client.post("/gradio_api/call/segment", json={"data": data}).json()
    stream = client.get(f"/gradio_api/call/segment/{event['event_id']}").text
    return re.findall(r"^event: (\w+)\ndata: (.*)$", stream, re.MULTILINE)[-1]


def painted(folder, left):
    """Writes a layer of the editor in which the red square is painted over."""
    mask = np.zeros((120, 160, 4), np.uint8)
    mask[30:90, left : left + 60] = 255
    Image.fromarray(mask).save(folder / "layer.png")
    return folder / "layer.png"


def test_fifty_requests_at_once(address, tmp_path):
    """No request fails, and each visitor gets masks of the own photo."""
    ready = threading.Barrier(AT_ONCE)

    def visit(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        photo = picture(folder, f"photo{number}.png", 2 * number)
        with httpx.Client(base_url=address, timeout=300, trust_env=False) as client:
            file = stored(client, photo)
            ready.wait(60)
            mask = stored(client, painted(folder, 2 * number))
            end, data = called(client, file, mask)
            assert end == "complete", data
            archive = client.get(json.loads(data)[1]["url"]).content
        files = unzipped(io.BytesIO(archive))
        return overlap(files[f"photo{number}.png"], 2 * number)

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        shares = list(pool.map(visit, range(AT_ONCE)))
    assert len(shares) == AT_ONCE
    assert min(shares) > 0.6


def test_other_files_of_the_machine_are_out_of_reach(address, tmp_path):
    secret = picture(tmp_path, "secret.png", 20)
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        for path in (secret, "/etc/hostname", __file__):
            answer = client.get(f"/gradio_api/file={path}")
            assert answer.status_code in (403, 404), path
        file = {"path": secret, "meta": {"_type": "gradio.FileData"}}
        end, data = called(client, file, stored(client, painted(tmp_path, 20)))
        assert end == "error", data


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_at_the_end(tmp_path, stop):
    with served(free_port(), tmp_path) as process:
        assert list(tmp_path.glob("qpenet_demo_*"))
        process.send_signal(stop)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "the page is closed"
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_one_line(address, tmp_path):
    port = address.rpartition(":")[2]
    ended = subprocess.run([*DEMO, port], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: port {port} is in use")
