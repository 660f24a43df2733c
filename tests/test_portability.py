"""Without what only Linux has, as on macOS, which these tests do not run on."""

from __future__ import annotations

import subprocess
import sys

from support import cache_like, make_snapshot

import kvzip

ELSEWHERE = """
import builtins, io, os, sys

for name in (
    "sched_getaffinity sched_setaffinity sched_getscheduler sched_setscheduler sched_getparam "
    "O_PATH O_TMPFILE O_DIRECT O_LARGEFILE O_NOATIME O_RSYNC memfd_create eventfd pidfd_open "
    "splice copy_file_range getrandom getxattr setxattr listxattr removexattr posix_fallocate "
    "posix_fadvise fdatasync getresuid setresuid"
).split():
    if hasattr(os, name):
        delattr(os, name)

def without_proc(opens):
    def opened(path, *more, **options):
        name = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        # On Linux threadpoolctl finds libraries by their maps.
        if name.startswith("/proc/") and name != "/proc/self/maps":
            raise FileNotFoundError(2, "No such file or directory", path)
        return opens(path, *more, **options)
    return opened

os.open = without_proc(os.open)
io.open = builtins.open = without_proc(open)
"""
USES = """
from pathlib import Path
import kvzip
from kvzip.store import Store

folder = Path(sys.argv[1])
snapshot = kvzip.Snapshot.load(folder / "doc.safetensors")
for codec in ("raw", "planes", "channel"):
    kvzip.write(folder / "doc.kvz", snapshot, codec)
    assert kvzip.decode(folder / "doc.kvz") == snapshot
    assert kvzip.decode(kvzip.encode(snapshot, codec)) == snapshot
store = Store(folder / "store", block_tokens=8)
key = store.put(snapshot).key
origin = snapshot.origin
with store.find(snapshot.token_ids, model=origin.model, revision="r1", dtype="bf16") as match:
    assert match.snapshot() == snapshot
assert store.remove(key) and not store.prune() and store.documents() == []
kvzip.Profile.fit([snapshot], codec="channel").save(folder / "p.kvprofile")
kvzip.Profile.load(folder / "p.kvprofile")
"""
COMMAND = """
from kvzip.cli import main
sys.argv[0] = "kvzip"
sys.exit(main())
"""


def elsewhere(code, *arguments, **more):
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **more,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_files_and_stores(tmp_path):
    make_snapshot(cache_like, 1, "bf16").save(tmp_path / "doc.safetensors")
    elsewhere(USES, tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["doc.kvz", "doc.safetensors", "p.kvprofile", "store"]


def test_commands(tmp_path):
    make_snapshot(cache_like, 1, "bf16").save(tmp_path / "doc.safetensors")
    kvzip.write(tmp_path / "doc.kvz", kvzip.Snapshot.load(tmp_path / "doc.safetensors"))
    elsewhere(COMMAND, "doctor")
    elsewhere(COMMAND, "encode", tmp_path / "doc.safetensors", "-o", tmp_path / "other.kvz")
    assert (tmp_path / "other.kvz").read_bytes() == (tmp_path / "doc.kvz").read_bytes()
    for command in (["info", "-"], ["verify", "-", "--against", tmp_path / "doc.safetensors"]):
        with (tmp_path / "doc.kvz").open("rb") as file:
            elsewhere(COMMAND, *command, stdin=file)
        with subprocess.Popen(["cat", tmp_path / "doc.kvz"], stdout=subprocess.PIPE) as pipe:
            elsewhere(COMMAND, *command, stdin=pipe.stdout)
