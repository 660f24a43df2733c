"""Tiny random models of every family that transformers' causal and encoder-decoder classes bring.

A family is a model type in the mappings of `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`. The
config that its class makes by default is shrunk: sizes by their names (`SIZES`), lists that have an
entry a layer to one layer of each kind. Where that is not enough there are `CHANGES`. `UNABLE` says
why some families cannot be built or run here at all.

``python tests/families.py [NAME...]`` prints what each family keeps in its cache.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

VOCABULARY, HIDDEN, HEADS, WINDOW = 128, 32, 4, 12
PAD = 0
LAYERS = 4
"""Layers at most: one of each kind, and two at least."""

_SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size unpadded_vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size "
    "vocab_size_per_layer_input",
    HIDDEN: "hidden_size d_model n_embd embedding_dim embedding_size emb_dim word_embed_proj_dim "
    "encoder_hidden_size audio_hidden_size input_embedding_size output_embedding_size lru_width "
    "attention_hidden_size backbone_hidden_size projector_hidden_size cross_hidden_size "
    "hidden_size_global adapter_in_dim adapter_out_dim adapter_input_size",
    48: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff d_inner dff dim_ff n_inner "
    "ffn_hidden_size feed_forward_size mlp_dim intermediate_size_mlp dense_intermediate_size "
    "shared_intermediate_size hidden_dim",
    HEADS: "num_attention_heads num_heads n_head n_heads encoder_attention_heads attention_heads "
    "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "encoder_num_attention_heads decoder_num_attention_heads swa_num_attention_heads "
    "cross_num_attention_heads conf_num_attention_heads linear_num_value_heads linear_num_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts time_step_rank mamba_dt_rank "
    "d_rel num_filters",
    2: "num_key_value_heads num_kv_heads kv_n_heads encoder_num_key_value_heads "
    "decoder_num_key_value_heads swa_num_key_value_heads cross_num_key_value_heads o_groups "
    "num_query_groups num_global_key_value_heads linear_num_key_heads index_n_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k zero_expert_num "
    "type_vocab_size",
    8: "head_dim d_kv kv_channels attention_head_dim attention_head_size d_head dim_head "
    "swa_head_dim cross_head_dim qk_nope_head_dim v_head_dim qk_rope_head_dim index_head_dim "
    "rotary_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head "
    "mamba_head_dim mamba_headdim global_head_dim mamba_d_state state_size ssm_state_size "
    "mamba_n_heads mamba_num_heads index_block_size hidden_size_per_layer_input "
    "laurel_rank",
    16: "qk_head_dim kv_lora_rank o_lora_rank moe_intermediate_size chunk_size mamba_chunk_size "
    "block_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts mamba_n_groups "
    "moe_num_shared_experts n_groups mamba_ngroups first_k_dense_replace num_dense_layers",
    0: "num_nextn_predict_layers",
    24: "q_lora_rank",
    64: "mamba_d_ssm rel_extent index_topk",  # all tokens: which of them would hang on rounding
    WINDOW: "sliding_window sliding_window_size attention_chunk_size attention_window_size "
    "local_attention window_size attention_window keep_window_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length "
    "max_source_positions max_target_positions max_encoder_position_embeddings "
    "max_decoder_position_embeddings",
}
SIZES: dict[str, float] = {
    **{name: size for size, names in _SIZES.items() for name in names.split()},
    # Large enough that other numbers in the cache make other tokens.
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
}
_DEPTHS = {
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "depth"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
    *("encoder_num_hidden_layers", "decoder_num_hidden_layers"),
}
_PARTS = {"encoder", "decoder", "text_encoder", "audio_encoder"}
"""Configs of parts whose names don't end with "config"."""
_MEDIA = ("vision", "image", "audio", "speech", "video", "tokenizer", "vq")
_TOKENS = ("pad", "bos", "eos", "decoder_start", "sep", "cls", "unk", "mask")
_DROPPED = {
    *("model_type", "transformers_version", "architectures", "_name_or_path", "dtype"),
    *("id2label", "label2id", "task_specific_params", "begin_suppress_tokens", "suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id"),
}

