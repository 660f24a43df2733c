"""Which weights a cache comes from: the strings by which stores and engines tell models apart.

There are two levels, and one function for each:

- :func:`kvzip.identity.checkpoint.checkpoint_fingerprint`: the weights as they lie on disk. It is
  ``sha256:...`` of all bytes of the weight files and of the configuration, so it is the same for a
  folder however its path is written, for a copy of it, and in every engine. Engines that never show
  their weights add what they were told to change (:func:`~kvzip.identity.checkpoint.changed`).
- :func:`kvzip.identity.live.live_fingerprint`: a transformers model as it lies in memory, every
  tensor of it. A model that is its checkpoint, bit for bit, has the checkpoint's fingerprint; any
  other has ``live:...``, the hash of its tensors, of its modules and of its configuration.

The hash is SHA-256: weights come from strangers, and whoever can make two models of one fingerprint
can make a store serve one model's cache to the other.
"""

from __future__ import annotations

import os
import re

__all__ = ["fingerprint", "is_fingerprint"]

_FORM = re.compile(r"(sha256|live):[0-9a-f]{64}(\+[0-9a-f]{16})*")


def fingerprint(model: object) -> str:
    """The string by which every store and adapter knows a model's weights.

    `model`: a transformers model (any torch module with a ``config``), of which every tensor in
    memory counts; or a checkpoint: a folder, a ``.gguf`` file, or a hub id that was downloaded.

    The first call reads all bytes; a later one takes milliseconds if nothing has changed. Raises
    KVZipError when there are no weights that could be read.
    """
    if isinstance(model, (str, os.PathLike)):
        from kvzip.identity.checkpoint import checkpoint_fingerprint

        return checkpoint_fingerprint(model)
    from kvzip.identity.live import live_fingerprint

    return live_fingerprint(model)


def is_fingerprint(revision: str) -> bool:
    """Whether a revision pins weights by their bytes, whatever the model is called."""
    return _FORM.fullmatch(revision) is not None
