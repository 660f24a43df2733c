"""What transformers says of a model: its layers' kinds, their RoPE, how it is handed a cache."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from kvzip.errors import KVZipError, UnsupportedError, UsageError
from kvzip.layout import Kind
from kvzip.load.held import has_nothing, has_states, kind_of
from kvzip.load.own import class_for, layers_for

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache

_RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_CACHE = "cache" if _RELEASE >= (5, 24) else "past_key_values"


def cache_argument(cache: Cache) -> dict[str, Cache]:
    """What hands a model a cache, in any transformers: ``generate(ids, **cache_argument(cache))``.

    The argument of `forward` and `generate` is ``cache`` from transformers 5.24 on, and was
    ``past_key_values``, of which 5.24 warns.
    """
    return {_CACHE: cache}


def fed(
    model: PreTrainedModel, cache: Cache, ids: torch.Tensor, first: int
) -> dict[str, torch.Tensor | Cache]:
    """What a model is given to compute `ids`, [batch, n], the first of them at position `first`, as
    `generate` gives it: some models count positions in another way if they are not told."""
    takes = inspect.signature(model.forward).parameters
    decoder = "decoder_" if model.config.is_encoder_decoder else ""
    given: dict[str, Any] = {f"{decoder}input_ids": ids, **cache_argument(cache)}
    if (name := f"{decoder}position_ids") in takes:
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        given[name] = positions.expand(ids.shape)
    if not decoder:  # an encoder may be told, too, and refuse
        given["use_cache"] = True
    return given


class LayerKind(NamedTuple):
    """Kind of one layer's cache, its window, and its index into :func:`rope_parameters`."""

    kind: Kind
    window: int | None
    rope: int | None
    """None: keys of this layer are not rotated."""
    states: bool = False
    """Whether it keeps what is good at one length only, beside its tokens or in their place."""
    empty: bool = False
    """Whether it never holds anything: it shares another layer's cache, or has no attention."""

    @property
    def counts(self) -> bool:
        """Whether it holds the sequence's tokens."""
        return not self.empty and self.kind not in ("state", "cross")


def check_is_config(config: object) -> None:
    """Raise UsageError for what is no config of a model of transformers."""
    if not hasattr(config, "get_text_config"):
        raise UsageError(f"a {type(config).__name__} is no config of a model: give model.config")


def layer_kinds(config: PretrainedConfig) -> list[LayerKind]:
    """Kind, window and RoPE index of every layer, as transformers itself makes its cache.

    Raises UnsupportedError, which names the layer, for any other than full or sliding attention.
    """
    return layers_of(config)[0]


def rope_parameters(config: PretrainedConfig) -> tuple[dict[str, Any], ...]:
    """The distinct RoPE parameters (theta, kind, scaling) of a config's layers."""
    return layers_of(config)[1]


def rope_of_model(model: PreTrainedModel) -> tuple[dict[str, Any], ...]:
    """What :func:`rope_parameters` gives, with "inv_freq", the radians a position that the model
    really turns each pair by, whatever the kind of RoPE makes of the parameters; and, where it is
    not 1, with "attention_scaling", by which cosines and sines are multiplied."""
    return _noted(model.config, [*model.modules()])


def rope_of_config(config: PretrainedConfig) -> tuple[dict[str, Any], ...]:
    """The same of a model that another engine computes, of which there is the config alone: what
    transformers' own module for RoPE makes of it. Without one, :func:`rope_parameters`."""
    return _noted(config, _rotary_modules(config.get_text_config(decoder=True)))


# What a family's module for RoPE, or the lack of one, answers a config with that it cannot take.
_UNKNOWN = (ImportError, AttributeError, KeyError, TypeError, ValueError)


