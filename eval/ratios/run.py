"""Learn on the training split of every text, measure on the test split, file by file and layer by
layer.

Everything that takes long is kept in the working folder: captured caches, finished layers of a fit,
the profile. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvzip import api, capture
from kvzip.codec import Codec, get_codec
from kvzip.codecs.predictive.fit import check_one
from kvzip.errors import KVZipError, UsageError
from kvzip.eval.budget import Counts, Step
from kvzip.eval.ratios.overlap import passages, seen
from kvzip.eval.ratios.texts import SPLITS, Text
from kvzip.eval.results.provenance import made_by
from kvzip.eval.results.ratios import (
    DocumentRow,
    LayerRow,
    LearnedProfile,
    RatioRow,
    RatiosResult,
    Split,
    TextFile,
)
from kvzip.eval.speed.inputs import parameters
from kvzip.eval.speed.learning import training_count
from kvzip.files import replacing
from kvzip.models import LoadedModel, load_model
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot, sha256_raw

CHARACTERS = 8
"""Characters of text that are taken for a token: more than tokenizers need."""


def _silent(what: str, share: float | None = None) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Captured:
    """A document's cache in a file, and what the result says of it."""

    path: Path
    row: DocumentRow


def run(
    model: str,
    texts: Sequence[Text],
    work: Path,
    *,
    tokens: int,
    train: int,
    test: int,
    dtype: str | None = None,
    device: str = "cpu",
    codecs: Sequence[str],
    seed: int = 0,
    max_bytes: int | None = None,
    like: RatiosResult | None = None,
    command: str = "kvzip eval ratios",
    step: Step = _silent,
) -> RatiosResult:
    """The protocol on one model: `train` and `test` documents of `tokens` tokens of every text.

    Codecs that need a profile learn it from the training documents of all texts together;
    `max_bytes`: how big that of `predictive` may get, or its own default. `like`:
    a stored result whose documents must be the same, or, of another model, whose texts.

    Raises KVZipError when a text is too short, documents are not those of `like`, or a document
    of the test split is one of the training split, too.
    """
    chosen = {spec: get_codec(spec) for spec in codecs}
    tokens = integer("tokens", tokens, capture.LEAST_TOKENS)
    train = training_count(train, chosen.values())
    test = integer("test", test, 1, 10**6)
    seed = integer("seed", seed, 0, 2**32 - 1)
    if max_bytes is not None:
        max_bytes = integer("max_bytes", max_bytes, 0)
    capture.check_cast(dtype)
    if not (texts and chosen):
        raise UsageError("name at least one text and one codec")
    predicts = any(codec.codec_id == "predictive" for codec in chosen.values())
    if max_bytes is not None and not predicts:
        raise UsageError("max_bytes is for predictive, which is not among the codecs")
    work.mkdir(parents=True, exist_ok=True)
    step(f"loading {model}")
    loaded = load_model(model, capture.computed_in(dtype), device)
    protocol = Protocol(texts, work, tokens, {"train": train, "test": test}, dtype)
    check = partial(check_one, max_bytes=max_bytes) if predicts else None
    files, captured = protocol.captured(loaded, like, step, check)
    learning = [found.path for found in captured if found.row.split == "train"]
    profiles = _learn(chosen, learning, work, max_bytes, step)
    rows = measure(chosen, [c for c in captured if c.row.split == "test"], profiles, step)
    first = Snapshot.load(captured[0].path)
    return RatiosResult(
        **made_by(command),
        model=loaded.id,
        revision=loaded.revision,
        architecture=type(loaded.model).__name__,
        dtype=first.dtype,
        layers=len(first.layers),
        hidden_size=int(loaded.model.config.get_text_config(decoder=True).hidden_size),
        numbers_per_token=first.layout.numbers / first.tokens,
        parameters=parameters(loaded.model),
        document_tokens=tokens,
        seed=seed,
        texts=files,
        documents=[found.row for found in captured],
        profiles=[
            LearnedProfile(name, p.id, p.nbytes, len(learning), tokens * len(learning))
            for name, p in profiles.items()
        ],
        rows=rows,
    )


