"""Whatever is typed: one JSON object, an exit code that says which kind, and never a traceback.

Every option of every command is found in the command's own signature and given every value of a
table that its kind could be given by mistake.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from pathlib import Path

import pytest
from support import cache_like, make_snapshot

import kvzip
from kvzip import capture
from kvzip.cli import main
from kvzip.cli.app import app, evaluate
from kvzip.models import load_model
from kvzip.store import Store

WRONG = {
    int: ["-1", "0", "x", "1.5", "", "99999999999999999999", "1e3"],
    float: ["nan", "inf", "-1", "x", "", "1e400"],
    Path: ["", "none/none", "[/x]", ".", "text", "http://", "doc.kvz", "a" * 300, "b\udcff"],
    str: ["", "none/none", "[/x]", "x:y=z,", "-1", "nan", ",", "../x", "a" * 300, "é\udcff", "1:0"],
}
MODEL = ["--model", "tiny"]
BASES = {
    # command: what is needed beside the option that is tried, and what is not tried
    "demo": ([*MODEL, "--text", "text", "--tokens", "8", "--codecs", "raw", "--train", "0",
              "--new-tokens", "1"], ()),
    "capture": ([*MODEL, "--text", "text", "--tokens", "8", "--docs", "0:1", "-o", "out"], ()),
    "encode": (["doc.safetensors", "-o", "out.kvz"], ()),
    "decode": (["doc.kvz", "-o", "out.safetensors"], ()),
    "verify": (["doc.kvz"], ()),
    "info": (["doc.kvz"], ()),
    "put": (["doc.safetensors", "--store", "store"], ()),
    "get": (["--like", "doc.kvz", "--store", "store"], ()),
    "ls": (["--store", "store"], ()),
    "rm": (["a/b", "--store", "store"], ()),
    "prune": (["--store", "store"], ()),
    "fit": (["doc.safetensors", "doc2.safetensors", "-o", "out.kvprofile", "--held-out", "0",
             "--max-bytes", "100000"], ()),
    "entropy": (["doc.safetensors"], ()),
    "bench": (["doc.safetensors", "--codecs", "raw", "--repeat", "1"], ()),
    "sweep": (["sweep.toml"], ("ray", "workers")),
    "report": ([], ()),
    "advise": (["--tokens", "100", "--link", "1Gb/s"], ()),
    "eval prices": ([], ()),
    "eval families": ([], ()),
    "eval fleet": (["--preset", "one-reader"], ()),
    "eval paper": ([], ()),
    "eval figures": (["none"], ()),
    "eval exactness": (["captured/doc-00000.safetensors", *MODEL, "--codecs", "raw", "--lossy", "",
                        "--continuations", "1", "--new-tokens", "1"], ()),
    "eval inputs": ([*MODEL, "--text", "text", "--lengths", "8,16", "--codecs", "raw",
                     "--repeat", "1"], ()),
    # As far as it goes without a network of its own.
    "eval links": ([*MODEL, "--text", "text", "--tokens", "8", "--draw", "none"], ()),
    "eval pages": (["doc.safetensors", "--profile", "channel.kvprofile", "--tokens", "16"], ()),
    "eval frontier": (["--test", "doc.safetensors", "--train", "doc.safetensors", "--calibrate",
                       "doc.safetensors", "--model", "none", "--layers", "0"], ()),
    "eval ratios": ([*MODEL, "--work", "work", "--kinds", "none", "--text", "own=text:sweep.toml",
                     "--tokens", "8", "--train", "0", "--test", "1", "--codecs", "raw"], ()),
    "eval scaling": (["--work", "work", "--kinds", "none", "--train", "1"], ()),
    "eval claims": ([], ()),
    "doctor": ([], ()),
    "eval check": (["none"], ()),
}  # fmt: skip


def commands():
    """Every command's name and function."""
    for tree, front in ((app, ""), (evaluate, "eval ")):
        for name in tree:
            found = tree[name]
            if not name.startswith("-") and found.default_command is not None:
                yield front + name, found.default_command


def kinds_of(annotation):
    """The kinds of value, of those in the table, that an annotation takes."""
    if typing.get_origin(annotation) is typing.Annotated:
        return kinds_of(typing.get_args(annotation)[0])
    arguments = typing.get_args(annotation)
    if arguments:
        return {kind for inner in arguments for kind in kinds_of(inner)}
    return {annotation} & set(WRONG)


