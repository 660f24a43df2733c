"""Sweeps: nothing lost, nothing twice, whatever happens; the same rows wherever they are made."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from clusters import ray_cluster

from kvzip.errors import KVZipError
from kvzip.eval.results.sweep import Row
from kvzip.eval.sweep import rows as stored_rows
from kvzip.eval.sweep.grid import read_config
from kvzip.eval.sweep.measure import measure
from kvzip.eval.sweep.points import Point
from kvzip.eval.sweep.query import query
from kvzip.eval.sweep.rows import RowFolder
from kvzip.eval.sweep.run import run

pytest.importorskip("pyarrow", reason="sweeps need the extra `eval`")

pytestmark = pytest.mark.first

TINY = "synthetic:layers=1,heads=1,dim=8"
MEASURED = ("id", "status", "raw_bytes", "encoded_bytes", "ratio", "bits_per_value")
"""Columns that do not depend on who measures and when."""


def grid(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return path


def cheap(tmp_path: Path, repeats: int = 25) -> Path:
    """8 cheap points, 25 times each."""
    return grid(
        tmp_path,
        f"""
        repeats = {repeats}
        [grid]
        codec = ["raw", "zstd", "lz4", "planes"]
        model = ["{TINY}"]
        tokens = [16, 24]
        """,
    )


def comparable(folder: Path) -> list[tuple[Any, ...]]:
    return sorted(tuple(row[c] for c in MEASURED) for row in RowFolder(folder).read())


# --- points ------------------------------------------------------------------------------------


def test_a_grid_is_all_combinations_and_a_list_comes_beside_it(tmp_path: Path) -> None:
    points = read_config(
        grid(
            tmp_path,
            f"""
            repeats = 2
            [grid]
            codec = ["raw", "zstd:level=9"]
            model = ["{TINY}"]
            tokens = [16, 32]
            dtype = ["bf16", "fp32"]
            [[points]]
            codec = "planes"
            model = "{TINY}"
            [[points]]
            codec = "raw"
            model = "{TINY}"
            tokens = 16
            """,
        )
    )
    assert len(points) == 2 * (2 * 2 * 2 + 1)  # the last is of the grid, too
    assert len({p.id for p in points}) == len(points)
    caches = [(p.model, p.dtype, p.text, p.tokens, p.document) for p in points]
    assert len(list(itertools.groupby(caches))) == len(set(caches))  # each cache in one go


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no point"),
        ("[grid]\ncodec = []", "grid.codec is an empty list"),
        ("[grid]\ncodec = ['raw']\ntokens = [1]", "tokens is 1"),
        ("[grid]\ncodec = ['raw']\ntokens = ['many']", "Expected `int`"),
        ("[grid]\ncodec = ['gzip']", "no codec 'gzip'"),
        ("[grid]\ncodec = ['raw']\ndtype = ['int4']", "int4"),
        ("[grid]\ncodec = ['raw']\ncolour = ['red']", "unknown field `colour`"),
        ("[grid]\ncodec = ['raw']\nmodel = ['synthetic:heads=0']", "write synthetic:layers"),
        ("[grid]\ncodec = ['predictive']", "needs a profile"),
        ("[grid]\ncodec = ['raw']\nrepeat = [1]", "write repeats"),
        ("repeats = 0\n[grid]\ncodec = ['raw']", "repeats is 0"),
        ("[grid]\nmodel = ['x']", "missing required field `codec`"),
        ("[grid", "fields of a point: codec, model"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(KVZipError, match=says.replace("[", r"\[")) as error:
        read_config(grid(tmp_path, text))
    assert "sweep.toml" in str(error.value)


def test_a_sweep_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KVZipError, match="No such file"):
        read_config(tmp_path / "none.toml")


# --- rows --------------------------------------------------------------------------------------


def test_a_row_holds_the_point_the_figures_and_the_machine(tmp_path: Path) -> None:
    point = Point(codec="planes", model=TINY, tokens=64)
    row = measure(point, str(tmp_path))
    assert (row.id, row.codec, row.tokens, row.status) == (point.id, "planes", 64, "ok")
    assert row.raw_bytes == 2 * 64 * 8 * 2
    assert row.ratio == row.raw_bytes / row.encoded_bytes  # type: ignore[operator]
    assert row.cpu and row.cores >= 1 and '"kvzip"' in row.versions and row.process
    rows = RowFolder(tmp_path)
    rows.add(row)
    assert [Row(**found) for found in rows.read()] == [row]


def test_what_fails_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is not there, and a codec that gives back something else."""
    import numpy as np

    from kvzip import codec
    from kvzip.codecs.raw.codec import RawCodec

    class Wrong(RawCodec):
        codec_id = "wrong"

        def decode(self, data: memoryview, out: Any, context: Any) -> None:
            super().decode(data, out, context)
            np.bitwise_xor(out, 1, out=out)

    # Gone after the test: other tests look at all codecs.
    monkeypatch.setitem(codec._registered, "wrong", Wrong)
    for point, reason in (
        (Point(codec="wrong", model=TINY, tokens=16), "other numbers"),
        (Point(codec="raw", model="./no/model", tokens=16), "no model at"),
        (Point(codec="raw", model=TINY, tokens=16, dtype="fp8_e5m2"), "makes bf16"),
    ):
        row = measure(point, str(tmp_path))
        assert row.status == "failed" and reason in (row.reason or "")
        assert row.ratio is None and row.decode_gbps is None and row.encoded_bytes is None