@dataclass(frozen=True)
class Protocol:
    """Which documents take part: cut from texts, captured into files of the working folder."""

    texts: Sequence[Text]
    work: Path
    tokens: int
    """Of a document."""
    counts: Mapping[Split, int]
    """Documents of each text."""
    dtype: str | None = None
    """Of the cache; None is the model's own."""
    full_history: bool = False
    """Whether sliding layers are kept whole."""

    def captured(
        self,
        loaded: LoadedModel,
        like: RatiosResult | None = None,
        step: Step = _silent,
        check: Callable[[Path], None] | None = None,
    ) -> tuple[list[TextFile], list[Captured]]:
        """The texts, and every document's cache. What is captured already is kept. `check` is told
        of the first, and may raise before all others are captured.

        Raises KVZipError when a text is too short, or documents are not those of `like`.
        """
        files = self._write_texts()
        documents = self._cut(loaded)
        if like is not None:
            check_same_documents(like, loaded.revision, files, [row for row, _ in documents])
        captured = []
        for n, (row, document) in enumerate(documents):
            step(f"capturing {row.name}", n / len(documents))
            folder = self.work / "captured" / f"{row.kind}.{row.split}"
            [path] = capture.capture(
                loaded, [document], folder, dtype=self.dtype, full_history=self.full_history
            )
            captured.append(Captured(path, row))
            if check is not None and n == 0:
                check(path)
        return files, captured

    def _write_texts(self) -> list[TextFile]:
        """Write every split of every text into the working folder, and say what they are."""
        folder = self.work / "texts"
        folder.mkdir(exist_ok=True)
        found = []
        for text in self.texts:
            for split in SPLITS:
                content = text.splits[split].encode()
                with replacing(folder / f"{text.kind}.{split}.txt") as file:
                    file.write(content)
                digest = hashlib.sha256(content).hexdigest()
                found.append(TextFile(text.kind, split, len(text.splits[split]), digest))
        return found

    def _cut(self, loaded: LoadedModel) -> list[tuple[DocumentRow, capture.Document]]:
        """The first documents of every split of every text. Raises KVZipError where there are
        fewer."""
        found = []
        for text in self.texts:
            for split in SPLITS:
                wanted = self.counts[split]
                if not wanted:
                    continue
                path = self.work / "texts" / f"{text.kind}.{split}.txt"
                source, some = capture.Text.read([str(path)]), slice(0, wanted)
                cut = capture.cut_documents(loaded.tokenizer, source, self.tokens, some)
                if len(cut) < wanted:
                    raise KVZipError(
                        f"{text.kind} has {len(cut)} documents of {self.tokens} tokens to {split}, "
                        f"and {wanted} are wanted"
                    )
                for document in cut:
                    digest = hashlib.sha256(document.token_ids.astype("<u4").tobytes()).hexdigest()
                    row = DocumentRow(text.kind, split, document.number, self.tokens, digest)
                    found.append((row, replace(document, name=row.name)))
        return _with_seen(found)


def _with_seen(
    documents: Sequence[tuple[DocumentRow, capture.Document]],
) -> list[tuple[DocumentRow, capture.Document]]:
    """The documents, those for testing with what the ones to learn from have of them, too."""
    learned = [document.token_ids for row, document in documents if row.split == "train"]
    if not learned:
        return list(documents)
    known = passages(learned)
    return [
        (msgspec.structs.replace(row, seen=seen(document.token_ids, known)), document)
        if row.split == "test"
        else (row, document)
        for row, document in documents
    ]


