"""What people write of a link, a store and a model, as figures."""

from __future__ import annotations

import re
from pathlib import Path

from kvzip.choice.cost import number
from kvzip.errors import KVZipError, UsageError, first_line
from kvzip.eval.money.prices import PriceBook, Shape

_RATES = {
    "b/s": 1.0,
    "kb/s": 1e3,
    "Mb/s": 1e6,
    "Gb/s": 1e9,
    "Tb/s": 1e12,
    "MB/s": 8e6,
    "GB/s": 8e9,
    "": 1e9,
}
_SIZES = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}


def bandwidth(text: str, book: PriceBook) -> float:
    """The bits per second that a link is written as: "10Gb/s", "400 Mb/s", "7GB/s", a bare number
    of Gb/s, or a link of the price book. Raises UsageError."""
    if text in book.link:
        return book.link[text].value * 1e9
    found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([A-Za-z/]*)\s*", text)
    try:
        if found is None or found[2] not in _RATES:
            raise ValueError
        return number("link", float(found[1]) * _RATES[found[2]], zero=False)
    except ValueError:
        raise UsageError(
            f"link {text!r}: write a number with one of {', '.join(filter(None, _RATES))} (without "
            f"one, it is of Gb/s), or one of the price book's: {', '.join(book.link)}"
        ) from None


def store_size(text: str) -> float:
    """The bytes that a store's size is written as: "400GB". Raises UsageError."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([MGTP]B)\s*", text)
    try:
        if found is None:
            raise ValueError
        return number("size", float(found[1]) * _SIZES[found[2]], zero=False)
    except ValueError:
        raise UsageError(
            f"size {text!r}: write a number above zero with one of {', '.join(_SIZES)}"
        ) from None


def shape_of(model: str, book: PriceBook) -> Shape:
    """The shape of a model of the price book, or of a hub id or folder by its config. Layers of
    sliding windows count as full ones. Raises UsageError for what is neither, and KVZipError for
    a config that cannot be read."""
    if model in book.model:
        return book.model[model]
    if "/" not in model and not Path(model).is_dir():
        raise UsageError(
            f"no model {model!r}; write a hub id, a folder, or one of: {', '.join(book.model)}"
        )
    import torch
    import transformers

    from kvzip.eval.speed import inputs

    try:
        config = transformers.AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            made = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise KVZipError(f"model {model!r}: {first_line(error)}") from None
    text = config.get_text_config(decoder=True)
    heads = int(text.num_attention_heads)
    width = inputs.width(made)
    return Shape(
        layers=int(text.num_hidden_layers),
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=width // heads,
        query_heads=heads,
        parameters=float(inputs.parameters(made)),
        date="",
        source=f"{model}, config.json",
    )
