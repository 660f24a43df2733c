"""What works with a family's cache: a document goes from a tiny model to a file and back into it.

Each check compares with the model itself, which computes everything anew. What does not work is
said with its reason: kvzip's own error, or that transformers itself does not do it right.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import PAD, UNABLE, Family, encoder_ids, families, inputs, random_ids, tiny_model
from support import CODECS, damaged

import kvzip
from kvzip import dtypes
from kvzip.capture import prefill
from kvzip.errors import KVZipError, UnsupportedError, UsageError
from kvzip.load.config import ONE_BY_ONE, cache_argument, layer_kinds
from kvzip.load.held import ENCODER_IDS
from kvzip.load.hf import load_batch_or_prefill, load_cache, load_or_prefill
from kvzip.load.snapshots import held_by
from kvzip.load.witness import lazy_layers
from kvzip.models import LoadedModel

DOCUMENT, NEW, FEW = 40, 24, 6
"""Tokens of a document, tokens that are generated after it: more than a window holds; and so many
where what is loaded is compared once more."""


@dataclass(frozen=True)
class Row:
    """What was found of a family, as docs/models.md says it."""

    family: str
    keeps: str
    """Kinds of its layers with their parts; "" where its cache is not handled."""
    loads: str
    beginning: str
    batches: str
    note: str = ""

    def __str__(self) -> str:
        cells = (self.family, self.keeps, self.loads, self.beginning, self.batches, self.note)
        return f"| {' | '.join(cell or '-' for cell in cells)} |"


class Checks:
    """One family's model, a document, and what the model says to prompts."""

    def __init__(self, family: Family):
        self.family, self.model = family, tiny_model(family)
        self.ids = random_ids(self.model, 1, DOCUMENT)
        self.encoder = encoder_ids() if self.model.config.is_encoder_decoder else None
        text = self.model.config.get_text_config(decoder=True)
        self.slowly = {"prefill_chunk_size": 1} if text.model_type in ONE_BY_ONE else {}
        self.given = {} if self.encoder is None else {"encoder_ids": self.encoder}
        self.said: dict[bytes, torch.Tensor] = {}

    def snapshot(self, ids: torch.Tensor, full_history: bool = False) -> kvzip.Snapshot:
        """What `kvzip capture` keeps."""
        loaded = LoadedModel(self.model, None, "tiny", "")
        encoder = None if self.encoder is None else self.encoder[0].numpy()
        document = ids[0].numpy().astype(np.uint32)
        return prefill(loaded, document, full_history=full_history, encoder_ids=encoder)

    def longer(self, ids: torch.Tensor, tokens: int, seed: int = 5) -> torch.Tensor:
        """The same with more tokens behind."""
        return torch.cat([ids, random_ids(self.model, 1, tokens + 1, seed)[:, 1:]], dim=1)

    def says(self, ids: torch.Tensor, cache: Any = None, tokens: int = NEW) -> torch.Tensor:
        """Greedy new tokens, [batch, tokens], from a cache or without one, which is done once for
        each prompt."""
        if cache is not None:
            return self._says(ids, cache, tokens)
        asked = ids.numpy().tobytes()
        if asked not in self.said or self.said[asked].shape[1] < tokens:
            self.said[asked] = self._says(ids, None, tokens)
        return self.said[asked][:, :tokens]

    def agrees(self, ids: torch.Tensor, cache: Any, tokens: int = FEW) -> bool:
        """Whether the model says the same from a cache as without one."""
        return torch.equal(self.says(ids, cache, tokens), self.says(ids, tokens=tokens))

    def _says(self, ids: torch.Tensor, cache: Any, tokens: int) -> torch.Tensor:
        options: dict[str, Any] = {}
        if cache is not None:
            options = {**cache_argument(cache), **(self.slowly if lazy_layers(cache) else {})}
        if self.encoder is not None:
            options["decoder_attention_mask"] = torch.ones_like(ids)
        return self._generate(tokens, **inputs(self.model, ids), **options)

    def _generate(self, tokens: int, **given: Any) -> torch.Tensor:
        greedy = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        # No padding, which transformers would hide where it is in the next prompt.
        return self.model.generate(**given, **greedy, num_beams=1, suppress_tokens=[PAD])[
            :, -tokens:
        ]

    def logits(self, **given: Any) -> torch.Tensor:
        """Those of the first new token, [batch, vocabulary]."""
        few = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        return self.model.generate(**given, **few, do_sample=False, num_beams=1).logits[0]

    def row(self) -> Row:
        """All checks. Raises AssertionError for what works and gives other bits or tokens."""
        try:
            snapshot = self.snapshot(self.ids)
        except UnsupportedError as error:
            return Row(str(self.family), "", "no", "", "", reason(error))
        blob = self.check_codecs(snapshot)
        self.check_load(snapshot, blob)
        self.check_damage(snapshot, blob)
        self.check_continuation(blob)
        note = "one token at a time after a cache" if self.slowly else ""
        beginning = self.check_beginning(blob)
        self.check_crop(blob, beginning)
        return Row(str(self.family), kept(snapshot), "yes", beginning, self.check_batch(), note)

    def check_codecs(self, snapshot: kvzip.Snapshot) -> bytes:
        """Every codec gives the same bits back. A file of one of them."""
        for codec in CODECS:
            blob = kvzip.encode(snapshot, codec, block_tokens=8, threads=1)
            assert kvzip.decode(blob, threads=1) == snapshot, codec
        return kvzip.encode(snapshot, "channel", block_tokens=8, threads=1)

    def check_load(self, snapshot: kvzip.Snapshot, blob: bytes) -> None:
        """A loaded cache has the file's bits, and the model goes on from it as without one."""
        prompt = self.longer(self.ids, 9)
        cache = load_cache(blob, self.model.config, prompt=prompt, **self.given, **self.slowly)
        assert_bits(cache, snapshot, self.model.config)
        cache = load_cache(blob, self.model.config, prompt=prompt, **self.given, **self.slowly)
        assert self.agrees(prompt, cache, NEW)
        with warnings_told() as told:
            cache = load_or_prefill(blob, self.model, prompt, **self.given, **self.slowly)
            assert self.agrees(prompt, cache)
        assert not told, told

    def check_damage(self, snapshot: kvzip.Snapshot, blob: bytes) -> None:
        """A block that is damaged is computed, and told."""
        layer, part = next((i, name) for i, name, _ in snapshot.layout.parts())
        prompt = self.longer(self.ids, 9)
        with warnings_told() as told:
            broken = damaged(blob, layer, part)
            cache = load_or_prefill(broken, self.model, prompt, **self.given, **self.slowly)
            assert self.agrees(prompt, cache)
        assert len(told) == 1, told

    def check_continuation(self, blob: bytes) -> None:
        """A loaded cache that has grown by generation goes into a file and is gone on from."""
        prompt = self.longer(self.ids, 3)
        cache = load_cache(blob, self.model.config, prompt=prompt, **self.given, **self.slowly)
        seen = torch.cat([prompt, self.says(prompt, cache, 4)], dim=1)
        # The last token was not fed again.
        grown = kvzip.Snapshot.from_cache(cache, seen[:, :-1], self.model, **self.given)
        longer = self.longer(seen, 2, seed=6)
        file = kvzip.encode(grown, "planes", threads=1)
        cache = load_cache(file, self.model.config, prompt=longer, **self.given, **self.slowly)
        assert self.agrees(longer, cache)

    def check_beginning(self, blob: bytes) -> str:
        """A prompt that shares a beginning with the document: "yes", or why not."""
        prompt = self.longer(self.ids[:, :30], 5, seed=8)
        prompt[0, 30] = (self.ids[0, 30] - 7) % 90 + 8  # another token than the document's
        try:
            cache = load_cache(blob, self.model.config, prompt=prompt, **self.given, **self.slowly)
        except KVZipError as error:
            with warnings_told() as told:
                cache = load_or_prefill(blob, self.model, prompt, **self.given, **self.slowly)
            assert len(told) == 1
            assert self.agrees(prompt, cache)
            return "no: the window has slid on" if "slides" in str(error) else "no: a state"
        assert self.agrees(prompt, cache)
        return "yes"

    def check_crop(self, blob: bytes, beginning: str) -> None:
        """A cache is cropped, as it was loaded and after it was used, where a beginning of it can
        be loaded, and else says which layer is in the way and stays as it was."""
        prompt, other = self.longer(self.ids, 9), self.longer(self.ids, 6, seed=12)
        cache = load_cache(blob, self.model.config, prompt=prompt, **self.given, **self.slowly)
        if beginning != "yes":
            with pytest.raises(
                UnsupportedError, match="slides" if "window" in beginning else "states"
            ):
                cache.crop(-3)
            assert self.agrees(prompt, cache)
            return
        cache.crop(-3)
        assert cache.get_seq_length() == DOCUMENT - 3
        assert self.agrees(prompt, cache)
        cache.crop(DOCUMENT - cache.get_seq_length())
        assert self.agrees(other, cache)
        for wrong in (cache.get_seq_length(), -1 - cache.get_seq_length()):
            with pytest.raises(UsageError, match="minus how many"):
                cache.crop(wrong)

    def is_right_with_padding(self, prompts: list[torch.Tensor]) -> bool:
        """Whether transformers computes the first new token of a padded prompt as of it alone."""
        longest = max(prompt.shape[1] for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, -prompt.shape[1] :], mask[row, -prompt.shape[1] :] = prompt[0], 1
        alone = torch.cat([self.logits(input_ids=prompt) for prompt in prompts])
        found = self.logits(input_ids=ids, attention_mask=mask)
        return torch.allclose(found, alone, rtol=0, atol=1e-3 * float(alone.std()))

    def check_batch(self) -> str:
        """Two prompts of unequal length, each with a document: "yes", or why not."""
        if self.encoder is not None:
            return "no: an encoder"
        prompts = [
            self.longer(self.ids, 9),
            self.longer(random_ids(self.model, 1, 30, seed=3), 5, seed=4),
        ]
        rows = [prompt[0] for prompt in prompts]
        try:
            plain = load_batch_or_prefill([None, None], self.model, rows)
        except UnsupportedError as error:
            assert not self.is_right_with_padding(prompts) or "counts it" in str(error)
            same = [rows[0], rows[0].flip(0)]  # of one length
            found = self._generate(FEW, **load_batch_or_prefill([None, None], self.model, same))
            right = torch.cat([self.says(each[None], tokens=FEW) for each in same])
            assert torch.equal(found, right)
            what = "counts as positions" if "counts it" in str(error) else "changes numbers"
            return f"no: padding {what} in transformers itself"
        assert self.is_right_with_padding(prompts)
        alone = torch.cat([self.says(prompt) for prompt in prompts])
        assert torch.equal(self._generate(FEW, **plain), alone[:, :FEW])
        documents = [
            self.snapshot(prompts[0][:, :DOCUMENT], True),
            self.snapshot(prompts[1][:, :30], True),
        ]
        with warnings_told() as told:
            found = self._generate(NEW, **load_batch_or_prefill(documents, self.model, rows))
        assert torch.equal(found, alone)
        if told and self.slowly:
            return "computed: one token at a time"
        assert not told, told
        return "yes"


