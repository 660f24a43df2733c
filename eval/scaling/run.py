"""The protocol of `kvzip eval ratios` on several models, with more and more to learn from and
larger and larger profiles.

Documents are those of the protocol. A smaller training set is the beginning of a larger one, kind
by kind, and all points of a model are measured on the same test documents. Sliding layers are kept
whole: what is asked is how well numbers predict each other. Captured caches, finished layers,
profiles and points are kept in the working folder, so that an ended run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from kvzip import capture
from kvzip.codec import get_codec
from kvzip.codecs.predictive.allotment import Allotment, allot, least_bytes
from kvzip.codecs.predictive.documents import Documents, Vocabulary
from kvzip.codecs.predictive.fit import check_one, documents_apart, multiplications
from kvzip.errors import UsageError
from kvzip.eval.budget import Counts, Step
from kvzip.eval.kept import kept
from kvzip.eval.ratios.run import Captured, Protocol, measure
from kvzip.eval.ratios.texts import Text
from kvzip.eval.results.provenance import made_by
from kvzip.eval.results.ratios import RatioRow, RatiosResult
from kvzip.eval.results.scaling import (
    KindSizes,
    ScaledModel,
    ScalingPoint,
    ScalingResult,
    Shape,
)
from kvzip.eval.scaling.extrapolate import QWEN3_4B, extrapolations, gains
from kvzip.eval.speed.inputs import parameters
from kvzip.models import LoadedModel, load_model
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.statistics.documents import hold_out

WITHOUT_PROFILE = ("planes", "channel")
"""Codecs that are measured with nothing learned; `channel` is measured with a profile, too."""
POINT_VERSION = 3
"""The version of what is measured: points of another one are measured anew."""


@dataclass(frozen=True)
class Plan:
    """What is measured of each model."""

    tokens: int
    """Of a document."""
    train: Sequence[int]
    """Documents of each text that profiles are learned from, one training set for each number."""
    test: int
    """Documents of each text that are measured."""
    shares: Sequence[float]
    """Sizes of profiles, as shares of the model's matrices in bf16."""
    dtype: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, capture.LEAST_TOKENS)
        capture.check_cast(self.dtype)
        if not (self.train and self.shares and min(self.train) >= 1 and self.test >= 1):
            raise UsageError(
                "documents to learn from and to measure, and a profile's size, are "
                "needed: --train, --test, --sizes"
            )
        if not all(0 < share <= 1 for share in self.shares):
            raise UsageError("--sizes are percentages above 0, up to 100")


def run(
    models: Sequence[str],
    texts: Sequence[Text],
    work: Path,
    plan: Plan,
    *,
    others: Sequence[tuple[str, RatiosResult]] = (),
    command: str = "kvzip eval scaling",
    step: Step = lambda what, share=None: None,
) -> ScalingResult:
    """Measure every model. `others`: stored results of `kvzip eval ratios` by the names of their
    files, whose points join those that are measured here.

    Raises KVZipError when a text is too short, and UsageError when there is nothing to measure.
    """
    if not (models or others):
        raise UsageError("name at least one model, or one result of kvzip eval ratios")
    found = [_of_model(model, texts, work / _folder(model), plan, step) for model in models]
    return conclude([*found, *(of_ratios(name, result) for name, result in others)], command)


def conclude(models: Sequence[ScaledModel], command: str) -> ScalingResult:
    """The result, with what its models say together."""
    return ScalingResult(
        **made_by(command),
        models=list(models),
        gains=gains(models),
        target=QWEN3_4B,
        extrapolations=extrapolations(models, QWEN3_4B),
    )


def _folder(model: str) -> str:
    """A folder's name for a reference to a model."""
    return re.sub(r"[^\w.-]+", "-", model)


def _of_model(ref: str, texts: Sequence[Text], work: Path, plan: Plan, step: Step) -> ScaledModel:
    work.mkdir(parents=True, exist_ok=True)
    step(f"loading {ref}")
    loaded = load_model(ref, capture.computed_in(plan.dtype), plan.device)
    protocol = Protocol(
        texts,
        work,
        plan.tokens,
        {"train": max(plan.train), "test": plan.test},
        plan.dtype,
        full_history=True,
    )
    files, captured = protocol.captured(loaded, step=step, check=check_one)
    first = Snapshot.load(captured[0].path)
    shape = _shape(loaded, first)
    del loaded
    measuring = _Measuring(captured, work, shape, step)
    return ScaledModel(
        shape=shape,
        revision=first.origin.revision,
        architecture=first.origin.architecture,
        dtype=first.dtype,
        document_tokens=plan.tokens,
        texts=files,
        documents=[one.row for one in captured],
        points=list(measuring.points(plan)),
    )


def _shape(loaded: LoadedModel, first: Snapshot) -> Shape:
    return Shape(
        name=loaded.id,
        layers=len(first.layers),
        hidden_size=int(loaded.model.config.get_text_config(decoder=True).hidden_size),
        numbers_per_token=first.layout.numbers / first.tokens,
        parameters=float(parameters(loaded.model)),
    )