def _rotary_modules(text: PretrainedConfig) -> list[torch.nn.Module]:
    """A family's own modules for RoPE: its classes of that name that are made of such a config."""
    made = list[torch.nn.Module]()
    names = {cls.__name__ for cls in type(text).__mro__}
    with suppress(*_UNKNOWN):
        family = importlib.import_module(_modeling(text))
        for name, cls in vars(family).items():
            if name.endswith("RotaryEmbedding") and cls.__module__ == family.__name__:
                told = getattr(inspect.signature(cls).parameters.get("config"), "annotation", None)
                if getattr(told, "__name__", told) in names:
                    made.append(cls(config=text))
    return made


def _modeling(text: PretrainedConfig) -> str:
    """The name of the Python module that has a family's models."""
    return type(text).__module__.replace("configuration_", "modeling_")


def _noted(
    config: PretrainedConfig, modules: Sequence[torch.nn.Module]
) -> tuple[dict[str, Any], ...]:
    """The RoPE parameters of a config's layers, with what a model's modules turn by."""
    kinds, parameters = layers_of(config)
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None)
    # An encoder of sound or pictures may have its own.
    modules = [module for module in modules if getattr(module, "config", text) is text]
    noted = [dict(found) for found in parameters]
    for i, kind in enumerate(kinds):
        if kind.rope is None or "inv_freq" in noted[kind.rope]:
            continue
        found = _rotary(modules, f"{types[i]}_") if types else None
        if found is None:
            found = _rotary(modules, "")
        noted[kind.rope] |= found or {}
    return tuple(noted)


def _rotary(modules: Sequence[torch.nn.Module], prefix: str) -> dict[str, Any] | None:
    """What a model's own module for RoPE turns by, where its names have this prefix."""
    for module in reversed(modules):
        used = getattr(module, f"{prefix}inv_freq", None)
        if not isinstance(used, torch.Tensor) or used.is_meta:
            continue
        scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
        scaled = {} if scaling == 1.0 else {"attention_scaling": scaling}
        return {"inv_freq": [float(f) for f in used.float().cpu()]} | scaled
    return None


_NO_CACHE = "it has no cache, in transformers"
UNHANDLED = {
    "cpmant": "its cache holds tokens that are none of the prompt's",
    "dory": "its loops keep more layers than its config tells",
    "openai-gpt": _NO_CACHE,
    "recurrent_gemma": "it keeps its states in the model itself, and not in a cache",
    "reformer": "it keeps hidden states and their buckets, and no keys and values",
    "rwkv": "its states are a list that it takes as `state=`, and no cache",
    "xlm": _NO_CACHE,
    "xlnet": "it keeps hidden states, and no keys and values",
}
"""Families whose caches are not handled, by the model type of their config, and why."""
ONE_BY_ONE = ("falcon_mamba", "jamba", "mamba", "prophetnet", "zamba")
"""Families that go on from a cache only one token at a time, in transformers itself: fed more at
once, Mamba's forget their state, since their scan begins anew, and ProphetNet fails."""


def check_fed_one_by_one(config: PretrainedConfig, left: int, chunk: int | None) -> None:
    """Raise KVZipError where `left` tokens after a cache would be fed in chunks that the model
    cannot go on with."""
    kind = config.get_text_config(decoder=True).model_type
    if kind in ONE_BY_ONE and left > 1 and chunk != 1:
        raise KVZipError(
            f"a {kind} model of transformers goes on from a cache one token at a time only, and "
            f"{left} are left of the prompt: give prefill_chunk_size=1, to `generate`, too"
        )


_NUMBERS, _POSITIONS = "computes other numbers", "counts it as positions where nothing is cached"
WRONG_WITH_PADDING = {
    **dict.fromkeys(
        (
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "deepseek_v4", "doge"),
            *("marian", "mbart", "minimax_m3_vl_text", "mvp", "pegasus", "plbart", "prophetnet"),
            *("trocr", "whisper", "xlstm"),
        ),
        _NUMBERS,
    ),
    **dict.fromkeys(("moss_transcribe_diarize", "roformer", "vibevoice_asr"), _POSITIONS),
}
"""Families for which transformers itself does not do right by padding at the left: what it does."""


