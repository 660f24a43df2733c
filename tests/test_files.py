"""One way to write a file: whole or not at all, under any name, on any file system."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import kvzip
from kvzip import files
from kvzip.errors import KVZipError
from kvzip.reading import reading


@pytest.fixture(params=["nameless", "hidden", "nameless, no links", "hidden, no links"])
def system(request, monkeypatch):
    """File systems that know files without a name and hard links, or not."""
    if request.param.startswith("hidden"):
        monkeypatch.setattr(files, "_NAMELESS", 0)
    if request.param.endswith("no links"):

        def refuse(*_, **__):
            raise OSError(errno.EOPNOTSUPP, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    return request.param


def put(path, data, **how):
    with files.replacing(path, **how) as file:
        file.write(data)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path, system):
    with files.replacing(tmp_path / "a") as file:
        file.write(b"who")
        file.flush()
        assert not (tmp_path / "a").exists()
        file.seek(0)
        assert file.read() == b"who"  # it can be read and gone back in
        file.write(b"le")
    assert (tmp_path / "a").read_bytes() == b"whole"
    put(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was(tmp_path, system, error):
    for old in (None, b"old"):
        with pytest.raises(error), files.replacing(tmp_path / "a") as file:
            file.write(b"half")
            raise error
        if old is None:
            assert names(tmp_path) == []
        else:
            assert (tmp_path / "a").read_bytes() == old
        (tmp_path / "a").write_bytes(b"old")
    assert names(tmp_path) == ["a"]


def test_permissions(tmp_path, system):
    put(tmp_path / "new", b"")
    assert mode_of(tmp_path / "new") == 0o600  # prompts are in it
    for mode in (0o644, 0o666, 0o600, 0o755):
        (tmp_path / "new").chmod(mode)
        put(tmp_path / "new", b"")
        assert mode_of(tmp_path / "new") == mode
    put(tmp_path / "new", b"", mode=0o640)
    assert mode_of(tmp_path / "new") == 0o640
    put(tmp_path / "other", b"", mode=0o664)
    assert mode_of(tmp_path / "other") == 0o664


def test_a_file_that_is_not_private_gets_what_the_umask_leaves(tmp_path, system):
    before = os.umask(0o022)
    try:
        for umask, mode in ((0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o177, 0o600)):
            os.umask(umask)
            (tmp_path / "plain").write_bytes(b"")
            put(tmp_path / "public", b"new", private=False)
            assert mode_of(tmp_path / "public") == mode == mode_of(tmp_path / "plain")
            put(tmp_path / "private", b"new")
            assert mode_of(tmp_path / "private") == 0o600
            for name in ("plain", "public", "private"):
                (tmp_path / name).unlink()
        os.umask(0o022)
        for mode in (0o600, 0o640, 0o666):  # what is there keeps its own, also meanwhile
            put(tmp_path / "public", b"old", mode=mode)
            with files.replacing(tmp_path / "public", private=False) as file:
                assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
            assert mode_of(tmp_path / "public") == mode
    finally:
        os.umask(before)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_the_owner_stays(tmp_path, system):
    put(tmp_path / "a", b"")
    os.chown(tmp_path / "a", 1234, 4321)
    put(tmp_path / "a", b"")
    found = (tmp_path / "a").stat()
    assert (found.st_uid, found.st_gid) == (1234, 4321)


def test_links_are_followed(tmp_path, system):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    for data in (b"dangling", b"replaced"):
        put(tmp_path / "link", data)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "file").read_bytes() == data
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        put(tmp_path / "loop", b"")
    assert names(tmp_path) == ["link", "loop", "there"]


NAMES = ["x" * 255, "é" * 127, b"\xff\xfe.kvz", "two\nlines", " ", "-", ".kvzip", "[red]"]


@pytest.mark.parametrize("name", NAMES)
def test_any_legal_name(tmp_path, system, name):
    path = tmp_path / os.fsdecode(name)
    for data in (b"one", b"two"):
        put(os.fsencode(path) if isinstance(name, bytes) else str(path), data)
        assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("", FileNotFoundError),
        ("folder", IsADirectoryError),
        ("folder/", IsADirectoryError),
        ("new/", IsADirectoryError),
        ("nowhere/file", FileNotFoundError),
        ("file/file", NotADirectoryError),
        ("y" * 256, OSError),
    ],
)
def test_what_is_no_name_of_a_file_is_told_by_its_own(tmp_path, monkeypatch, system, name, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(error) as caught:
        put(name, b"")
    assert caught.value.filename in (name, str(tmp_path / "nowhere"), str(tmp_path / name))
    assert ".kvzip" not in str(caught.value)
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path, system):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError) as caught:
        put(tmp_path / "a", b"")
    assert ".kvzip" not in str(caught.value)


def test_a_folder_that_takes_no_file_is_told_before_there_is_one_to_write():
    """As another user where this one may write everywhere."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder) / "inner"
        inner.mkdir()
        files.check_output(inner / "a", [])
        inner.chmod(0o555)
        Path(folder).chmod(0o755)
        try:
            if not user:
                os.seteuid(65534)
            with pytest.raises(PermissionError, match="no file can be made in it") as caught:
                files.check_output(inner / "a", [])
        finally:
            os.seteuid(user)
        assert caught.value.filename == str(inner)