@dataclass(frozen=True)
class _Measuring:
    """The points of one model."""

    captured: Sequence[Captured]
    work: Path
    shape: Shape
    step: Step

    def points(self, plan: Plan) -> Iterator[ScalingPoint]:
        """First what learns nothing, then each training set, with small profiles before large
        ones."""
        for spec in WITHOUT_PROFILE:
            yield self._point(spec, [])
        for count in sorted(set(plan.train)):
            train = [
                one for one in self.captured if one.row.split == "train" and one.row.number < count
            ]
            paths = [one.path for one in train]
            yield self._point("channel", train, partial(Profile.fit, paths, codec="channel"))
            yield from self._predictive(plan, count, train)

    def _predictive(
        self, plan: Plan, count: int, train: Sequence[Captured]
    ) -> Iterator[ScalingPoint]:
        """One point for each size that gives other regions than the size before."""
        paths = [one.path for one in train]
        # Documents that only calibrate are not in what regions are allotted by.
        apart = documents_apart(len(paths))
        documents = Documents(hold_out(paths, apart)[0])
        vocabulary, seen = Vocabulary(documents), list[Allotment]()
        for share in sorted(set(plan.shares)):
            max_bytes = max(int(share * self.shape.matrix_bytes), least_bytes(documents))
            made_of = allot(documents, "auto", max_bytes, vocabulary)
            if made_of in seen:
                continue
            seen.append(made_of)
            regions = made_of.regions
            about = f"{count} documents of each text, regions {min(regions)} to {max(regions)}"
            told = Counts(self.step, f"{self.shape.name}, {about}")

            def fit(
                made_of: Allotment = made_of,
                max_bytes: int = max_bytes,
                told: Callable[..., None] = told,
            ) -> Profile:
                key = repr((POINT_VERSION, count, made_of)).encode()
                name = hashlib.sha256(key).hexdigest()[:12]
                return Profile.fit(
                    paths,
                    told,
                    max_bytes=max_bytes,
                    calibration=apart,
                    resume=self.work / "layers" / name,
                )

            yield self._point("predictive", train, fit, share, made_of)

    def _point(
        self,
        spec: str,
        train: Sequence[Captured],
        fit: Callable[[], Profile] | None = None,
        asked: float | None = None,
        made_of: Allotment | None = None,
    ) -> ScalingPoint:
        """One codec with what it learns of documents; taken from the working folder if it is
        there."""
        test = [one for one in self.captured if one.row.split == "test"]
        documents = [one.row.sha256 for one in (*train, *test)]
        given = repr((POINT_VERSION, self.shape, spec, len(train), made_of, documents))
        name = f"{spec}-{len(train)}-{hashlib.sha256(given.encode()).hexdigest()[:12]}"

        def compute() -> ScalingPoint:
            profile = None
            if fit is not None:
                self.step(f"{self.shape.name}: {spec} learns from {len(train)} documents")
                profile = fit()
                profile.save(self.work / "profiles" / f"{name}.kvprofile")
            codec = get_codec(spec)
            profiles = {} if profile is None else {codec.codec_id: profile}
            rows = measure({spec: codec}, test, profiles, self.step)
            learned = sum(one.row.tokens for one in train)
            return point_of(rows, len(train), learned, asked, profile)

        for folder in ("points", "profiles"):
            (self.work / folder).mkdir(exist_ok=True)
        return kept(self.work / "points" / f"{name}.json", ScalingPoint, compute)


def point_of(
    rows: Sequence[RatioRow],
    documents: int,
    tokens: int,
    asked: float | None = None,
    profile: Profile | None = None,
) -> ScalingPoint:
    """One codec's rows, of all kinds of text, as a point."""
    layers = [0] * (1 + max(part.layer for row in rows for part in row.layers))
    for row in rows:
        for part in row.layers:
            layers[part.layer] += part.encoded_bytes
    raw, encoded = sum(row.raw_bytes for row in rows), sum(row.encoded_bytes for row in rows)
    predicts = profile is not None and profile.codec == "predictive"
    return ScalingPoint(
        codec=rows[0].codec,
        train_documents=documents,
        train_tokens=tokens,
        asked=asked,
        profile_bytes=0 if profile is None else profile.nbytes,
        profile_id="" if profile is None else profile.id,
        regions=_regions(profile) if profile is not None and predicts else [],
        products=multiplications(profile) if profile is not None and predicts else [],
        kinds=[
            KindSizes(r.kind, r.documents, r.numbers, r.raw_bytes, r.encoded_bytes) for r in rows
        ],
        layer_bytes=layers,
        bits_per_value=8 * encoded / sum(row.numbers for row in rows),
        ratio=raw / encoded,
        exact=all(row.exact for row in rows),
    )


def _regions(profile: Profile) -> list[int]:
    """How many predictors each layer has."""
    layers = range(len(profile.description["layers"]))
    return [profile.tensors[f"{i}.bias"].shape[0] for i in layers]


def of_ratios(source: str, result: RatiosResult) -> ScaledModel:
    """The points of a stored result of `kvzip eval ratios`. How many regions its profile has is not
    in it."""
    learned = {profile.codec: profile for profile in result.profiles}
    points = []
    for spec in dict.fromkeys(row.codec for row in result.rows):
        rows = [row for row in result.rows if row.codec == spec]
        profile = learned.get(spec.partition(":")[0])
        documents, tokens = (profile.documents, profile.tokens) if profile else (0, 0)
        point = point_of(rows, documents, tokens)
        if profile is not None:
            point = msgspec.structs.replace(
                point, profile_bytes=profile.bytes, profile_id=profile.id
            )
        points.append(point)
    return ScaledModel(
        shape=Shape(
            name=result.model,
            layers=result.layers,
            hidden_size=result.hidden_size,
            numbers_per_token=result.numbers_per_token,
            parameters=float(result.parameters),
        ),
        revision=result.revision,
        architecture=result.architecture,
        dtype=result.dtype,
        source=source,
        document_tokens=result.document_tokens,
        texts=result.texts,
        documents=result.documents,
        points=points,
    )
