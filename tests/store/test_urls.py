"""URLs of files: a web server's is asked for as it stands, however it is written, and what cannot
be asked for, or is not answered in parts, is an error that says what to do."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from servers import serving
from support import assert_same, make_snapshot, random_bits

import kvzip
from kvzip.store import Store

SNAPSHOT = make_snapshot(random_bits, 0, "bf16")


@pytest.fixture
def server():
    """A web server with one file under every path; yields its address, the paths that were asked
    for, and a set of words for what it does otherwise than others."""
    blob, asked, ways = kvzip.encode(SNAPSHOT), [], set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked.append(self.requestline.split()[1])  # in `path` a leading // is /
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            body, size = blob[first : last + 1], "*" if "any size" in ways else len(blob)
            if "whole" in ways:
                body = blob
                self.send_response(200)
            elif not body:
                self.send_response(416)
            else:
                self.send_response(206)
                stop = first + len(body) - 1
                self.send_header("Content-Range", f"bytes {first}-{stop}/{size}")
            if "chunked" in ways:
                self.send_header("Transfer-Encoding", "chunked")
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with serving(Handler) as url:
        yield url, asked, ways


@pytest.mark.parametrize("scheme", ["http", "HTTP", "Http"])
@pytest.mark.parametrize(
    ("path", "is_asked_for"),
    [
        ("/x.kvz", "/x.kvz"),
        ("//x.kvz", "//x.kvz"),
        ("/a//x.kvz", "/a//x.kvz"),
        ("//a//b///x.kvz", "//a//b///x.kvz"),
        ("/a//x.kvz?sig=1", "/a//x.kvz?sig=1"),
        ("/a?in=b/x.kvz", "/a?in=b/x.kvz"),
        ("/a//b%20c/x%2By.kvz#part", "/a//b%20c/x%2By.kvz"),
        # What these mean is said by RFC 3986, and every client sends it so.
        ("/a/./x.kvz", "/a/x.kvz"),
        ("/a/b/../x.kvz", "/a/x.kvz"),
        ("/a b/x.kvz", "/a%20b/x.kvz"),
    ],
)
def test_what_is_asked_for_is_what_a_url_says(server, scheme, path, is_asked_for):
    base, asked, _ = server
    assert_same(kvzip.decode(base.replace("http", scheme) + path), SNAPSHOT)
    assert set(asked) == {is_asked_for}


def test_schemes_in_capitals_are_the_same_stores(server, tmp_path):
    base, asked, _ = server
    Store(base.replace("http", "HTTP") + "/a//b").bucket.read_range("c", 0, 8, None)
    assert asked[-1] == "/a//b/c"
    Store(tmp_path / "s", block_tokens=16).put(SNAPSHOT)
    for scheme in ("file", "FILE"):
        assert len(Store(f"{scheme}://{tmp_path}//s").documents()) == 1
    (tmp_path / "x.kvz").write_bytes(kvzip.encode(SNAPSHOT))
    assert_same(kvzip.decode(f"File://{tmp_path}//x.kvz"), SNAPSHOT)


@pytest.mark.parametrize("ways", [{"whole"}, {"whole", "chunked"}, {"chunked"}, {"any size"}])
def test_a_server_without_ranges_is_an_error_that_says_what_to_do(server, ways):
    base, _, words = server
    words |= ways
    with pytest.raises(kvzip.StoreError, match="download the file, and open that"):
        kvzip.open(base + "/x.kvz")


@pytest.mark.parametrize("end", ["x", "/x", "%2F", "é", "?sig=x", " "])
@pytest.mark.parametrize("scheme", ["http://127.0.0.1:1/", "s3://bucket/"])
def test_what_is_too_long_to_ask_for_says_so(capfd, scheme, end):
    """The client below would panic, and write that to stderr."""
    url = scheme + end * (70_000 // len(end)) + "/x.kvz"
    with pytest.raises(kvzip.UsageError) as caught:
        kvzip.open(url)
    assert len(str(caught.value)) < 300 and "characters" in str(caught.value)
    assert not "".join(capfd.readouterr())


def test_a_name_that_is_too_long_for_a_bucket_says_so(server, capfd):
    store = Store(server[0])
    for path in ("x" * 70_000, "/x" * 35_000):
        for do in (store.bucket.get, store.bucket.head, store.open):
            with pytest.raises(kvzip.KVZipError):
                do(path)
    assert not "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://bucket/a//x.kvz", "empty part"),
        ("S3://bucket//x.kvz", "empty part"),
        ("s3://bucket", "names no file"),
        ("http://host", "names no file"),
        ("file:///a/", "names no file"),
        ("http://host\n/x.kvz", "line break"),
        ("s3://bucket/a\0/x.kvz", "line break"),
        ("https://host/\ud800/x.kvz", "surrogates"),
    ],
)
def test_what_names_no_file_says_so(url, says):
    with pytest.raises(kvzip.UsageError, match=says):
        kvzip.open(url)
    assert not Path(url.partition("/")[0]).exists()
