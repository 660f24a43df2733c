"""What can be set for the connector, in vLLM's ``kv_connector_extra_config``."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from kvzip.errors import KVZipError
from kvzip.profile import Profile
from kvzip.store import BLOCK_TOKENS, Store


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``kv_connector_extra_config``."""

    url: str
    """The store: a folder, ``s3://bucket/prefix``, or ``http(s)://`` to load from only."""
    codec: str | dict[str, Any] = "channel"
    profile: str | None = None
    """Path of a .kvprofile, or the SHA-256 of one that the store has: what prompts are stored with.
    To load, none need be named, and then documents of all that the store has are loaded."""
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
    """What may wait in memory to be stored, uncompressed; what comes on top is not stored."""
    threads: int = 0
    """Threads for one document; 0: all cores."""
    timeout: float = 10.0
    """Seconds after which a lookup is a miss, and a layer that has not come an error."""
    retries: int = 1
    limit_bytes: int | None = None
    block_tokens: int | None = None
    options: dict[str, Any] | None = None
    """The last three and `retries`: see `kvzip.store.Store`."""


def settings_from(extra_config: object) -> Settings:
    """The settings as vLLM was given them. Raises KVZipError, which names one that is wrong."""
    try:
        return msgspec.convert(extra_config, Settings)
    except msgspec.ValidationError as error:
        raise KVZipError(f"kv_connector_extra_config: {error}") from None


def profile_from(settings: Settings, store: Store) -> Profile | None:
    """The profile that the settings name. Raises ProfileError, and the OSError of a path."""
    named = settings.profile
    if named is None:
        return None
    if re.fullmatch("[0-9a-f]{64}", named):
        return store.get_profile(named)
    return Profile.load(named)