def assert_bits(cache: Any, snapshot: kvzip.Snapshot, config: Any) -> None:
    """Raise AssertionError unless a cache that was just loaded holds a snapshot's own bits."""
    for i, (one, stored) in enumerate(
        zip(held_by(cache, layer_kinds(config)), snapshot.layers, strict=True)
    ):
        assert one.pieces.keys() == stored.parts.keys() - {ENCODER_IDS}
        for name, (tensor, _) in one.pieces.items():
            part, wanted = stored.layout.parts[name], stored.parts[name]
            if part.tokens is not None and stored.layout.counts_tokens:
                assert one.length is not None
                last = one.length - stored.layout.first
                tokens = slice(last - tensor.shape[-2], last)
                wanted = wanted[(slice(None),) * part.axes.index("t") + (tokens,)]
            found, _ = dtypes.as_bits(tensor, part.dtype)
            assert np.array_equal(found.reshape(wanted.shape), wanted), (i, name)


def kept(snapshot: kvzip.Snapshot) -> str:
    """The kinds of a snapshot's layers with their parts, each once."""
    found = dict.fromkeys(
        f"{layer.kind} ({', '.join(layer.layout.parts)})" if layer.layout.parts else "none"
        for layer in snapshot.layers
    )
    return "; ".join(found)


def reason(error: Exception) -> str:
    """Why a family's cache is refused, without the names of its classes."""
    words = str(error).split(": ")
    return words[-1] if len(words) > 1 else words[0]


@contextmanager
def warnings_told() -> Iterator[list[str]]:
    """What kvzip warns of meanwhile."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("kvzip.load")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


def row(family: Family) -> Row:
    """What works with a family."""
    if (why := UNABLE.get(family.name)) is not None:
        return Row(str(family), "", "not run", "", "", why)
    return Checks(family).row()


# --- the table --------------------------------------------------------------------------------

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
VERSION = f"transformers {transformers.__version__}"
"""What the table must be said to be of."""


def stored_rows() -> dict[str, str]:
    """The lines of the table, by family."""
    _, _, table = TABLE.read_text(encoding="utf-8").partition("| family |")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows}


def main() -> None:
    """Write the table anew, below the words that are there."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found = []
    for family in families():
        found.append(str(row(family)))
        print(found[-1], flush=True)
    head, rule, _ = TABLE.read_text(encoding="utf-8").partition("|---|---|---|---|---|---|\n")
    TABLE.write_text(head + rule + "\n".join(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