_SLIDE, _FULL = "sliding_attention", "full_attention"
_LINEAR, _HYBRID = "linear_attention", "hybrid"
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN4 = {
    "ple_layer_ids": [1],
    "number_of_conv_states": 3,
    "eos_token_id": 2,
    "ple_embed_dim": 32,
    "ngram_vocab_size_base": 50,
    "heads_per_ngram": 2,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 8,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_ZAMBA = {
    "layers_block_type": [_LINEAR, _HYBRID, _LINEAR, _HYBRID],
    "num_hidden_layers": 4,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
_SHARING = {"num_hidden_layers": 4, "layer_types": [_SLIDE, _FULL] * 2, "num_kv_shared_layers": 2}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": [_SLIDE, _FULL],
        "num_hidden_layers": 2,
        "rope_parameters": {_SLIDE: _ROPE, _FULL: _ROPE},
    },
    "dbrx": {
        "num_key_value_heads": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "num_hidden_layers": 4,
        "layer_types": [_SLIDE, _SLIDE, _FULL, _SLIDE],
    },
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
    },
    "dots3_note_text": {"head_dim": 16},
    "dots3_note": {"text_config": {"head_dim": 16}},
    "gemma3n_text": {
        **_SHARING,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": 48,
    },
    "gemma4_text": _SHARING,
    "granitemoehybrid": {"layer_types": [_LINEAR, _FULL]},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", _FULL], "num_hidden_layers": 2, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", _FULL], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": [_FULL, "minimax_m3_sparse"], "num_hidden_layers": 2},
    "nemo_speechlm": {"text_config": {"layers_block_type": [_LINEAR, "moe", _FULL]}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 64,
        "shape_vocab_size": 64,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # heads are rounded up to this
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "hybrid_layer_ids": [1, 3]},
}

UNABLE = {
    "blt": "transformers itself cannot make its cache: its config has no num_hidden_layers",
    "gemma3n": "its part for images needs timm and pillow (gemma3n_text is its text model)",
    "gemma4_assistant": "it drafts for another model, whose keys and values it attends to",
    "gemma4_unified_assistant": "it drafts for another model, whose keys and values it attends to",
    "musicgen": "its tokens are of several audio codebooks a step, not text",
    "musicgen_melody": "its tokens are of several audio codebooks a step, not text",
    "voxtral_realtime": "it takes no prompt without sound",
}


@dataclass(frozen=True)
class Family:
    """A model type, as one of the two auto classes makes it."""

    name: str
    seq2seq: bool = False

    def __str__(self) -> str:
        return f"{self.name} (seq2seq)" if self.seq2seq else self.name

    def config(self) -> Any:
        """Its config, tiny."""
        made = CONFIG_MAPPING[self.name]
        described = shrunk(made().to_dict())
        if self.seq2seq:
            described.pop("is_decoder", None)
        return made(**merged(described, CHANGES.get(self.name, {})))

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """A random model, always the same, that ends no text by itself."""
        torch.manual_seed(0)
        auto = (
            transformers.AutoModelForSeq2SeqLM
            if self.seq2seq
            else transformers.AutoModelForCausalLM
        )
        model = auto.from_config(self.config()).to(dtype).eval()
        for parameter in model.parameters():
            if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
                with torch.no_grad():  # zeros and ones at first, with which layers do nothing
                    parameter += 0.1 * torch.randn_like(parameter)
        model.generation_config.eos_token_id = None
        model.generation_config.forced_eos_token_id = None
        model.generation_config.pad_token_id = PAD
        model.generation_config.decoder_start_token_id = 3
        return model


@cache
def tiny_model(family: Family, dtype: torch.dtype = torch.float32) -> Any:
    """`family.model(dtype)`, made once."""
    return family.model(dtype)


def families() -> list[Family]:
    """All, those of `UNABLE` too, in the order of their names."""
    return [
        *map(Family, sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)),
        *(Family(name, True) for name in sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)),
    ]


def random_ids(model: Any, batch: int = 1, tokens: int = 40, seed: int = 1) -> torch.Tensor:
    """Token ids that stand for nothing but text; a decoder's begin with the one it starts with."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, 100, (batch, tokens), generator=generator)
    if model.config.is_encoder_decoder:
        ids[:, 0] = model.generation_config.decoder_start_token_id
    return ids


def inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `generate` and `forward` take: an encoder gets 20 tokens, the same ones always."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    return {"input_ids": encoder_ids(ids.shape[0]), "decoder_input_ids": ids}


def encoder_ids(batch: int = 1) -> torch.Tensor:
    """What the encoder is given, 20 tokens."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(8, 100, (batch, 20), generator=generator)


def generate(model: Any, ids: torch.Tensor, tokens: int = 24, **options: Any) -> torch.Tensor:
    """Greedy new tokens, [batch, tokens]."""
    greedy = {"do_sample": False, "num_beams": 1, "min_new_tokens": tokens}
    fed = inputs(model, ids)
    out = model.generate(**fed, max_new_tokens=tokens, **greedy, **options)
    return out[:, -tokens:]


# --- shrinking a config --------------------------------------------------------------------------