def test_failed_points_are_told_and_measured_again_when_asked(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    points = [
        Point(codec="raw", model=TINY, tokens=16),
        Point(codec="raw", model=TINY, tokens=16, profile=str(tmp_path / "later.kvprofile")),
    ]
    first = run(points, tmp_path / "out")
    assert (first.measured, first.kept) == (2, 0)
    assert [f["codec"] for f in first.failed] == ["raw"]
    assert "later.kvprofile" in first.failed[0]["reason"]
    again = run(points, tmp_path / "out")
    assert (again.measured, again.kept, again.failed) == (0, 2, first.failed)
    from kvzip.profile import Profile

    Profile({}, {"model": "none"}).save(tmp_path / "later.kvprofile")
    last = run(points, tmp_path / "out", retry=True)
    assert (last.measured, last.kept, last.failed) == (1, 1, [])
    assert not text.exists()


def test_a_damaged_row_is_named_and_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    points = read_config(cheap(tmp_path, repeats=1))
    run(points, tmp_path / "out")
    rows = tmp_path / "out" / "rows"
    whole = RowFolder(tmp_path / "out").read()
    paths = sorted(rows.glob("*.parquet"))
    assert len(paths) > 4
    good = paths[0].read_bytes()
    paths[0].write_bytes(b"")
    paths[1].write_bytes(bytes(len(good)))
    paths[2].write_bytes(good[: len(good) // 2])
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"other": [1]}), paths[3])
    assert len(RowFolder(tmp_path / "out").read()) == len(whole) - 4  # who only reads goes on, too
    assert all(str(path) in caplog.text for path in paths[:4])
    again = run(points, tmp_path / "out")
    assert (again.measured, again.kept) == (4, len(whole) - 4)
    assert sorted(again.damaged) == [str(p.with_suffix(".damaged")) for p in paths[:4]]
    found = RowFolder(tmp_path / "out").read()
    assert {row["id"] for row in found} == {row["id"] for row in whole}
    assert run(points, tmp_path / "out").measured == 0
    # All of them in one file, and that is damaged.
    monkeypatch.setattr(stored_rows, "MERGE_ABOVE", 3)
    run(points, tmp_path / "out")
    (rows / "merged.parquet").write_bytes(b"x")
    assert run(points, tmp_path / "out").measured == len(whole)


def test_files_say_what_they_are_and_others_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as parquet

    point = Point(codec="raw", model=TINY, tokens=16)
    folder, row = RowFolder(tmp_path), measure(point, str(tmp_path))
    folder.add(row)
    [path] = (tmp_path / "rows").iterdir()
    about = parquet.read_schema(path).metadata
    assert (about[b"kind"], about[b"version"]) == (b"sweep", b"1")
    # Rows that a kvzip before this wrote say nothing of themselves.
    parquet.write_table(parquet.read_table(path).replace_schema_metadata(), path)
    assert len(folder.read()) == 1
    monkeypatch.setattr(Row, "version", 2)
    folder.add(row)
    monkeypatch.undo()
    later = path.read_bytes()
    with pytest.raises(KVZipError, match="rows of version 2"):
        run([point], tmp_path)
    assert path.read_bytes() == later