def check_padding(config: PretrainedConfig, lengths: Collection[int]) -> None:
    """Raise UnsupportedError where prompts of these lengths would be padded, and the model is one
    that transformers itself does not compute so."""
    names = (config.model_type, config.get_text_config(decoder=True).model_type)
    name = next((each for each in names if each in WRONG_WITH_PADDING), None)
    if name is not None and len({*lengths}) > 1:
        raise UnsupportedError(
            f"prompts of unequal length, {sorted(lengths)}, cannot be a batch of a {name} model: "
            f"with padding at the left transformers itself {WRONG_WITH_PADDING[name]}, and other "
            "tokens come out than of each alone; batch prompts of one length, or load each alone"
        )


# In these families only the sliding layers rotate their keys, though the config does not say so.
_FULL_LAYERS_UNROTATED = (
    *("afmoe", "cohere2", "exaone4", "exaone_moe", "flint", "kolibri1", "lara_mini"),
)


def layers_of(config: PretrainedConfig) -> tuple[list[LayerKind], tuple[dict[str, Any], ...]]:
    """What :func:`layer_kinds` and :func:`rope_parameters` give."""
    check_is_config(config)
    text = config.get_text_config(decoder=True)
    if (why := UNHANDLED.get(text.model_type)) is not None:
        raise UnsupportedError(f"a {text.model_type} model's cache cannot be kept: {why}")
    both_ways = getattr(text, "use_bidirectional_attention", None) in (True, "all")
    if both_ways or getattr(text, "is_causal", True) is False:
        raise UnsupportedError(
            f"this {text.model_type} model's cache cannot be kept: its tokens see those after them,"
            " so that keys and values depend on how a text goes on"
        )
    layers = decoder_cache(config).layers
    made = [kind_of(layer, i) for i, layer in enumerate(layers)]
    mixed = any(kind == "sliding" for kind, _ in made)
    types = getattr(text, "layer_types", None)
    kinds, distinct = [], list[dict[str, Any]]()
    owns = configs_of_layers(text, len(made))
    for i, ((kind, window), own) in enumerate(zip(made, owns, strict=True)):
        layer = layers[i]
        latent = getattr(own, "kv_lora_rank", None) is not None and kind != "state"
        found = getattr(own, "rope_parameters", None) or None
        if found and any(isinstance(value, dict) for value in found.values()):
            found = found.get(types[i] if types else f"{kind}_attention")
        if latent or kind == "state" or _unrotated(text, i, kind == "full" and mixed):
            found = None
        rope = None
        if found:
            if found not in distinct:
                distinct.append(dict(found))
            rope = distinct.index(found)
        empty = has_nothing(layer)
        kind = "latent" if latent and not empty else kind
        kinds.append(LayerKind(kind, window, rope, has_states(layer), empty))
    if config.is_encoder_decoder:
        kinds += [LayerKind("cross", None, None) for _ in made]
    return kinds, tuple(distinct)


def decoder_cache(config: PretrainedConfig) -> Cache:
    """A cache of a decoder's own layers that a model of this config fills itself.

    Raises UnsupportedError for layers of a kind that transformers knows no cache for.
    """
    text = config.get_text_config(decoder=True)
    if (layers := layers_for(text)) is not None:
        made = DynamicCache()
        made.layers = layers
        return made
    try:
        return DynamicCache(config=text)
    except KeyError:
        # Some kinds of layers are known only once their model's module has been imported.
        with suppress(ImportError):
            importlib.import_module(_modeling(text))
    try:
        return DynamicCache(config=text)
    except KeyError as error:
        raise UnsupportedError(f"transformers knows no cache layer of kind {error}") from None