def test_pipes_get_everything_once_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "IN_MEMORY", 1000)  # so that some are spooled on disk
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for size in (0, 10, 100_000):
        got = []
        reader = threading.Thread(target=lambda got=got: got.append(pipe.read_bytes()))
        reader.start()
        put(pipe, bytes(size))
        reader.join(10)
        assert got == [bytes(size)]
        assert stat.S_ISFIFO(pipe.stat().st_mode)
    monkeypatch.setattr(files, "PIPE_SECONDS", 0.1)
    with pytest.raises(OSError, match="nobody reads"):
        put(pipe, b"x")
    # Nobody is written to when it fails: opening the pipe would wait for a reader.
    with pytest.raises(RuntimeError), files.replacing(pipe) as file:
        file.write(b"half")
        raise RuntimeError


def test_devices_stay_devices(tmp_path):
    try:
        os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(tmp_path / "full", stat.S_IFCHR | 0o666, os.makedev(1, 7))
        put(tmp_path / "null", b"gone")
    except PermissionError:
        pytest.skip("only root makes devices")
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)
    with pytest.raises(OSError) as caught:
        put(tmp_path / "full", b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "full"))


WRITE_OUT = """
from kvzip import files
with files.replacing(files.STDOUT) as file:
    file.write(b"bytes")
    file.seek(0)
    file.write(b"B")
"""


def test_standard_output(tmp_path):
    """A pipe, a file that was begun, and one that goes on after it."""
    done = subprocess.run([sys.executable, "-c", WRITE_OUT], capture_output=True, check=True)
    assert done.stdout == b"Bytes"
    with (tmp_path / "out").open("wb") as out:
        out.write(b"before ")
        out.flush()
        subprocess.run([sys.executable, "-c", WRITE_OUT], stdout=out, check=True)
        out.write(b" after")  # the position is shared, as shells have it
    assert (tmp_path / "out").read_bytes() == b"before Bytes after"
    assert names(tmp_path) == ["out"]


READ_IN = """
import sys
from kvzip import files, reading
files.IN_MEMORY = 1000
with reading.reading(files.STDIN) as file:
    import os
    print(os.pread(file.fileno(), 4, 3).decode(), len(file.read()))
"""


