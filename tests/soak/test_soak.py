"""`make soak` (tests/soak/run.py) for a few rounds: it notices a number that differs, and goes on
where it stopped."""

from __future__ import annotations

import pytest
import runs
from soak import run

import kvzip


@pytest.mark.parametrize("target", run.targets())
@pytest.mark.drawn(3)
def test_a_round_of_every_target_comes_back(target):
    assert sum(run.round_of(target, number) for number in range(2)) > 0


def test_a_number_that_differs_is_noticed(monkeypatch, tmp_path):
    decode = kvzip.decode

    def wrong(*given, **how):
        snapshot = decode(*given, **how)
        layers = [(layer.k.copy(), layer.v) for layer in snapshot.layers]
        layers[-1][0].reshape(-1)[-1] ^= 1
        return kvzip.Snapshot.from_arrays(layers, snapshot.dtype)

    target, log = "channel/uint8/scalar", tmp_path / "log.jsonl"
    monkeypatch.setattr(run, "KEPT", tmp_path / "kept.jsonl")  # there all is done
    monkeypatch.setattr(kvzip, "decode", wrong)
    assert not run.soak(log, 60, [target])
    [entry] = runs.entries(log)
    assert not entry["good"]
    assert "differs: at" in entry["error"]
    failed = entry["rounds"][1] - 1
    assert entry["error"].startswith(f"round {failed}: ")
    with pytest.raises(AssertionError, match="differs: at"):
        run.round_of(target, failed)
    monkeypatch.undo()
    assert run.round_of(target, failed) > 0


def test_another_run_goes_on_until_all_is_done(monkeypatch, tmp_path):
    rounds = []
    monkeypatch.setitem(run.CODECS, "channel", lambda rng, dtype: rounds.append(rng.random()) or 10)
    targets = ["channel/bf16/scalar", "channel/fp16/scalar"]
    monkeypatch.setattr(run, "targets", lambda: dict.fromkeys(targets, 40))
    monkeypatch.setattr(run, "KEPT", tmp_path / "kept.jsonl")
    log = tmp_path / "folder" / "log.jsonl"
    assert run.soak(log, 60, targets[:1], each=0)
    assert run.counts(log) == {targets[0]: (4, 40)}
    assert {"commit", "machine", "day"} < {*runs.entries(log)[0]}
    with log.open("a") as file:
        file.write('{"target": "chan')  # killed as it wrote
    assert run.soak(log, 60, [], each=0)
    assert run.counts(log) == dict.fromkeys(targets, (4, 40))
    assert len({*rounds}) == 8
    runs.keep(log, run.KEPT)
    assert run.counts(run.KEPT, log) == dict.fromkeys(targets, (4, 40))
    assert len(runs.entries(run.KEPT)) == 2
    assert run.soak(log, 60, [], each=0)
    assert len(rounds) == 8
    monkeypatch.setattr(run, "targets", lambda: dict.fromkeys(targets, 50))
    assert run.soak(log, 60, [], each=0)
    runs.keep(log, run.KEPT)
    assert run.counts(run.KEPT) == dict.fromkeys(targets, (5, 50))
    assert len({*rounds}) == 10
