"""What can be set for the connector and the tier, in vLLM's ``kv_connector_extra_config``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from kvzip.load.place import Place, converted
from kvzip.profile import Profile
from kvzip.store import BLOCK_TOKENS, Store


class Settings(Place, frozen=True, forbid_unknown_fields=True):
    """``kv_connector_extra_config``. The URL is a store's, and may be ``http(s)://``, to load from
    only; what does not come within the timeout is a miss, or, of a layer, an error."""

    codec: str | dict[str, Any] = "channel"
    profile: str | None = None
    """Path of a .kvprofile, or the SHA-256 of one that the store has: what prompts are stored with.
    To load, none need be named, and then documents of all that the store has are loaded. Where
    workers have parts of the model, a path's own profiles of these parts are taken, if they are
    there (``kvzip fit --split``)."""
    model: str | None = None
    """What documents call the model; default: what vLLM was given."""
    revision: str | None = None
    """What pins the weights; default: the checkpoint's fingerprint, or the hub's commit where its
    files are not on this machine."""
    min_tokens: int = BLOCK_TOKENS
    """Prompts below are not stored."""
    min_new: float = 0.25
    """A prompt is stored when the store lacks at least this share of it. At 1/4 a conversation
    that grows takes at most four times its last size."""
    pending_bytes: int = 1 << 30
    """What may wait in memory to be stored, uncompressed, in the GPU's where that encodes; what
    comes on top is not stored."""
    threads: int = 0
    """Threads for one document; 0: all cores."""
    decode_on: Literal["cpu", "gpu"] = "cpu"
    """Where documents are decoded: on the GPU that has vLLM's cache, stored bytes alone cross to it
    (docs/gpu.md). Documents that it cannot decode, the CPU decodes."""
    encode_on: Literal["cpu", "gpu"] = "cpu"
    """Where prompts are encoded: on the GPU that has vLLM's cache, they are copied within its
    memory, and stored bytes alone cross from it. What it cannot encode, the CPU encodes."""
    limit_bytes: int | None = None
    block_tokens: int | None = None
    """The last two: see `kvzip.store.Store`."""


class TierSettings(Place, frozen=True, forbid_unknown_fields=True):
    """One of ``secondary_tiers``, less what vLLM itself takes from there."""

    profile: str | None = None
    """Path of a .kvprofile of the model's cache with tables of channel, or the SHA-256 of one that
    the store at the URL has: chunks become pages, made with its tables."""
    codec: str | dict[str, Any] = "planes"
    """What chunks are stored with that do not become pages."""
    model: str | None = None
    """What chunks call the model; default: what vLLM was given."""
    revision: str | None = None
    """What pins the weights; default: the checkpoint's fingerprint."""
    limit_bytes: int | None = None
    """What all chunks under the URL may take; those used longest ago go first."""
    workers: int = 4
    """Chunks that are loaded at once, and beside them stored at once."""


def settings_from(extra_config: object) -> Settings:
    """The settings as vLLM was given them. Raises KVZipError, which names one that is wrong."""
    return converted("kv_connector_extra_config", extra_config, Settings)


def tier_settings_from(config: object) -> TierSettings:
    """The same of a tier's."""
    return converted("secondary_tiers", config, TierSettings)


def profile_from(named: str | None, store: Callable[[], Store]) -> Profile | None:
    """The profile that the settings name, by a path or by its SHA-256 in a store. Raises
    ProfileError, StoreError, and the OSError of a path."""
    if named is None:
        return None
    if re.fullmatch("[0-9a-f]{64}", named):
        return store().get_profile(named)
    return Profile.load(named)
