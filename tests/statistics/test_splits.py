"""Parts of a cache as workers have them: together they are all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvzip
from kvzip.cli import main
from kvzip.errors import UnsupportedError, UsageError
from kvzip.snapshot import Snapshot
from kvzip.statistics.splits import Cut


def cache(layers: int = 5, heads: int = 4, tokens: int = 60, seed: int = 0) -> Snapshot:
    random = np.random.default_rng(seed)
    base = random.normal(size=(2, heads, tokens, 8)).astype(np.float32)
    pairs = [
        tuple((base * (i + 1) + 0.1 * random.normal(size=base.shape)).astype(np.float16))
        for i in range(layers)
    ]
    return Snapshot.from_arrays(pairs, token_ids=random.integers(0, 99, tokens))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 3), (4, 5)])
def test_parts_are_the_whole(tensor: int, pipeline: int) -> None:
    whole, cut = cache(), Cut(tensor, pipeline)
    assert cut.parts(whole) == tensor * pipeline
    parts = [cut.of(whole, n) for n in range(cut.parts(whole))]
    layers = []
    for stage in range(pipeline):
        own = parts[stage * tensor : (stage + 1) * tensor]
        for each in zip(*(part.layers for part in own), strict=True):
            layers.append(tuple(np.concatenate(bits) for bits in zip(*each, strict=True)))
    assert all(np.array_equal(part.token_ids, whole.token_ids) for part in parts)
    assert len(layers) == len(whole.layers)
    for (k, v), layer in zip(layers, whole.layers, strict=True):
        assert np.array_equal(k, layer.k) and np.array_equal(v, layer.v)


def test_stages_are_those_of_vllm() -> None:
    """As its ``get_pp_indices`` cuts them."""
    sizes = [[len(Cut(1, m).stage(n, i)) for i in range(m)] for n, m in ((7, 2), (10, 4), (9, 4))]
    assert sizes == [[4, 3], [2, 3, 3, 2], [2, 2, 3, 2]]
    with pytest.raises(UsageError, match="5 layers cannot be cut into 6"):
        Cut(1, 6).stage(5, 0)


def test_more_workers_than_heads_repeat_them() -> None:
    whole = cache(heads=2)
    parts = [Cut(4).of(whole, n) for n in range(4)]
    assert parts[0] == parts[1] and parts[2] == parts[3] and parts[0] != parts[2]
    assert np.array_equal(parts[2].layers[0].k, whole.layers[0].k[1:])
    with pytest.raises(UnsupportedError, match="4 heads, which 3 workers cannot share"):
        Cut(3).of(cache(), 0)


@pytest.mark.parametrize("text", ["", "2", "tp=0", "tp=2,tp=4", "pp=2;tp=2", "ep=2"])
def test_splits_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="write tp=N"):
        Cut.read(text)


@pytest.mark.parametrize(("codec", "split"), [("channel", "tp=2, pp=2"), ("predictive", "tp=2")])
def test_fit_writes_a_profile_for_each_part(
    tmp_path: Path, capsys: Any, codec: str, split: str
) -> None:
    documents = [cache(layers=3, seed=n) for n in range(3)]
    names = [str(tmp_path / f"{n}.safetensors") for n in range(3)]
    for document, name in zip(documents, names, strict=True):
        document.save(name)
    out, cut = tmp_path / "m.kvprofile", Cut.read(split)
    command = ["fit", *names, "-o", str(out), "--split", split, "--held-out", "1"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--codec", codec, "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)["profiles"]
    assert [each["profile"] for each in told] == [
        str(cut.path(out, n)) for n in range(cut.parts(documents[0]))
    ]
    assert {each["held_out"][0]["file"] for each in told} == {names[1]}
    assert not out.exists() and not list(tmp_path.glob(".kvzip*"))
    for n, profile in enumerate(kvzip.Profile.load(each["profile"]) for each in told):
        part = cut.of(documents[1], n)
        data = kvzip.encode(part, codec, profile=profile)
        assert kvzip.decode(data, profile=profile) == part


def test_the_next_split_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """A part of each document: together they are as large as what is learned from."""
    cache(layers=2).save(tmp_path / "doc.safetensors")
    command = ["fit", "doc.safetensors", "-o", "m.kvprofile", "--split", "pp=2"]
    command += ["--codec", "channel"]
    killed = "import os; profiles._learned = lambda *_: os._exit(9)"
    for before, code, left in ((killed, 9, 1), ("", 0, 0)):
        run = f"from kvzip.cli import main, profiles; {before}\nmain({command!r})"
        done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, check=False)
        assert done.returncode == code and len(list(tmp_path.glob(".kvzip*"))) == left
