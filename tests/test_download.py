"""Downloads from a local server that breaks off, ignores ranges and serves errors."""

import hashlib
import http.server
import threading

import numpy as np
import pytest
from conftest import no_file_above

from qpenet_jax.core.download import (
    BAR_BYTES,
    Published,
    digest,
    download,
    download_all,
    sha256,
)
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import locked

CONTENT = np.random.default_rng(0).bytes(200_000)
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()
PREFIX = SHA256[: len("sha256:") + 8]


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at any path but /none.pth, as badly as its attributes say."""

    content = CONTENT
    cut: int | None = None
    ignores_range = False
    gives_length = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/file.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        if self.path == "/none.pth":
            return self.send_error(404)
        start = 0
        if self.headers.get("Range") and not self.server.ignores_range:
            start = int(self.headers["Range"][len("bytes=") : -1])
        content = self.server.content[start:]
        if not content:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if self.server.gives_length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut])

    def log_message(self, *_):
        """Keeps the output of the tests clean."""


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download_resumes_within_one_call_and_across_calls(server, tmp_path):
    target, part = tmp_path / "deep" / "file.pth", tmp_path / "deep" / "file.pth.part"
    server.cut = 30_000
    with pytest.raises(InputError, match="broke off 5 times, at 150000 bytes now: run"):
        download(server.url, target, PREFIX)
    assert part.read_bytes() == CONTENT[:150_000]
    assert not target.exists()
    assert download(server.url, target, PREFIX) == target
    assert target.read_bytes() == CONTENT
    assert not part.exists()
    starts = [f"bytes={n}-" for n in range(30_000, 200_000, 30_000)]
    assert server.ranges == [None, *starts]


def test_download_from_a_server_that_ignores_range(server, tmp_path, capsys):
    target = tmp_path / "file.pth"
    (tmp_path / "file.pth.part").write_bytes(CONTENT[:1000])
    server.ignores_range = True
    assert download(server.url, target, PREFIX).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]
    assert "file.pth: 100%" in capsys.readouterr().err


def test_download_without_file_or_connection(server, tmp_path):
    url = server.url.replace("file.pth", "none.pth")
    with pytest.raises(InputError, match=r"none\.pth: HTTP 404 Not Found"):
        download(url, tmp_path / "none.pth", PREFIX)
    with pytest.raises(InputError, match=r"cannot reach http://127\.0\.0\.1:1/a "):
        download("http://127.0.0.1:1/a", tmp_path / "a", PREFIX)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("checksum", [SHA256, PREFIX, MD5])
def test_kinds_of_checksums(checksum, server, tmp_path):
    server.cut = 150_000
    (tmp_path / "file").write_bytes(b"another")
    target = download(server.url, tmp_path / "file", checksum)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=150000-"]
    download(server.url, target, checksum)
    assert len(server.ranges) == 2  # a file that is right is not asked for again
    server.content = b"x" + CONTENT[1:]
    kind, _, expected = checksum.partition(":")
    with pytest.raises(InputError, match=rf"{kind} is [0-9a-f]+, not {expected}; del"):
        download(server.url, tmp_path / "other", checksum)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("checksum", [PREFIX, MD5])
@pytest.mark.parametrize("more", [b"", b"more"])
def test_a_part_as_long_as_the_file_or_longer_starts_again(
    checksum, more, server, tmp_path
):
    (tmp_path / "file.part").write_bytes(CONTENT + more)
    server.gives_length = bool(more)  # only the hash shows the end without a length
    download(server.url, tmp_path / "file", checksum)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_errors_of_the_disk_are_not_taken_for_a_broken_connection(server, tmp_path):
    with no_file_above(1000), pytest.raises(OSError, match="File too large"):
        download(server.url, tmp_path / "file", SHA256)
    assert len(server.ranges) == 1


def test_digest_shows_a_bar_for_large_files(tmp_path, capsys):
    (tmp_path / "file").write_bytes(CONTENT)
    assert f"sha256:{sha256(tmp_path / 'file')}" == SHA256
    assert capsys.readouterr().err == ""
    assert f"md5:{digest(tmp_path / 'file', 'md5')}" == MD5
    with (tmp_path / "large").open("wb") as file:
        file.truncate(BAR_BYTES)
    digest(tmp_path / "large", "md5")
    assert "hashing large: 100%" in capsys.readouterr().err


def test_archives_are_fetched_by_one_process_if_there_is_room(server, tmp_path):
    there = [server.url.replace("file.pth", name) for name in ("a.tar", "b.zip")]
    archives = [Published(url, MD5, len(CONTENT)) for url in there]
    paths = download_all(tmp_path, archives)
    assert paths == [tmp_path / "a.tar", tmp_path / "b.zip"]
    assert [path.read_bytes() for path in paths] == [CONTENT, CONTENT]
    assert download_all(tmp_path, archives) == paths
    assert len(server.ranges) == 2
    begun = tmp_path / "b.zip.part"
    begun.write_bytes(b"the other's")
    with (
        locked(tmp_path / ".lock", "held"),
        pytest.raises(InputError, match="another process is downloading"),
    ):
        download_all(tmp_path, archives)
    assert begun.read_bytes() == b"the other's"
    many = [archives[0]._replace(size=10**18)]
    with pytest.raises(InputError, match=r"GB are free, 1000000000\.0 GB are needed"):
        download_all(tmp_path / "large", many)
