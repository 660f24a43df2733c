"""Whatever is changed of a model in memory shows in its fingerprint; what changes nothing does not.

And `load_or_prefill` gives a changed model's own tokens, whatever a store has.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from support import examples  # noqa: E402

import kvzip  # noqa: E402
from kvzip.errors import KVZipError  # noqa: E402
from kvzip.identity.live import live_fingerprint, tensors_of  # noqa: E402
from kvzip.load.hf import cache_argument, load_or_prefill  # noqa: E402
from kvzip.store import Store  # noqa: E402

KINDS = ["Llama", "Qwen3", "Mistral", "Gemma3Text"]
IDS = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(1))


# --- what changes nothing --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.drawn(2)
def test_an_unchanged_model_is_its_checkpoint(
    kind: str, stored: str, saved: Any, load: Any
) -> None:
    folder = saved(kind, stored, max_shard_size="20KB")
    wanted = kvzip.fingerprint(folder)
    for dtype, kernel in (("bfloat16", "eager"), ("float16", "sdpa"), ("float32", "sdpa")):
        model = load(folder, dtype, attn_implementation=kernel)
        assert kvzip.fingerprint(model) == wanted
        model(IDS)
        model.train()
        assert kvzip.fingerprint(copy.deepcopy(model)) == wanted


def test_it_does_not_depend_on_paths(
    saved: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved()
    monkeypatch.chdir(tmp_path)
    names = {kvzip.fingerprint(load(path)) for path in (folder.name, f"./{folder.name}", folder)}
    assert names == {kvzip.fingerprint(folder)}


def test_a_model_of_no_checkpoint_has_one_of_its_own(saved: Any, load: Any) -> None:
    model = load(saved())
    model.to(torch.float32).to(torch.bfloat16)  # what RoPE turns by was rounded on the way
    first = kvzip.fingerprint(model)
    assert first.startswith("live:")
    assert kvzip.fingerprint(pickle.loads(pickle.dumps(model))) == first
    model.name_or_path = model.config._name_or_path = "elsewhere"
    assert kvzip.fingerprint(model) == first


# --- what changes something ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.drawn(2)
def test_a_bit_of_any_tensor_counts(kind: str, saved: Any, load: Any) -> None:
    model = load(saved(kind))
    first = kvzip.fingerprint(model)
    tensors = {held.name: held.tensor for held in tensors_of(model)}
    assert set(tensors) >= {*dict(model.named_parameters()), *dict(model.named_buffers())}

    @examples(25)
    @given(name=st.sampled_from(sorted(tensors)), data=st.data())
    def change(name: str, data: Any) -> None:
        bits = tensors[name].detach().reshape(-1).view(torch.uint8)
        at = data.draw(st.integers(0, bits.numel() - 1))
        bits[at] ^= 1
        assert kvzip.fingerprint(model) not in (first, "")
        bits[at] ^= 1
        assert kvzip.fingerprint(model) == first

    change()


def test_what_is_written_past_the_version_counter(saved: Any, load: Any) -> None:
    """As adapters are merged, whose library writes to `.data`."""
    model = load(saved())
    first = kvzip.fingerprint(model)
    weight = model.model.layers[1].self_attn.q_proj.weight
    before, version = weight.detach().clone(), weight._version
    weight.data += 0.01 * torch.randn_like(weight)
    assert weight._version == version
    assert kvzip.fingerprint(model) != first
    weight.data.copy_(before)
    assert kvzip.fingerprint(model) == first
    weight.data[3, 5] += 1  # not one of the numbers that are looked at: so read all
    assert live_fingerprint(model, anew=True) != first


def test_new_memory_at_an_old_place(saved: Any, load: Any) -> None:
    model = load(saved())
    weight = model.model.embed_tokens.weight
    seen = {kvzip.fingerprint(model)}
    for i in range(1, 12):
        weight.data = torch.full_like(weight, i)  # where what was before is freed
        seen.add(kvzip.fingerprint(model))
    assert len(seen) == 12


def patched(model: Any) -> None:
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: own(x) * 1.5


def hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 1.5)


def scaled(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def replaced(model: Any) -> None:
    class Other(torch.nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x) + 1

    model.model.layers[1].mlp.up_proj.__class__ = Other


def rope_of_config(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 123.0}


def rope_in_memory(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(2)


def attribute(model: Any) -> None:
    model.model.layers[0].extra = torch.ones(3)


def quantised(model: Any) -> None:
    model.float()
    model.model = torch.ao.quantization.quantize_dynamic(model.model, {torch.nn.Linear})


@pytest.mark.parametrize(
    "change",
    [patched, hooked, scaled, replaced, rope_of_config, rope_in_memory, attribute, quantised],
)
def test_what_else_can_be_changed(change: Any, saved: Any, load: Any) -> None:
    model = load(saved())
    first = kvzip.fingerprint(model)
    change(model)
    assert kvzip.fingerprint(model) != first


@pytest.mark.filterwarnings("ignore")
def test_the_order_counts_in_which_layers_are_run_twice(saved: Any, load: Any) -> None:
    """Merges of a model with itself, whose modules are all the same ones."""
    model = load(saved())
    layers, found = list(model.model.layers), set()
    orders = [(0, 1), (0, 1, 0, 1), (0, 1, 1, 0), (0, 0, 1, 1), (0, 0, 0, 1), (1, 1, 1, 0)]
    for order in orders:
        model.model.layers = torch.nn.ModuleList([layers[i] for i in order])
        found.add(kvzip.fingerprint(model))
    assert len(found) == len(orders)


def test_two_quantised_models_differ_if_their_packed_numbers_do(saved: Any, load: Any) -> None:
    """A scale that doubles leaves the packed integers as they are."""
    found = set()
    for factor in (1, 1, 2):
        model = load(saved(), "float32")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(factor)
        quantised(model)
        found.add(kvzip.fingerprint(model))
    assert len(found) == 2


def test_weights_that_are_not_in_memory(saved: Any) -> None:
    config = transformers.AutoConfig.from_pretrained(saved())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(KVZipError, match="not in memory"):
        kvzip.fingerprint(model)
    with pytest.raises(KVZipError, match="no model"):
        kvzip.fingerprint(7)


def test_a_checkpoint_that_changes_below_a_model(saved: Any, load: Any) -> None:
    """A folder is trained on while a model that was loaded from it goes on."""
    folder = saved()
    model = load(folder)
    first = kvzip.fingerprint(model)
    other = load(folder)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(folder)
    assert kvzip.fingerprint(folder) != first
    assert kvzip.fingerprint(model) not in (first, kvzip.fingerprint(folder))
    assert kvzip.fingerprint(load(folder)) == kvzip.fingerprint(folder)


# --- a store never gives another model's cache -----------------------------------------------


def own_tokens(model: Any, ids: Any, cache: Any = None) -> Any:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **options, **({} if cache is None else cache_argument(cache)))


def put(store: Store, model: Any) -> Any:
    """The ids of a prompt that goes on from what is stored."""
    cache = load_or_prefill(store, model, IDS)
    out = own_tokens(model, IDS, cache)
    fed = out[:, : cache.get_seq_length()]
    store.put(kvzip.Snapshot.from_cache(cache, fed, model), codec="raw")
    return torch.cat([out, IDS[:, :7]], 1)


def test_any_tensor_that_changes_makes_a_miss(
    saved: Any, load: Any, tmp_path: Path, caplog: Any
) -> None:
    model, store = load(saved()), Store(tmp_path / "store", block_tokens=8)
    prompt = put(store, model)
    assert load_or_prefill(store, model, prompt).get_seq_length() > 40
    for name, weight in model.named_parameters():
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(torch.randn_like(weight) * 0.05)
        assert load_or_prefill(store, model, prompt).get_seq_length() == 0, name
        with torch.no_grad():
            weight.copy_(before)
    assert load_or_prefill(store, model, prompt).get_seq_length() > 40


def test_adapters(saved: Any, load: Any, tmp_path: Path) -> None:
    """On any linear layer: put on, turned off, merged, taken off."""
    peft = pytest.importorskip("peft")
    folder = saved()
    model, store = load(folder), Store(tmp_path / "store", block_tokens=8)
    prompt, first = put(store, model), kvzip.fingerprint(model)
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert names >= {"q_proj", "v_proj", "o_proj", "up_proj"}
    for target in sorted(names - {"lm_head"}):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            target_modules=[target], r=2, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(load(folder), config).eval()
        seen = [first, kvzip.fingerprint(adapted)]
        cache = load_or_prefill(store, adapted, prompt)
        assert cache.get_seq_length() == 0
        adapted.base_model.disable_adapter_layers()
        seen.append(kvzip.fingerprint(adapted))
        adapted.base_model.enable_adapter_layers()
        assert kvzip.fingerprint(adapted) == seen[1]
        merged = adapted.merge_and_unload()
        seen.append(kvzip.fingerprint(merged))
        assert len(set(seen)) == 4, target
        cache = load_or_prefill(store, merged, prompt)
        assert cache.get_seq_length() == 0
        assert torch.equal(own_tokens(merged, prompt, cache), own_tokens(merged, prompt))


def test_an_almost_hit_is_said_once_with_both(
    saved: Any, load: Any, tmp_path: Path, caplog: Any
) -> None:
    folder = saved()
    model, store = load(folder), Store(tmp_path / "store", block_tokens=8)
    prompt, first = put(store, model), kvzip.fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    for _ in range(3):
        load_or_prefill(store, model, prompt)
    load_or_prefill(store, model, prompt.flip(1))  # of which it has nothing
    [told] = [r.getMessage() for r in caplog.records if r.name == "kvzip.store"]
    assert first in told and kvzip.fingerprint(model) in told
    load_or_prefill(store, load(folder, "float32"), prompt)  # another dtype is another identity
    told = [r.getMessage() for r in caplog.records if r.name == "kvzip.store"][1]
    assert "fp32" in told and "bf16" in told


def test_names_do_not_matter_where_bytes_do(saved: Any, load: Any, tmp_path: Path) -> None:
    model, store = load(saved()), Store(tmp_path / "store", block_tokens=8)
    prompt = put(store, model)
    ids, weights = prompt[0].numpy(), kvzip.fingerprint(model)
    for name in ("", "another name", model.name_or_path):
        found = store.find(ids, model=name, revision=weights, dtype="bf16")
        assert found is not None
        found.reader.close()
