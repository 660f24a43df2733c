"""Documents that serve only prompts which share much of them: nobody opens them for others."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import cache_like, examples, make_snapshot

import kvzip
from kvzip.snapshot import Layer, LayerLayout, Layout, PartLayout
from kvzip.store import Store, finding
from kvzip.store.folder import Meta
from kvzip.store.marks import first_useful, mark, name_in, repoint
from kvzip.workers import Workers

BLOCK = 8
OF = {"model": "test/model", "revision": "r1", "dtype": "bf16"}
COMMON = list(range(3 * BLOCK))
_prefixes = itertools.count()


@pytest.fixture(params=["folder", "s3", "sealed"])
def opened(request, tmp_path):
    if request.param == "s3":
        server = request.getfixturevalue("s3")
        url = f"{server.url}/least{next(_prefixes)}"
        return Store(url, block_tokens=BLOCK, options=server.options)
    key = None if request.param == "folder" else bytes(32)
    return Store(tmp_path / "store", block_tokens=BLOCK, key=key)


@pytest.fixture
def tried(monkeypatch):
    """The keys of documents that are opened to see whether they can be used."""
    keys, usable = [], finding.Finder._usable

    def note(self, key, *more):
        keys.append(key)
        return usable(self, key, *more)

    monkeypatch.setattr(finding.Finder, "_usable", note)
    return keys


def whole(ids):
    made = make_snapshot(cache_like, 1, "bf16", tokens=len(ids), dim=4)
    made.token_ids = np.array(ids, np.uint32)
    return made


def windowed(ids, window=10):
    """One whose second layer has its last window only."""
    made = whole(ids)
    k, v = (array[:, -window:] for array in made.layers[1])
    layout = LayerLayout.of_kv(k.shape, v.shape, "bf16", len(ids), "sliding", window)
    layers = [made.layers[0], Layer.of_kv(k, v, layout)]
    return kvzip.Snapshot(layers, "bf16", made.token_ids, made.origin)


def with_states(ids):
    made = whole(ids)
    part, length = PartLayout("bf16", (3, 4), "rd"), len(ids) - 1
    layout = LayerLayout({"recurrent": part}, length, "state", state_length=length)
    layers = [*made.layers, Layer({"recurrent": np.zeros((3, 4), np.uint16)}, layout)]
    return kvzip.Snapshot(layers, "bf16", made.token_ids, made.origin)


@pytest.mark.parametrize("kind", [windowed, with_states])
def test_documents_that_begin_alike_are_not_opened_in_vain(opened, tried, kind):
    asked = [[*COMMON, *range(1000 + 20 * i, 1020 + 20 * i)] for i in range(7)]
    prompt = [*COMMON, *range(2000, 2020)]

    def finds(key, opens=1):
        tried.clear()
        match = opened.find(prompt, **OF)
        assert (match and match.key) == key and len(tried) == opens
        if match is not None:
            assert match.tokens == len(COMMON)
            match.reader.close()

    for ids in asked[:4]:
        opened.put(kind(ids))
    finds(None, opens=0)
    served = opened.put(whole(COMMON)).key
    finds(served)
    for ids in asked[4:]:
        opened.put(kind(ids))
    finds(served)
    second = opened.put(whole([*COMMON, *range(3000, 3100)])).key
    finds(second)
    assert opened.remove(second)
    finds(served)
    assert opened.remove(served)
    finds(None, opens=0)
    for ids in asked:
        tried.clear()
        with opened.find([*ids, 7], **OF) as match:
            assert match.tokens >= len(ids) - 1 and tried == [match.key]
    assert all(opened.remove(each.key) for each in opened.documents())
    finds(None, opens=0)
    if opened.bucket.folder is not None:
        assert not [
            *opened.bucket.folder.glob("*/last/*"),
            *opened.bucket.folder.glob("*/with/*/*"),
        ]


def test_a_long_prompt_goes_back_over_many_marks(tmp_path, tried):
    """To the one document that serves it, which is much shorter."""
    ids = list(range(100 * BLOCK))
    store = Store(tmp_path / "store", block_tokens=BLOCK)
    served = store.put(whole(ids[: 2 * BLOCK])).key
    store.put(windowed([*ids, 5]))
    with store.find([*ids[:-1], 7], **OF) as match:
        assert (match.key, match.tokens) == (served, 2 * BLOCK) and tried == [served]


class Written:
    """Objects in memory; `meanwhile` is called with each path that is about to be written."""

    listable = True

    def __init__(self):
        self.all, self.meanwhile = {}, None

    def get(self, path, most=0):
        return self.all.get(path)

    def put(self, path, data, create=True, durable=False):
        if self.meanwhile:
            self.meanwhile(path)
        if create and path in self.all:
            return False
        self.all[path] = data
        return True

    def delete(self, path):
        self.all.pop(path, None)

    def head(self, path):
        return self.all.get(path)

    def under(self, prefix):
        for path in sorted(self.all):
            if path.startswith(prefix + "/"):
                yield Meta(path, len(self.all[path]), None, None)


@pytest.mark.parametrize("other", ["written", "removed"])
def test_what_others_do_while_a_mark_is_pointed_elsewhere(other):
    objects, pool = Written(), Workers(1, "test")
    useful, useless, late = (c * 64 for c in "abc")
    for name, first in ((useless, 1), (useful, 0)):
        mark(objects, pool, f"space/{name}", ["h"], first)
    assert name_in(objects.get("space/last/h")) == useful
    objects.delete(f"space/with/h/{useful}")

    def meanwhile(path):
        objects.meanwhile = None
        assert path == "space/last/h"
        if other == "written":
            mark(objects, pool, f"space/{late}", ["h"])
        else:
            objects.delete(f"space/with/h/{useless}")

    objects.meanwhile = meanwhile
    repoint(objects, "space/last/h", "space/with/h", useful)
    found = objects.get("space/last/h")
    assert found == (late.encode() if other == "written" else None)


def test_one_of_no_use_to_any_prompt_has_no_useful_mark():
    assert first_useful(["h"] * 3, BLOCK, None) == 3


@pytest.mark.parametrize("kind", [windowed, with_states])
@examples(60)
@given(tokens=st.integers(BLOCK, 60), shared=st.integers(0, 60))
def test_no_useful_mark_is_left_out(kind, tokens, shared):
    """A prompt that shares enough of a document has one of its useful marks as its last."""
    layout, chain = kind(range(tokens)).layout, [*range(tokens // BLOCK)]
    first = first_useful(chain, BLOCK, layout.least_prefix)
    assert 0 <= first < len(chain)
    shared = min(shared, tokens)
    if shared >= max(BLOCK, layout.least_prefix):
        assert shared // BLOCK - 1 >= first


def layers():
    """Of 20 tokens: all of them, the last ones, or a state."""
    shape = st.tuples(st.just(1), st.integers(0, 20), st.just(4))
    kv = st.builds(
        lambda shape, window: LayerLayout.of_kv(
            shape, shape, "bf16", 20, "sliding" if window else "full", window
        ),
        shape,
        st.one_of(st.none(), st.integers(1, 30)),
    )
    state = st.integers(0, 20).map(
        lambda length: LayerLayout(
            {"recurrent": PartLayout("bf16", (3, 4), "rd")}, length, "state", state_length=length
        )
    )
    return st.one_of(kv, state)


@examples(300)
@given(st.lists(layers(), min_size=1, max_size=3))
def test_the_least_prefix_is_the_least_of_all(layers):
    layout = Layout("bf16", tuple(layers))
    good = [n for n in range(21) if layout.lacking(n) is None]
    assert layout.least_prefix == (good[0] if good else None)
    assert layout.state_length is not None or good == [*range(good[0] if good else 21, 21)]