def plain_cache(config: PretrainedConfig) -> Cache:
    """A cache that a model of this config fills itself, an encoder's tokens included."""
    own = decoder_cache(config)
    if (cls := class_for(config, DynamicCache)) is not DynamicCache:
        layers, own = own.layers, cls()
        own.layers = layers
    # Without a config all its layers are full ones: what a decoder's slide over is not the encoder.
    return EncoderDecoderCache(own, DynamicCache()) if config.is_encoder_decoder else own


def configs_of_layers(text: PretrainedConfig, count: int) -> list[Any]:
    """What each layer's config is, where layers may differ: of as many first layers as have a place
    in the cache, which before transformers 5.24 those at the end that share others' do not."""
    found = list(text.per_layer_config)[:count]
    return found + [text] * (count - len(found))


def rope_length(text: PretrainedConfig) -> int | None:
    """How many tokens a sequence must stay below for RoPE's frequencies not to depend on how many
    they are; None where they never do. `text`: a decoder's config, or an encoder's.

    transformers rotates by other frequencies in longer calls ("dynamic", and, with others for all
    that is longer, "longrope"), and at just this length by those of the call before.
    """
    if not hasattr(text, "num_hidden_layers"):  # it has others in it alone, as T5Gemma's
        parts = (getattr(text, name, None) for name in text.sub_configs)
        told = (rope_length(part) for part in parts if part is not None)
        return min((length for length in told if length is not None), default=None)
    lengths = []
    for own in (text, *text.per_layer_config):
        found = getattr(own, "rope_parameters", None) or {}
        for each in (found, *found.values()):  # some have their own for each kind of layer
            kind = str(each.get("rope_type", "")) if isinstance(each, dict) else ""
            if "dynamic" in kind:
                lengths.append(own.max_position_embeddings)
            elif kind == "longrope":
                default = own.max_position_embeddings
                lengths.append(each.get("original_max_position_embeddings", default))
    return min(lengths, default=None)


def check_rope_length(text: PretrainedConfig, tokens: int, what: str) -> None:
    """Raise UnsupportedError if RoPE's frequencies may depend on the length of a sequence of so
    many `tokens`, which is called `what`: a cache of a shorter one has other keys."""
    length = rope_length(text)
    if length is not None and tokens >= length:
        raise UnsupportedError(
            f"{what} has {tokens} tokens, and from {length} on this model rotates the keys of all "
            "tokens by frequencies that depend on how many there are (its RoPE is dynamic or "
            f"longrope): caches are loaded only where document and prompt have fewer than {length}"
        )


def check_rope_state(model: PreTrainedModel) -> None:
    """Raise UnsupportedError while a model rotates keys by frequencies of a long sequence, which it
    has seen last: what it computed and was then cut short may be stored under its name."""
    if rope_length(model.config.get_text_config(decoder=True)) is None:
        return
    for module in model.modules():
        for name, now in module.named_buffers(recurse=False):
            first = getattr(module, name.replace("inv_freq", "original_inv_freq"), now)
            if name.endswith("inv_freq") and not torch.equal(now, first.to(now.device)):
                raise UnsupportedError(
                    "the model's RoPE is as a long sequence has left it, which its next call may "
                    "change: caches are loaded again after a call with a short one"
                )


def _unrotated(text: PretrainedConfig, i: int, full_among_sliding: bool) -> bool:
    """Whether the keys of layer i are not rotated, though the config has parameters for that."""
    rotated = getattr(text, "no_rope_layers", None)  # despite its name, 1 where there is RoPE
    # Cohere 2's dense layers come first, and its mixtures of experts after them.
    forced = getattr(text, "prefix_dense_sliding_window_pattern", None) == 1
    forced = forced and text.mlp_layer_types[i] == "dense"
    return (
        getattr(text, "alibi", False)
        or getattr(text, "position_embedding_type", "rope") not in ("rope", "rotary")
        or not getattr(text, "use_mem_rope", True)
        or bool(rotated and not rotated[i])
        or (
            full_among_sliding and text.model_type.startswith(_FULL_LAYERS_UNROTATED) and not forced
        )
    )