def check_same_documents(
    like: RatiosResult, revision: str, texts: Sequence[TextFile], documents: Sequence[DocumentRow]
) -> None:
    """Raise KVZipError unless documents are those of a stored result; of another model, whose
    tokens are others, unless texts are."""
    same_model = like.revision == revision
    was = {_name(d): d.sha256 for d in (like.documents if same_model else like.texts)}
    now = {_name(d): d.sha256 for d in (documents if same_model else texts)}
    differing = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
    if differing:
        raise KVZipError(
            f"{len(differing)} of {len({*was, *now})} {'documents' if same_model else 'texts'} "
            f"are not those of the result that was given with --like: first {differing[0]}"
        )


def _name(found: DocumentRow | TextFile) -> str:
    return found.name if isinstance(found, DocumentRow) else f"{found.kind}, {found.split}"


def _learn(
    codecs: Mapping[str, Codec],
    train: Sequence[Path],
    work: Path,
    max_bytes: int | None,
    step: Step,
) -> dict[str, Profile]:
    """What each codec that needs a profile learns of the training documents; kept in the working
    folder."""
    found: dict[str, Profile] = {}
    for codec in codecs.values():
        if not codec.needs_profile or codec.codec_id in found:
            continue
        step(f"learning for {codec.codec_id} from {len(train)} documents")
        told = Counts(step, f"learning for {codec.codec_id}")
        settings: dict[str, Any] = {"resume": work / f"{codec.codec_id}.layers"}
        if max_bytes is not None and codec.codec_id == "predictive":
            settings["max_bytes"] = max_bytes
        profile = Profile.fit(train, told, codec.codec_id, **settings)
        profile.save(work / f"{codec.codec_id}.kvprofile")
        found[codec.codec_id] = profile
    return found


def measure(
    codecs: Mapping[str, Codec],
    documents: Sequence[Captured],
    profiles: Mapping[str, Profile],
    step: Step = _silent,
) -> list[RatioRow]:
    """Encode every document with every codec, decode it again, and add up the bytes of files and
    layers, kind by kind. One document is in memory at a time. `profiles`: by name of codec; of
    those that can do without, too."""
    sums: dict[tuple[str, str], _Sum] = {}
    for n, document in enumerate(documents):
        snapshot = Snapshot.load(document.path)
        for spec, codec in codecs.items():
            step(f"{spec} on {document.row.name}", n / len(documents))
            total = sums.setdefault((document.row.kind, spec), _Sum(spec, document.row.kind))
            total.add(snapshot, codec, profiles.get(codec.codec_id))
    return [total.row() for total in sums.values()]


class _Sum:
    """A row in the making."""

    def __init__(self, spec: str, kind: str):
        self.spec, self.kind = spec, kind
        self.documents = self.numbers = self.raw = self.encoded = 0
        self.exact = True
        self.parts: dict[tuple[int, str], np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
        """Numbers, raw bytes and encoded bytes of each part of each layer."""

    def add(self, snapshot: Snapshot, codec: Codec, profile: Profile | None) -> None:
        """Encode one document, and decode it."""
        blob = api.encode(snapshot, codec, profile)
        self.documents += 1
        self.numbers += snapshot.layout.numbers
        self.raw += snapshot.raw_bytes
        self.encoded += len(blob)
        with api.open(blob, profile) as reader:
            self.exact &= sha256_raw(reader.decode()) == sha256_raw(snapshot)
            for i, name, part in snapshot.layout.parts():
                length = sum(reader.index.length[row] for row in reader.index.rows[i, name])
                sizes = (part.numbers, part.numbers * part.form.itemsize, length)
                before = self.parts.setdefault((i, name), np.zeros(3, np.int64))
                before += sizes

    def row(self) -> RatioRow:
        """The row, with its ratio and bits."""
        layers = [LayerRow(i, name, *map(int, n)) for (i, name), n in self.parts.items()]
        return RatioRow(
            self.spec,
            self.kind,
            self.documents,
            self.numbers,
            self.raw,
            self.encoded,
            self.raw / self.encoded,
            8 * self.encoded / max(self.numbers, 1),
            self.exact,
            layers,
        )