def test_rows_of_another_kind_are_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    point = Point(codec="raw", model=TINY, tokens=16)
    folder = RowFolder(tmp_path)
    folder.add(measure(point, str(tmp_path)))
    [path] = (tmp_path / "rows").iterdir()
    table = parquet.read_table(path)
    parquet.write_table(table.replace_schema_metadata({"kind": "other", "version": "1"}), path)
    with pytest.raises(KVZipError, match="rows of kind 'other'"):
        folder.read()


def test_many_rows_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "MERGE_ABOVE", 3)
    points = read_config(cheap(tmp_path, repeats=1))
    run(points, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out" / "rows").iterdir()] == ["merged.parquet"]
    before = RowFolder(tmp_path / "out").read()
    assert len(before) == 8
    # A kill between writing the merged file and removing the small ones.
    RowFolder(tmp_path / "out").add(Row(**before[0]))
    assert RowFolder(tmp_path / "out").read() == before
    assert run(points, tmp_path / "out").measured == 0


def test_one_sweep_at_a_time(tmp_path: Path) -> None:
    with (
        RowFolder(tmp_path).alone(),
        pytest.raises(KVZipError, match="another sweep"),
    ):
        run([Point(codec="raw", model=TINY)], tmp_path)


def test_a_worker_that_dies_is_told(tmp_path: Path) -> None:
    """The file size limit of a process stands for a machine that kills it."""
    code = (
        "import os, sys\n"
        "from kvzip.eval.sweep.points import Point\n"
        "from kvzip.eval.sweep.run import run\n"
        "def die(): os._exit(9)\n"
        "class Deadly(Point, frozen=True):\n"
        "    def __reduce__(self): return die, ()\n"
        "if __name__ == '__main__':\n"
        "    try: run([Deadly(codec='raw', model='synthetic')], sys.argv[1])\n"
        "    except Exception as e: print(type(e).__name__, e)\n"
    )
    script = tmp_path / "deadly.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert "KVZipError a worker died" in done.stdout, done.stderr


def small_disk(folder: Path, size: str) -> list[str]:
    """What a command begins with that finds `folder` on a disk of that size; what is on it is in
    `folder` of a name with "-kept" when the command has ended."""
    kept = f"{folder}-kept"
    script = (
        f"mount -t tmpfs -o size={size} none {folder} && cp -rT {kept} {folder} && "
        f'"$@"; code=$?; cp -rT {folder} {kept}; exit $code'
    )
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]


@pytest.mark.parametrize("of", ["rows", "caches"])
@pytest.mark.drawn(2)
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, of: str
) -> None:
    out, kept = tmp_path / "out", tmp_path / "out-kept"
    out.mkdir()
    kept.mkdir()
    tried = [*small_disk(out, "1m"), "true"]
    if not shutil.which("unshare") or subprocess.run(tried, capture_output=True).returncode:
        pytest.skip("needs unshare (util-linux) and user namespaces")
    lengths = [16, 24] if of == "rows" else [16, 20_000]
    config = grid(
        tmp_path,
        f'repeats = 4\n[grid]\ncodec = ["raw", "zstd"]\nmodel = ["{TINY}"]\ntokens = {lengths}',
    )
    size = "80k" if of == "rows" else "300k"
    done = subprocess.run([*small_disk(out, size), *command(config, out)], capture_output=True)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["kind"] == "system" and str(out) in found["error"]
    assert "the disk it is on is full" in found["error"] and "run again" in found["error"]
    rows = {row["id"]: row["date"] for row in RowFolder(kept).read()}
    assert 0 < len(rows) < 16
    summary = run(read_config(config), kept)
    assert (summary.kept, summary.measured, summary.failed) == (len(rows), 16 - len(rows), [])
    assert rows.items() <= {row["id"]: row["date"] for row in RowFolder(kept).read()}.items()


# --- killed and resumed ------------------------------------------------------------------------


def command(config: Path, out: Path, *more: str) -> list[str]:
    script = str(Path(sys.executable).parent / "kvzip")
    return [script, "sweep", str(config), "--out", str(out), "--json", *more]


