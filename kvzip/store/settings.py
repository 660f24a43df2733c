"""``store.json``: how a store is cut. It is written with the first document, and never changed
while the store is there."""

from __future__ import annotations

import logging
from contextlib import suppress

import msgspec

from kvzip.container.sealed import is_sealed
from kvzip.errors import (
    CorruptError,
    FormatError,
    KVZipError,
    SealError,
    StoreError,
    UsageError,
)
from kvzip.parsing import from_json
from kvzip.store.bucket import Objects
from kvzip.store.keys import BLOCK_TOKENS, block_tokens_of, document_path, token_ids_of
from kvzip.store.listing import documents
from kvzip.store.marks import chain_of
from kvzip.store.sealed import SealedObjects

_log = logging.getLogger("kvzip.store")

_TRIES = 3
"""How often ``store.json`` is read until it is taken for damaged."""


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int = 1
    block_tokens: int = BLOCK_TOKENS


class SettingsFile:
    """The settings of one store, which are read once.

    `asked`: the tokens in a block that the user wants; a store of others is a UsageError.
    """

    def __init__(self, objects: Objects, asked: int | None):
        self._objects, self._asked = objects, asked
        self._known: _Settings | None = None
        self._without_sense = False
        """Whether ``store.json`` is there, as a power cut has left it, and no document is."""

    def block_tokens(self) -> int | None:
        """Tokens in a block; None for a store that has no settings yet."""
        known = self._known
        if known is None:
            known = self._known = self._read()
        return None if known is None else known.block_tokens

    def is_still(self, block_tokens: int) -> bool:
        """Whether the store is there, and of so many tokens in a block: somebody may have deleted
        all of it meanwhile, and others may have made it anew, or sealed. If not, what is asked for
        next is read anew."""
        data, still = self._objects.get("store.json"), False
        if data is not None and not is_sealed(data):
            with suppress(FormatError):  # another version's, which is told when it is read anew
                try:
                    still = from_json(data, _Settings) == _Settings(block_tokens=block_tokens)
                except CorruptError:
                    still = True  # it is there, and mended by who needs it
        if not still:
            self._known = None
        return still

    def wanted(self) -> int:
        """Tokens in a block that the store has, or will have once it is made."""
        return self.block_tokens() or self._asked or BLOCK_TOKENS

    def made(self) -> int:
        """Tokens in a block; the settings of a new store are written."""
        found = self.block_tokens()
        if found is None:
            settings = _Settings(block_tokens=self._asked or BLOCK_TOKENS)
            self._write(settings, create=not self._without_sense)
            found = self.block_tokens()
        if found is None:
            raise StoreError(f"{self._objects.url} does not keep what is written to it")
        return found

    def _read(self) -> _Settings | None:
        """The settings; None where there are none, nor any document."""
        url, self._without_sense = self._objects.url, False
        for _ in range(_TRIES):
            data = self._objects.get("store.json")
            if data is None:
                return None
            if is_sealed(data):
                raise SealError(f"{url} is a sealed store: give its key (key=, --key-file)")
            try:
                found = from_json(data, _Settings)
            except FormatError as error:
                raise FormatError(f"{url} is no store of ours: {error}") from None
            except CorruptError:  # on its way, perhaps
                continue
            return self._checked(found)
        lost = self._again()
        self._without_sense = lost is None
        return None if lost is None else self._checked(lost)

    def _checked(self, found: _Settings) -> _Settings:
        url = self._objects.url
        if found.version != 1 or found.block_tokens < 1:
            raise FormatError(f"{url} is a store of another version")
        if self._asked not in (None, found.block_tokens):
            raise UsageError(
                f"{url} is a store of blocks of {found.block_tokens} tokens, not {self._asked}: "
                "leave block_tokens out, or take another store"
            )
        return found

    def _write(self, settings: _Settings, create: bool) -> None:
        data = msgspec.json.encode(settings)
        self._objects.put("store.json", data, create=create, durable=True)

    def _again(self) -> _Settings | None:
        """The settings that a power cut has taken: those that a document's marks were made with, or
        where none can be listed, those that are asked for; None if the store has no documents."""
        if not self._objects.listable and self._asked is not None:
            return _Settings(block_tokens=self._asked)
        stored = documents(self._objects) if self._objects.listable else []
        if self._objects.listable and not stored:
            return None
        found = None
        for document in stored:
            space, name = document.key.split("/")
            path = document_path(document.key)
            with suppress(KVZipError, OSError), self._objects.open(path) as reader:
                ids, marks = token_ids_of(reader), chain_of(self._objects, space, name)
                found = block_tokens_of(ids, marks)
            if found is not None:
                break
        if found is None:
            raise FormatError(
                f"store.json in {self._objects.url} is damaged, and no document tells what it "
                'held: write {"version":1,"block_tokens":N} into it, with the N that the store was '
                f"made with ({BLOCK_TOKENS} unless another was given)"
            )
        _log.warning("store.json in %s was damaged and is written anew", self._objects.url)
        settings = _Settings(block_tokens=found)
        if self._objects.writable:
            try:
                self._write(settings, create=False)
            except StoreError as error:  # a reader may have no right to write
                _log.info("it is not written: %s", error)
        return settings


def check_key(objects: Objects) -> None:
    """Raise SealError for objects that are sealed with another key than is given, or with one where
    none is. ``store.json`` proves it, which is written here where a key is given and there is none
    yet: names of objects that are sealed with another key just look as if nothing were there.
    """
    settings = SettingsFile(objects, None)
    if isinstance(objects, SealedObjects) and objects.writable:
        settings.made()
    else:
        settings.block_tokens()