@pytest.mark.parametrize("size", [7, 999, 1000, 1001, 3_000_000])
def test_standard_input_can_be_read_anywhere(tmp_path, size):
    data = (b"abcdefghi" * (size // 9 + 1))[:size]
    command = [sys.executable, "-c", READ_IN]
    piped = subprocess.run(command, input=data, capture_output=True, check=True).stdout
    assert piped.split() == [b"defg", str(size).encode()]
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as file:
        assert subprocess.run(command, stdin=file, capture_output=True).stdout == piped


def test_reading_what_cannot_be_read(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        reading(tmp_path)
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(FileNotFoundError):
        reading(tmp_path / "nothing")


def test_create_only(tmp_path, system):
    put(tmp_path / "a", b"first", create=True)
    with pytest.raises(FileExistsError):
        put(tmp_path / "a", b"second", create=True)
    with pytest.raises(FileExistsError), files.replacing(tmp_path / "b", create=True) as file:
        file.write(b"late")
        (tmp_path / "b").write_bytes(b"early")  # meanwhile
    assert [(tmp_path / n).read_bytes() for n in ("a", "b")] == [b"first", b"early"]
    assert names(tmp_path) == ["a", "b"]


def test_of_many_who_create_one_does(tmp_path, system):
    won = []
    start = threading.Barrier(8)

    def create(n):
        start.wait()
        with suppress(FileExistsError):
            put(tmp_path / "a", b"%d" % n, create=True)
            won.append(n)

    for _ in range(20):
        threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [b"%d" % n for n in won] == [(tmp_path / "a").read_bytes()]
        (tmp_path / "a").unlink()
        won.clear()
    assert names(tmp_path) == []


def test_unfinished_files_may_lie_elsewhere(tmp_path, system):
    (tmp_path / "deep").mkdir()
    with files.replacing(tmp_path / "deep" / "a", scratch=tmp_path) as file:
        file.write(b"x")
        assert names(tmp_path / "deep") == []
    put(tmp_path / "deep" / "a", b"y", scratch=tmp_path, durable=True)
    assert (tmp_path / "deep" / "a").read_bytes() == b"y"
    assert names(tmp_path) == ["deep"]


# --- killed ----------------------------------------------------------------------------------


def hold(folder, ready):
    files._NAMELESS = 0
    with files.replacing(Path(folder) / "a") as file:
        file.write(b"half")
        file.flush()
        ready.set()
        signal.pause()


def next_run(folder, name):
    """What a new process does."""
    code = (
        f"from kvzip import files\nwith files.replacing({str(folder / name)!r}) as f: f.write(b'')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_leftovers_are_swept_by_the_next_run_unless_somebody_writes(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(60)
    [hidden] = names(tmp_path)
    assert files.is_hidden(hidden)
    next_run(tmp_path, "b")
    assert names(tmp_path) == sorted([hidden, "b"])  # its lock is held
    process.kill()
    process.join()
    assert hidden in names(tmp_path)
    next_run(tmp_path, "c")
    assert names(tmp_path) == ["b", "c"]


def test_what_looks_like_a_leftover_and_is_none_stays(tmp_path):
    mine = files._hidden_name()
    foreign = mine.replace(files._HOST, "0" * 8)
    for name in (foreign, ".kvzip-notes.tmp", ".doc.kvz.tmp"):
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / mine)
    files.sweep(tmp_path)
    assert len(names(tmp_path)) == 4
    os.utime(tmp_path / foreign, (0, 0))  # of another machine, and nobody wrote it for long
    files.sweep(tmp_path)
    assert foreign not in names(tmp_path)


ENDED = """
import signal, sys, time
from kvzip import files
# Whoever runs the tests may have them ignored (nohup, a shell's background), which is inherited.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
files.leave_nothing_behind()
if sys.argv[2] == "hidden": files._NAMELESS = 0
with files.replacing(sys.argv[1]) as file:
    file.write(b"half"); file.flush()
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["nameless", "hidden"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_leave_nothing_behind(tmp_path, number, kind):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDED, str(tmp_path / "a"), kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(30) in (128 + number, -number)
    assert names(tmp_path) == []


def test_an_ignored_signal_stays_ignored():
    code = (
        "import signal; from kvzip import files; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "files.leave_nothing_behind(); signal.raise_signal(signal.SIGHUP)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- outputs and inputs ------------------------------------------------------------------------


def test_an_output_that_is_an_input_is_refused(tmp_path):
    put(tmp_path / "in", b"x")
    (tmp_path / "link").symlink_to("in")
    os.link(tmp_path / "in", tmp_path / "same")
    for name in ("in", "link", "same"):
        with pytest.raises(KVZipError, match="is an input"):
            files.check_output(tmp_path / name, ["nothing", tmp_path / "in"])
    files.check_output(tmp_path / "new", [tmp_path / "in"])
    files.check_output("/dev/null", ["/dev/null"])


def test_what_the_library_writes_goes_this_way(tmp_path):
    """Snapshots, .kvz files and profiles: into pipes, through links, for their owner alone."""
    bits = np.arange(48, dtype=np.uint16).reshape(2, 6, 4)
    snapshot = kvzip.Snapshot.from_arrays([(bits, bits)], "bf16", np.arange(6))
    profile = kvzip.Profile({"x": np.arange(3)}, {})
    writers = {
        "s.safetensors": snapshot.save,
        "s.kvz": lambda path: kvzip.write(path, snapshot),
        "s.kvprofile": profile.save,
    }
    for name, write in writers.items():
        write(tmp_path / name)
        assert mode_of(tmp_path / name) == 0o600
        pipe, got = tmp_path / f"{name}.pipe", []
        os.mkfifo(pipe)
        reader = threading.Thread(target=lambda pipe=pipe, got=got: got.append(pipe.read_bytes()))
        reader.start()
        write(pipe)
        reader.join(10)
        assert got == [(tmp_path / name).read_bytes()]


def test_a_folder_that_stays_empty_goes_with_the_error(tmp_path):
    with pytest.raises(RuntimeError), files.made_folder(tmp_path / "a" / "b"):
        raise RuntimeError
    assert names(tmp_path) == []
    with pytest.raises(RuntimeError), files.made_folder(tmp_path / "a" / "b") as folder:
        put(folder / "kept", b"x")
        raise RuntimeError
    assert names(folder) == ["kept"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError), files.made_folder(tmp_path / "empty"):
        raise RuntimeError
    assert names(tmp_path) == ["a", "empty"]  # it was there before


def test_that_the_current_folder_is_gone_is_told(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for use in (put, kvzip.write):
        with pytest.raises(FileNotFoundError, match="current folder is not there") as error:
            use("new", kvzip.Snapshot([], "bf16"))
        assert error.value.filename == "new"
    put(tmp_path / "elsewhere", b"whole")
    with pytest.raises(FileNotFoundError) as error, files.replacing(tmp_path / "elsewhere"):
        Path("nowhere").read_bytes()
    assert error.value.filename == "nowhere"
