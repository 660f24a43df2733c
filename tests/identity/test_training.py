"""What an optimizer writes counts, whatever it does to version counters; what `torch.compile` notes
does not.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvzip  # noqa: E402
from kvzip.identity import live  # noqa: E402

pytestmark = pytest.mark.first


def embeddings(sparse: bool = False) -> Any:
    """So many rows that few of them hold a number that is looked at."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(4096, 32, sparse=sparse), torch.nn.Linear(32, 4))


def few_rows_trained(model: Any, optimizer: Any) -> None:
    loss = model(torch.tensor([5, 70, 700])).square().sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Adam", {"fused": True}),
        ("AdamW", {"fused": True, "weight_decay": 0.0}),
        ("SGD", {"fused": True}),
        ("Adagrad", {"fused": True}),
        ("SparseAdam", {}),
        ("SGD", {"foreach": False}),
    ],
)
@pytest.mark.drawn(2)
def test_a_few_rows_that_are_trained(
    kind: str, options: dict[str, Any], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = embeddings(kind == "SparseAdam")
    weight = model[0].weight
    before, seen = weight.detach().clone(), {kvzip.fingerprint(model)}
    optimizer = getattr(torch.optim, kind)([weight], lr=0.01, **options)
    if compiled:
        optimizer.step = torch.compile(optimizer.step, backend="eager")
    for step in range(1, 4):
        few_rows_trained(model, optimizer)
        seen.add(kvzip.fingerprint(model))
        assert len(seen) == step + 1
    assert int((weight != before).sum()) <= 3 * 32

    # What was not trained is not read again.
    few_rows_trained(model, optimizer)
    read, own = [], live.digest_of
    monkeypatch.setattr(live, "digest_of", lambda tensor: read.append(tensor) or own(tensor))
    kvzip.fingerprint(model)
    assert [tensor.data_ptr() for tensor in read] == [weight.data_ptr()]


def test_an_optimizer_whose_parameters_cannot_be_told() -> None:
    model = embeddings()
    first = kvzip.fingerprint(model)

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            self.param_groups = None

    optimizer = Own([model[0].weight], lr=0.01, fused=True)
    model(torch.tensor([5])).sum().backward()
    optimizer.step()
    assert kvzip.fingerprint(model) != first


_COMPILING = """
import sys
import kvzip, torch, transformers

folder = sys.argv[1]
load = transformers.AutoModelForCausalLM.from_pretrained
model = load(folder)
first = kvzip.fingerprint(model)
assert first == kvzip.fingerprint(folder)
init = torch.nn.Module.__init__
torch.compile(lambda a: a + 1, backend="eager")(torch.ones(3))
assert torch.nn.Module.__init__ is not init  # which is what this is about
assert kvzip.fingerprint(model) == kvzip.fingerprint(load(folder)) == first

compiled = torch.compile(model.__call__, backend="eager")
with torch.no_grad():
    compiled(torch.ones(1, 9, dtype=int))
assert any("_dynamo_static_input_type" in vars(each) for each in model.parameters())
assert kvzip.fingerprint(model) == first

marking = torch.nn.Module.__init__
def patched(self, *args, **kwargs):
    marking(self, *args, **kwargs)
torch.nn.Module.__init__ = patched
assert kvzip.fingerprint(model) != first
torch.nn.Module.__init__ = marking
assert kvzip.fingerprint(model) == first
marking.__code__ = (lambda own: lambda self, *args, **kwargs: own)(1).__code__.replace(
    co_freevars=marking.__code__.co_freevars)
assert kvzip.fingerprint(model) != first
"""


def test_compiling_changes_nothing(saved: Any) -> None:
    """In a process of its own: it is the first compilation that puts a method around a module's."""
    folder: Path = saved("Llama", "float32")
    subprocess.run([sys.executable, "-c", _COMPILING, str(folder)], check=True, timeout=300)