def test_killed_at_random_nothing_is_lost_or_done_twice(tmp_path: Path) -> None:
    """64 points; the process is killed, with SIGKILL, after a random number of rows, twice."""
    config, out = cheap(tmp_path, repeats=8), tmp_path / "out"
    rows = out / "rows"
    seed = int(os.environ.get("KVZIP_TEST_SEED", time.time()))
    rng = random.Random(seed)
    finished: dict[str, str] = {}
    for limit in sorted(rng.sample(range(1, 60), 2)):
        process = subprocess.Popen(
            command(config, out, "--workers", "2"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and len(list(rows.glob("*.parquet"))) < limit:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = {row["id"]: row["process"] + row["date"] for row in RowFolder(out).read()}
        # What was there is there, as it was.
        assert finished.items() <= found.items(), seed
        finished = found
    assert 0 < len(finished) <= 64, seed
    done = subprocess.run(command(config, out), capture_output=True, text=True)
    assert done.returncode == 0, (seed, done.stderr)
    left = RowFolder(out).read()
    wanted = {point.id for point in read_config(config)}
    assert len(wanted) == 64
    assert Counter(row["id"] for row in left) == Counter(wanted), seed
    assert finished.items() <= {r["id"]: r["process"] + r["date"] for r in left}.items(), seed
    assert {row["status"] for row in left} == {"ok"}
    assert not list(rows.glob(".*")), "what a killed process left is cleared away"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.drawn(2)
def test_ended_by_a_signal_it_says_so_once(tmp_path: Path, number: int) -> None:
    """Its processes, which have its arguments, are ended, too, and are silent."""
    script = tmp_path / "kvzip"
    script.write_text(
        "import signal\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "from kvzip.cli import main\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    _, *line = command(cheap(tmp_path, 200), tmp_path / "out", "--workers", "2")
    process = subprocess.Popen(
        [sys.executable, str(script), *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not list((tmp_path / "out" / "rows").glob("*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    found = json.loads(out)
    assert (found["kind"], found["exit"]) == ("interrupted", 128 + number)


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    process = subprocess.Popen(command(cheap(tmp_path, 200), tmp_path / "out", "--workers", "2"))
    while not list((tmp_path / "out" / "rows").glob("*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    made = {row["process"].rpartition(":")[2] for row in RowFolder(tmp_path / "out").read()}
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in made):
        assert time.monotonic() < deadline, made
        time.sleep(0.05)


# --- on a cluster ------------------------------------------------------------------------------


def test_a_ray_cluster_of_two_nodes_gives_the_same_rows(tmp_path: Path) -> None:
    points = read_config(cheap(tmp_path, repeats=3))
    run(points, tmp_path / "here")
    with ray_cluster(nodes=2) as address:
        done = run(points, tmp_path / "there", ray=address)
    assert (done.measured, done.failed) == (24, [])
    assert comparable(tmp_path / "there") == comparable(tmp_path / "here")
    assert len({row["process"] for row in RowFolder(tmp_path / "there").read()}) >= 2


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="--ray needs the extra `ray`")
    with pytest.raises(KVZipError, match="no Ray cluster at 'nonsense'"):
        run([Point(codec="raw", model=TINY)], tmp_path, ray="nonsense")


# --- queries -----------------------------------------------------------------------------------


def test_queries(tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="queries need the extra `eval`")
    out = tmp_path / "out"
    with pytest.raises(KVZipError, match="no sweep at"):
        query(out, "select 1")
    with pytest.raises(KVZipError, match="not the folder of a sweep"):
        query(tmp_path, "select 1")
    RowFolder(out)
    with pytest.raises(KVZipError, match="no rows yet"):
        query(out, "select 1")
    for codec, tokens in itertools.product(("raw", "planes"), (16, 24)):
        RowFolder(out).add(measure(Point(codec=codec, model=TINY, tokens=tokens), str(out)))
    found = query(out, "select codec, count(*) n, max(ratio) r from sweep group by 1 order by 1")
    assert [(row["codec"], row["n"]) for row in found] == [("planes", 2), ("raw", 2)]
    assert found[0]["r"] == max(r["ratio"] for r in RowFolder(out).read() if r["codec"] == "planes")
    [path, *_] = (out / "rows").glob("*.parquet")
    assert query(path, "select count(*) n from sweep") == [{"n": 1}]
    with pytest.raises(KVZipError, match="ratios"):
        query(out, "select ratios from sweep")
    with pytest.raises(KVZipError, match="not a Parquet file"):
        query(cheap(tmp_path), "select 1")
