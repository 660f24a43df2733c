"""Files that appear whole or not at all, and what lies on disk for a while only.

Every file of this library is written by :func:`replacing`, and what is needed for a while only lies
in a :func:`scratch_file` or a :func:`scratch_folder`. What is unfinished has no name where the
system allows that (Linux's O_TMPFILE), and elsewhere a hidden one, which an error removes. What a
killed process leaves under a hidden name is removed by the next one that writes into that folder:
whoever still writes holds the file's lock.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from kvzip.errors import UsageError
from kvzip.interruption import ENDING, Terminated

IN_MEMORY = 256 << 20
"""Bytes on their way from or to a pipe or a device that are kept in memory; more are on disk."""
PIPE_SECONDS = 60.0
"""How long somebody is waited for who is to open the other end of a pipe."""
STDIN, STDOUT = Path("/dev/stdin"), Path("/dev/stdout")
GONE = "the current folder is not there any more"
_OWNERS, _ANYBODYS = 0o600, 0o666
"""Permissions of a new file, from which the system takes those of the umask."""
_NAMELESS: int = getattr(os, "O_TMPFILE", 0)
_FOLDER: int = os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)
_HOST = hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]
_HIDDEN = re.compile(r"\.kvzip-([0-9a-f]{8})-[0-9a-f]{16}\.tmp")
_FOREIGN_SECONDS = 86400.0
"""A hidden file of another machine, whose locks may not be seen here, is left alone for so long."""
_STREAM = re.compile(r"/dev/(stdin|stdout|stderr)|(?:/dev|/proc/self)/fd/(\d+)")
_STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}
_swept: set[tuple[int, int]] = set()
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
"""How a URL begins, also one of which a Path was made, which has lost a slash."""

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def name_of(path: AnyPath) -> str:
    """A path as a str. Raises UsageError for what no file can be called."""
    try:
        name = os.fsdecode(path)
        os.fsencode(name)
    except TypeError:
        kind = type(path).__name__
        raise UsageError(f"a {kind} is no path: give a str, bytes or a path") from None
    except UnicodeError as error:
        raise UsageError(f"{path!r} is no path: {error}") from None
    if "\0" in name:
        raise UsageError(f"{name!r} is no path: it has a zero byte")
    return name


# --- writing -------------------------------------------------------------------------------


@contextmanager
def replacing(
    path: AnyPath,
    *,
    private: bool = True,
    mode: int | None = None,
    create: bool = False,
    durable: bool = False,
    scratch: Path | None = None,
    itself: bool = False,
) -> Iterator[IO[bytes]]:
    """A file open for writing and reading that becomes `path` when the block ends without error.

    Links are followed. A file that is there keeps its mode and, where the system allows it, its
    owner; a new one can be read by its owner alone, since prompts are in snapshots, caches and
    profiles. A device, a pipe and ``/dev/stdout`` get the bytes once all are there.

    `private`: without, a new file gets what the umask leaves, as any program's do: results,
    pictures, reports. `mode`: the permissions, whatever there was. `create`: raise FileExistsError
    if there is a file already. `durable`: return when a power cut cannot undo it. `scratch`: a
    folder of the same file system for what is unfinished. `itself`: what has the name is replaced
    even if it is a link or a pipe; where that leads to nothing is written. Raises OSError, which
    names the path.
    """
    name = name_of(path)
    with naming(name):
        if itself:
            target = Path(os.path.realpath(os.path.dirname(name)), os.path.basename(name))  # noqa: PTH119, PTH120
            found = target.lstat() if os.path.lexists(target) else None
        else:
            target, found = Path(os.path.realpath(name)), _status(name)
        is_file = found is None or stat.S_ISREG(found.st_mode)
        if not itself and (not is_file or stream_of(name) is not None):
            if found is not None and stat.S_ISDIR(found.st_mode):
                raise error_of(errno.EISDIR, name)
            with _spooled(name) as spool:
                yield spool
            return
        if create and found is not None:
            raise error_of(errno.EEXIST, name)
        # What is to replace a file of few permissions has no more of them meanwhile.
        made_with = _OWNERS if private or found is not None else _ANYBODYS
        with _Unfinished(target.parent, scratch or target.parent, made_with) as unfinished:
            yield unfinished.file
            unfinished.become(target.name, mode, create, durable)


def is_standard_output(path: AnyPath) -> bool:
    """Whether what is written to a path and what is printed go to the same place."""
    name = os.fsdecode(path)
    if stream_of(name) == 1:
        return True
    try:
        found, out = os.stat(name), os.fstat(1)  # noqa: PTH116
    except (OSError, ValueError):
        return False
    apart = stat.S_ISCHR(out.st_mode) and not os.isatty(1)  # /dev/null keeps nothing
    return os.path.samestat(found, out) and not apart


def check_output(path: AnyPath, inputs: Iterable[AnyPath]) -> None:
    """Raise UsageError if writing to `path` would replace one of the inputs."""
    found = _status(os.fsdecode(path))
    if found is None or not stat.S_ISREG(found.st_mode):
        return
    for given in inputs:
        try:
            same = os.path.samestat(found, os.stat(given))  # noqa: PTH116 - of any kind of path
        except (OSError, ValueError):
            continue
        if same:
            name = name_of(path)
            raise UsageError(f"{name} is an input: writing the output there would replace it")


_EFFECTIVE = os.access in os.supports_effective_ids


def _status(name: str) -> os.stat_result | None:
    """What is there under a name, links followed; None if nothing is. A name that no file can be
    written under is an OSError."""
    if not name:
        raise error_of(errno.ENOENT, name)
    try:
        return os.stat(name)  # noqa: PTH116
    except FileNotFoundError:
        if name.endswith("/"):
            raise error_of(errno.EISDIR, name) from None
        with naming(name):
            parent = os.path.dirname(os.path.realpath(name))  # noqa: PTH120
        if not os.path.isdir(parent):  # noqa: PTH112
            refuse_url(name)
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", parent) from None
        if not os.access(parent, os.W_OK | os.X_OK, effective_ids=_EFFECTIVE):
            raise PermissionError(errno.EACCES, "no file can be made in it", parent) from None
        return None


def refuse_url(name: str) -> None:
    """Raise UsageError for the name of a file that is not there, if a URL was meant by it."""
    found = _URL.match(name)
    if found is not None:
        raise UsageError(
            f"No such file. If a URL ({found[1]}://...) is meant: kvzip.open, decode, info and "
            "verify read one, given as a str, and a kvzip.store.Store reads and writes"
        )


def stream_of(name: str) -> int | None:
    """The number of the open file that a name stands for, if it does."""
    found = _STREAM.fullmatch(name)
    if found is None:
        return None
    return _STREAMS[found[1]] if found[1] else int(found[2])


@contextmanager
def _spooled(name: str) -> Iterator[IO[bytes]]:
    """A temporary file whose bytes are written to a pipe or a device when the block ends."""
    with tempfile.SpooledTemporaryFile(IN_MEMORY) as spool:
        with naming(tempfile.gettempdir()):
            yield spool
        spool.seek(0)
        number = stream_of(name)
        handle = _open_to_write(name) if number is None else os.dup(number)
        with os.fdopen(handle, "wb") as out:
            shutil.copyfileobj(spool, out, 1 << 20)


def _open_to_write(name: str) -> int:
    """The number of a device or a pipe, which waits for somebody to read from it."""
    flags = os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK
    end = time.monotonic() + PIPE_SECONDS
    while True:
        try:
            handle = os.open(name, flags)
        except OSError as error:
            if error.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(name).st_mode):  # noqa: PTH116
                raise
            if time.monotonic() > end:
                words = f"nobody reads from this pipe, for {PIPE_SECONDS:g} seconds"
                raise OSError(errno.ENXIO, words, name) from None
            time.sleep(0.02)
        else:
            os.set_blocking(handle, True)
            return handle


# --- what is needed for a while only -------------------------------------------------------


@contextmanager
def scratch_file() -> Iterator[IO[bytes]]:
    """An empty file on disk, open for writing and reading, that is gone when the block ends, or the
    process, however it does. It lies where temporary files do (TMPDIR)."""
    folder = Path(tempfile.gettempdir())
    with naming(str(folder)), _Unfinished(folder, folder) as unfinished:
        yield unfinished.file


@contextmanager
def scratch_folder(within: Path | None = None) -> Iterator[Path]:
    """An empty folder in `within` (default: where temporary files lie), which is removed when the
    block ends, or, if the process is killed, by the next one that makes one there. Whoever renames
    it keeps it."""
    within = Path(tempfile.gettempdir()) if within is None else within
    _sweep_once(within)
    while True:
        folder = within / _hidden_name()
        folder.mkdir(0o700)
        with suppress(FileNotFoundError):  # taken for a dead one's, before its lock was held
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.is_dir():
                break
            os.close(handle)
    try:
        with naming(str(within)):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


@contextmanager
def made_folder(path: AnyPath) -> Iterator[Path]:
    """A folder that is there, made with those above it if need be; what was made is removed again
    if the block ends with an error and nothing is in it."""
    folder = Path(name_of(path))
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):
            for each in new:
                each.rmdir()
        raise


# --- unfinished files ----------------------------------------------------------------------


class _Unfinished:
    """A file on its way: without a name, or with a hidden one in `scratch`."""

    def __init__(self, folder: Path, scratch: Path, made_with: int = _OWNERS):
        self._folder_path, self._scratch_path = folder, scratch
        self._made_with = made_with
        self._name: str | None = None

    def __enter__(self) -> _Unfinished:
        self._folder = os.open(self._folder_path, _FOLDER | os.O_CLOEXEC)
        try:
            self._scratch = os.open(self._scratch_path, _FOLDER | os.O_CLOEXEC)
            try:
                _sweep_once(self._scratch_path)
                self.file: IO[bytes] = self._begin()
            except BaseException:
                os.close(self._scratch)
                raise
        except BaseException:
            os.close(self._folder)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._name is not None:
                with suppress(FileNotFoundError):
                    os.unlink(self._name, dir_fd=self._scratch)
            self.file.close()
        finally:
            os.close(self._scratch)
            os.close(self._folder)

    def _begin(self) -> IO[bytes]:
        if _NAMELESS:
            with suppress(OSError):
                flags = _NAMELESS | os.O_RDWR | os.O_CLOEXEC
                handle = os.open(self._scratch_path, flags, self._made_with)
                with suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return os.fdopen(handle, "w+b")
        return self._named()

    def _named(self) -> IO[bytes]:
        """A new file with a hidden name, its lock held."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            self._name = _hidden_name()
            try:
                handle = os.open(self._name, flags, self._made_with, dir_fd=self._scratch)
            except OSError as error:
                self._name = None
                raise error_of(error.errno or errno.EIO, str(self._scratch_path)) from None
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # taken for a dead one's
                os.close(handle)
                continue
            except OSError:
                return os.fdopen(handle, "w+b")  # a file system without locks: nothing is swept
            if os.fstat(handle).st_nlink:
                return os.fdopen(handle, "w+b")
            os.close(handle)

    def become(self, name: str, mode: int | None, create: bool, durable: bool) -> None:
        """Give the file its name and permissions, in place of what has that name."""
        try:
            self._complete(name, mode, durable)
            if self._name is None and not self._link_nameless(name, create):
                nameless, self.file = self.file, self._named()
                with nameless:
                    nameless.seek(0)
                    shutil.copyfileobj(nameless, self.file, 1 << 20)
                self._complete(name, mode, durable)
            if self._name is not None:
                self._rename_new(name) if create else self._rename(name)
            if durable:
                _sync_folder(self._folder_path)
        except OSError as error:
            raise error_of(error.errno or errno.EIO, str(self._folder_path / name)) from None

    def _complete(self, name: str, mode: int | None, durable: bool) -> None:
        """Nothing but its name is missing after this."""
        self.file.flush()
        self._permit(name, mode)
        if durable:
            os.fsync(self.file.fileno())

    def _permit(self, name: str, mode: int | None) -> None:
        handle = self.file.fileno()
        if mode is None:
            try:
                old = os.stat(name, dir_fd=self._folder)
            except FileNotFoundError:
                return  # it was made with what it is to have
            mode, own = stat.S_IMODE(old.st_mode) & 0o777, os.fstat(handle)
            if (old.st_uid, old.st_gid) != (own.st_uid, own.st_gid):
                try:
                    os.fchown(handle, old.st_uid, old.st_gid)
                except OSError:  # another group must not get what the old one had
                    mode &= 0o707
        with suppress(OSError):  # some file systems know no permissions
            os.fchmod(handle, mode)

    def _link_nameless(self, name: str, create: bool) -> bool:
        """Give a file without a name its name, or a hidden one if the name is taken; False where
        that cannot be done."""
        # With a folder's number Python asks the system to follow the link, without it does not.
        source = f"/proc/self/fd/{self.file.fileno()}"
        try:
            os.link(source, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            return True
        except OSError as error:
            if _only_links_are_missing(error):
                return False
            if create or error.errno != errno.EEXIST:
                raise
        self._name = _hidden_name()
        try:
            os.link(source, self._name, src_dir_fd=self._folder, dst_dir_fd=self._scratch)
            return True
        except OSError as error:
            self._name = None
            if _only_links_are_missing(error):
                return False
            raise

    def _rename(self, name: str) -> None:
        assert self._name is not None
        os.rename(self._name, name, src_dir_fd=self._scratch, dst_dir_fd=self._folder)
        self._name = None

    def _rename_new(self, name: str) -> None:
        """Give a hidden file its name; FileExistsError if that is taken."""
        assert self._name is not None
        try:
            os.link(self._name, name, src_dir_fd=self._scratch, dst_dir_fd=self._folder)
            return
        except OSError as error:
            if not _only_links_are_missing(error):
                raise
        # No hard links. Others that find none wait here for their turn.
        with _locked(self._folder_path):
            try:
                os.stat(name, dir_fd=self._folder, follow_symlinks=False)
            except FileNotFoundError:
                self._rename(name)
                return
            raise error_of(errno.EEXIST, name)


def _only_links_are_missing(error: OSError) -> bool:
    """Whether a link failed for its own sake; where there are none, systems give many reasons."""
    others = (errno.EEXIST, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
    return error.errno not in others


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, where there are locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _hidden_name() -> str:
    return f".kvzip-{_HOST}-{secrets.token_hex(8)}.tmp"


def is_hidden(name: str) -> bool:
    """Whether a file of that name is an unfinished one."""
    return _HIDDEN.fullmatch(name) is not None


def sweep(folder: AnyPath) -> None:
    """Remove the unfinished files, and the scratch folders, of processes that were killed while
    they wrote into a folder."""
    with suppress(OSError), os.scandir(os.fsdecode(folder)) as entries:
        for entry in entries:
            found = _HIDDEN.fullmatch(entry.name)
            if found is not None:
                with suppress(OSError):
                    _remove_if_dead(entry, found[1] == _HOST)


def _sweep_once(folder: Path) -> None:
    """Sweep a folder, if this process has not done so."""
    found = folder.stat()
    key = (found.st_dev, found.st_ino)
    if key not in _swept:
        _swept.add(key)
        sweep(folder)


def _remove_if_dead(entry: os.DirEntry[str], here: bool) -> None:
    """Remove a hidden file or folder if nobody holds its lock; another machine's only if it is
    old."""
    is_folder = entry.is_dir(follow_symlinks=False)
    access = os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR
    handle = os.open(entry.path, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if not (is_folder or stat.S_ISREG(found.st_mode)):
            return
        if not here and time.time() - found.st_mtime < _FOREIGN_SECONDS:
            return
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.lstat(entry.path), found):
            return
        if is_folder:
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)  # noqa: PTH108
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- errors --------------------------------------------------------------------------------


def error_of(number: int, name: str) -> OSError:
    """The error that the system raises with an `errno` for a file of that name."""
    return OSError(number, os.strerror(number), name)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """A full disk is told with the name of what was written; and with the name that was looked for
    from there, that the current folder is gone."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = name
        elif is_folder_gone(error):
            raise FileNotFoundError(errno.ENOENT, GONE, name) from None
        raise


def is_folder_gone(error: OSError) -> bool:
    """Whether an error says, without a name, that this process's current folder was removed."""
    if error.errno != errno.ENOENT or error.filename is not None:
        return False
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


# --- being ended ---------------------------------------------------------------------------


def leave_nothing_behind() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does: what is unfinished is removed.

    This is for command lines: a library does not own its process's signals. A second signal ends
    the process at once, and one that is ignored (nohup) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    process = os.getpid()

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a fork has its own ways to clean up
            os.kill(os.getpid(), number)
        raise Terminated(number)

    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)