def tries():
    for name, function in commands():
        base, left_out = BASES[name]
        hints = typing.get_type_hints(function, include_extras=True)
        for parameter in inspect.signature(function).parameters.values():
            option = "--" + parameter.name.replace("_", "-")
            positional = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
            names = [n for m in getattr(hints[parameter.name], "__metadata__", ())
                     for n in (m.name or ())]  # fmt: skip
            option = names[0] if names else option
            for kind in kinds_of(hints[parameter.name]):
                if parameter.name not in left_out:
                    # Loading a model again and again takes minutes: a third of the table each day.
                    if MODEL[0] in base:
                        others = [w for i, w in enumerate(WRONG[kind]) if i % 3]
                        yield pytest.param(
                            name, base, None if positional else option, others,
                            id=f"{name} {parameter.name}, others", marks=pytest.mark.long,
                        )  # fmt: skip
                    yield pytest.param(
                        name, base, None if positional else option,
                        WRONG[kind][:: 3 if MODEL[0] in base else 1],
                        id=f"{name} {parameter.name}",
                    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A snapshot, a .kvz file, a store, a text, a tiny model with its tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = tmp_path_factory.mktemp("arguments")
    for seed, name in enumerate(("doc", "doc2")):
        make_snapshot(cache_like, seed, "bf16", layers=2, tokens=40, dim=16).save(
            made / f"{name}.safetensors"
        )
    documents = [kvzip.Snapshot.load(made / f"{name}.safetensors") for name in ("doc", "doc2")]
    kvzip.Profile.fit(documents, codec="channel").save(made / "channel.kvprofile")
    kvzip.write(made / "doc.kvz", kvzip.Snapshot.load(made / "doc.safetensors"))
    Store(made / "store", block_tokens=8).put(made / "doc.kvz")
    (made / "text").write_text(" ".join(f"w{i * 7 % 190 + 2}" for i in range(100)))
    (made / "sweep.toml").write_text(
        '[grid]\ncodec = ["raw"]\nmodel = ["synthetic:layers=1,heads=1,dim=8"]\ntokens = [64]\n'
    )
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(
        made / "tiny"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(made / "tiny")
    loaded = load_model(str(made / "tiny"))
    text = capture.Text.read([str(made / "text")])
    documents = capture.cut_documents(loaded.tokenizer, text, 8, slice(0, 1))
    capture.capture(loaded, documents, made / "captured")
    return made


def outcome(capsys, arguments):
    """What a command with --json ends in: its exit code and its JSON, which is checked."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err, err
    assert out.count("\n") == 1, (arguments, out)
    found = json.loads(out)
    code = ended.value.code
    assert code in (0, 1, 2)
    if "error" in found:
        assert code in (1, 2) and found["exit"] == code and found["kind"] != "bug"
        assert "\n" not in found["error"]
        *steps, last = err.rstrip("\n").splitlines()
        assert last.startswith("kvzip: ")
        # Before it nothing but what was being done, "[m:ss] ...", and warnings.
        assert all(re.match(r"\[\d+:\d\d\] |kvzip: ", step) for step in steps)
    return code, found


def test_every_command_is_tried():
    assert {name for name, _ in commands()} == set(BASES)


@pytest.mark.parametrize(("command", "base", "option", "values"), list(tries()))
@pytest.mark.drawn(3)
def test_whatever_an_option_is_given(capsys, monkeypatch, folder, command, base, option, values):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for wrong in values:
        given = [wrong] if option is None else [f"{option}={wrong}"]
        left = base
        if option is None:
            left = base[1:] if base and not base[0].startswith("-") else base
        elif option in base:
            at = base.index(option)
            left = base[:at] + base[at + 2 :]
        outcome(capsys, [*command.split(), *given, *left])


@pytest.mark.parametrize("command", BASES)
def test_what_no_command_takes(capsys, command):
    for wrong in (["--frobnicate"], ["--frobnicate=1"], ["a", "b", "c", "d", "--threads"]):
        assert outcome(capsys, [*command.split(), *wrong])[0] == 2


@pytest.mark.parametrize(
    ("command", "parameter"),
    [
        (name, parameter.name)
        for name, function in commands()
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
        if "list[" in str(parameter.annotation)
    ],
)
def test_names_in_brackets_are_names(command, parameter):
    """Whatever takes several names takes each as it is, one that looks like JSON, too."""
    names = ["[a] b.kvz", '["c", "d"]', "[1]", "{}"]
    tree = evaluate if command.startswith("eval ") else app
    kind = inspect.signature(tree[command.removeprefix("eval ")].default_command).parameters[
        parameter
    ]
    base = list(BASES[command][0])
    if kind.kind is kind.KEYWORD_ONLY:
        option = "--" + parameter.replace("_", "-")
        if option in base:
            at = base.index(option)
            del base[at : at + 2]
        given = [*base, *(word for name in names for word in (option, name))]
    else:
        first = next((i for i, word in enumerate(base) if word.startswith("-")), len(base))
        given = [*names, *base[first:]]
    _, bound, _ = app.parse_args([*command.split(), *given], exit_on_error=False, print_error=False)
    assert [str(found) for found in bound.arguments[parameter]] == names