def shrunk(described: Mapping[str, Any], media: bool = False) -> dict[str, Any]:
    """A config's arguments with small sizes; a part for images or sound has one layer."""
    depth = next((size for name, size in described.items() if name in _DEPTHS and size), None)
    chosen = _layers(described, depth)[: 1 if media else LAYERS]
    made: dict[str, Any] = {}
    for name, value in described.items():
        if name in _DROPPED:
            continue
        if name == "per_layer_config" and value:
            made[name] = {
                new: {key: SIZES.get(key, size) for key, size in _own(value, old).items()}
                for new, old in enumerate(chosen)
                if _own(value, old)
            }
        elif isinstance(value, Mapping) and (name in _PARTS or name.endswith("_config")):
            made[name] = shrunk(value, media or any(word in name for word in _MEDIA))
            if "model_type" in value:
                made[name]["model_type"] = value["model_type"]
        elif name in _DEPTHS and isinstance(value, int):
            made[name] = len(chosen) if value == depth else min(value, 2)
        elif isinstance(value, (list, tuple)) and depth and len(value) == depth:
            made[name] = [value[i] for i in chosen]
        else:
            made[name] = _small(name, value)
    if made.get("kv_lora_rank"):  # each head has its own keys, made from the latent
        for each in (made, *(made.get("per_layer_config") or {}).values()):
            if "num_key_value_heads" in each:
                each["num_key_value_heads"] = HEADS
    return made


def _small(name: str, value: Any) -> Any:
    """One argument that is no list of layers and no config."""
    token = name.removesuffix("_token_id")
    if token in _TOKENS and isinstance(value, (int, list)):
        return _TOKENS.index(token)
    if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
        return min(value, VOCABULARY - 1 - sum(map(ord, name)) % 20)
    if name in ("is_decoder", "use_cache"):
        return True
    if name == "depths":
        return [1] * len(value)
    if name == "head_dim" and value is None:
        return SIZES[name]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return min(value, SIZES[name]) if number and name in SIZES else value


def _layers(described: Mapping[str, Any], depth: int | None) -> list[int]:
    """The layers that are kept: the first of each kind, as all lists of layers tell them apart."""
    if not depth:
        return []
    lists = [v for v in described.values() if isinstance(v, (list, tuple)) and len(v) == depth]
    own = described.get("per_layer_config") or {}
    first: dict[str, int] = {}
    for i in range(depth):
        first.setdefault(repr([[each[i] for each in lists], _own(own, i)]), i)
    found = sorted(first.values())[:LAYERS]
    rest = (i for i in range(depth) if i not in found)
    return found if len(found) > 1 or depth == 1 else sorted([*found, next(rest)])


def _own(per_layer: Mapping[Any, Any], i: int) -> dict[str, Any]:
    """What layer i has of its own."""
    return dict(next((per_layer[k] for k in (i, str(i), f"{i:02d}") if k in per_layer), {}))


def merged(into: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with changes, which may be to those of a part."""
    for name, value in changes.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            merged(into[name], value)
        else:
            into[name] = value
    return into


# --- what is in a cache --------------------------------------------------------------------------


def tensors(found: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a cache or a layer with their names, as deep as they lie."""
    if isinstance(found, torch.Tensor):
        if found.ndim:  # others only count
            yield name, found
        return
    if isinstance(found, Mapping):
        items = found.items()
    elif isinstance(found, (list, tuple)):
        items = enumerate(found)
    elif type(found).__module__.startswith("transformers") and not hasattr(found, "model_type"):
        items = vars(found).items()
    else:
        return
    for key, value in items:
        yield from tensors(value, f"{name}.{key}" if name else str(key))


def described(cache: Any) -> str:
    """A cache's class, its kinds of layers, and what each holds."""
    if hasattr(cache, "self_attention_cache"):
        own, cross = map(described, (cache.self_attention_cache, cache.cross_attention_cache))
        return f"{own}, cross: {cross}"
    kinds = dict.fromkeys(map(_layer, getattr(cache, "layers", None) or [cache]))
    beside = [name for name in vars(cache) if "linear_cache" in name] if kinds else []
    return " | ".join([type(cache).__name__, *kinds, *beside])


def _layer(layer: Any) -> str:
    held = (
        f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in tensors(layer)
    )
    return f"{type(layer).__name__}({', '.join(held)})"


def survey(family: Family) -> str:
    """What a family keeps of 40 tokens, and whether it goes on from there as without a cache."""
    if family.name in UNABLE:
        return UNABLE[family.name]
    started = time.perf_counter()
    model = family.model()
    ids = random_ids(model)
    with torch.no_grad():
        out = model(**inputs(model, ids))
        kept = next((out[name] for name in ("cache", "state", "mems") if name in out), None)
        cached = generate(model, ids)
        steady = torch.equal(cached, generate(model, ids, use_cache=False))
    seconds = time.perf_counter() - started
    words = described(kept) if hasattr(kept, "__dict__") else f"{type(kept).__name__}"
    return (
        f"{'as' if steady else 'NOT as'} without a cache, {len(cached.unique())} different tokens, "
        f"{seconds:.2f} s: {words}"
    )


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for family in families():
        if not names or family.name in names:
            try:
                print(f"{family}: {survey(family)}", flush=True)
            except Exception as error:
                print(f"{family}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
