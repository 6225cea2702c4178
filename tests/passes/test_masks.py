"""What masks hide: proven structure, what is left alone, and the read extent against a search by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fxopt.codegen.ops.attention import read_extent
from fxopt.passes.cache_extent import CacheExtent
from fxopt.passes.context import PassContext
from fxopt.passes.gqa_packing import GqaPacking
from fxopt.passes.mask_structure import MaskStructure
from fxopt.passes.masks import MaskFacts, classify, facts_of, read_extent_node
from fxopt.passes.nodes import name_of
from fxopt.passes.provenance import number_nodes
from fxopt.passes.record import GraphRecord
from fxopt.passes.rewriter import verify
from fxopt.testing import capture

T, S = 5, 5


def causal(tokens=T, length=S, offset=0, window=None):
    position, key = offset + torch.arange(tokens)[:, None], torch.arange(length)
    seen = key <= position
    return seen if window is None else seen & (key > position - window)


# -- the shape of a known mask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "facts"),
    [
        (torch.ones(T, S, dtype=torch.bool), MaskFacts("full")),
        (causal(), MaskFacts("causal")),
        (causal(3, 7, offset=4), MaskFacts("causal", offset=4)),
        (causal(window=2), MaskFacts("window", window=2)),
        (causal(window=S), MaskFacts("causal")),
        (torch.zeros(2, 1, T, S), MaskFacts("full")),
        (torch.zeros(T, S).masked_fill(~causal(), float("-inf")), MaskFacts("causal")),
        (torch.zeros(T, S).masked_fill(~causal(), torch.finfo(torch.float32).min), MaskFacts("causal")),
    ],
)
def test_named_shapes(mask, facts):
    assert classify(mask) == facts


def test_shapes_without_a_name():
    holed = causal()
    holed[4, 1] = False
    padded = torch.stack([causal(), causal() & (torch.arange(S) > 0)])
    bias = torch.zeros(T, S).masked_fill(~causal(), float("-inf"))
    bias[3, 1] = -0.5
    for mask in (holed, padded, bias, causal().flip(0), torch.zeros(T, S, dtype=torch.bool)):
        assert classify(mask).kind == "constant"


# -- masks in a graph -------------------------------------------------------------------------------------------------


def mask_of(function, *args, **kwargs):
    (graph_module,) = capture(function, *args, **kwargs)
    (node,) = [n for n in graph_module.graph.nodes if name_of(n) == "scaled_dot_product_attention"]
    return node.kwargs["attn_mask"]


def attend(mask, q):
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def test_a_mask_from_constants_is_known():
    def function(q):
        place = torch.arange(T, device=q.device)
        mask = (place[None, :] <= place[:, None]) & q.new_ones((), dtype=torch.bool)
        return attend(mask.expand(2, 1, T, T), q)

    assert facts_of(mask_of(function, torch.randn(2, 4, T, 8))) == MaskFacts("causal")


def test_a_mask_that_an_input_decides_is_not_guessed():
    def function(q, padding):
        place = torch.arange(T)
        return attend((place[None, :] <= place[:, None]) & padding[:, None, None, :], q)

    facts = facts_of(mask_of(function, torch.randn(2, 4, T, 8), torch.ones(2, T, dtype=torch.bool)))
    assert facts.kind == "input"
    assert "padding" in facts.reason


def test_random_and_written_masks_are_unknown():
    def random(q):
        return attend(torch.rand(T, T) < 2, q)

    def written(q):
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        mask[0, 0] = False
        return attend(mask, q)

    q = torch.randn(2, 4, T, 8)
    assert facts_of(mask_of(random, q)).kind == "unknown"
    assert "in place" in facts_of(mask_of(written, q)).reason


def test_a_symbolic_size_is_no_proof():
    def function(q):
        place = torch.arange(q.shape[2])
        return attend(place[None, :] <= place[:, None], q)

    assert "symbolic" in facts_of(mask_of(function, torch.randn(2, 4, T, 8), dynamic=True)).reason


# -- the read extent --------------------------------------------------------------------------------------------------


def by_hand(visible):
    rows = visible.reshape(-1, visible.shape[-1])
    return max(int(row.nonzero().max()) + 1 if row.any() else len(row) for row in rows)


@pytest.mark.parametrize("kind", ["bool", "inf", "min", "min16"])
@pytest.mark.parametrize("empty_row", [False, True])
def test_read_extent(kind, empty_row):
    generator = torch.Generator().manual_seed(3)
    for filled in (1, 4, 9):
        visible = (torch.rand(2, 1, 3, 9, generator=generator) < 0.6) & (torch.arange(9) < filled)
        visible[..., 0] = True
        if empty_row:
            visible[1, 0, 1] = False
        dtype = torch.bfloat16 if kind == "min16" else torch.float32
        low = float("-inf") if kind == "inf" else torch.finfo(dtype).min
        bias = torch.randn(visible.shape, generator=generator).to(dtype).masked_fill(~visible, low)
        mask = visible if kind == "bool" else bias
        assert int(read_extent(mask)) == by_hand(visible)
        (graph_module,) = capture(lambda x: x.logical_not() if x.dtype == torch.bool else x * 2, mask)
        number_nodes(graph_module.graph)
        context = PassContext(graph_module.graph, "cache_extent", GraphRecord(0, "-", "test"))
        (source,) = graph_module.graph.find_nodes(op="placeholder")
        output = next(n for n in graph_module.graph.nodes if n.op == "output")
        extent = read_extent_node(source, context.rewriter, like=source.next)
        output.args = ((extent,),)
        graph_module.recompile()
        (result,) = graph_module(mask)
        assert result.dtype == torch.int64
        assert result.shape == ()
        assert int(result) == by_hand(visible)


# -- rewrites of small graphs -----------------------------------------------------------------------------------------


def rewritten(function, *args, **kwargs):
    (graph_module,) = capture(function, *args, **kwargs)
    graph = graph_module.graph
    number_nodes(graph)
    remarks = []
    for technique in (MaskStructure(), GqaPacking(), CacheExtent()):
        context = PassContext(graph, technique.name, GraphRecord(0, "-", "test"))
        technique.rewrite(graph, context)
        verify(graph)
        remarks += context.remarks
    graph_module.recompile()
    return graph_module, remarks


def call(graph_module, **named):
    """Run a captured graph, whose inputs stand in the order in which they were first read."""
    places = [str(p.target).removeprefix("L_").rstrip("_") for p in graph_module.graph.find_nodes(op="placeholder")]
    return graph_module(*[named[place] for place in places])[0]


def applied(remarks, technique):
    return sum(r.count for r in remarks if r.technique == technique and r.status == "applied")


def test_a_causal_mask_becomes_is_causal_and_its_making_goes():
    def function(q, k, v):
        place = torch.arange(T)
        mask = (place[None, :] <= place[:, None])[None, None]
        k, v = (x[:, :, None].expand(2, 2, 2, T, 8).reshape(2, 4, T, 8) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    args = torch.randn(2, 4, T, 8), torch.randn(2, 2, T, 8), torch.randn(2, 2, T, 8)
    graph_module, remarks = rewritten(function, *args)
    names = [name_of(n) for n in graph_module.graph.nodes if name_of(n)]
    assert names == ["scaled_dot_product_attention"]
    assert applied(remarks, "mask_structure") == 1
    torch.testing.assert_close(call(graph_module, **dict(zip("qkv", args, strict=True))), function(*args))


def test_a_window_is_handed_over_as_a_number():
    def function(q):
        place = torch.arange(T)
        mask = (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - 2)
        return attend(mask, q)

    q = torch.randn(2, 4, T, 8)
    graph_module, remarks = rewritten(function, q)
    assert applied(remarks, "mask_structure") == 1
    assert any("window of 2 keys" in r.message for r in remarks)
    node = next(n for n in graph_module.graph.nodes if name_of(n))
    assert not graph_module.graph.find_nodes(op="call_function", target=torch.arange)
    assert (node.kwargs["window"], node.kwargs["is_causal"], "mask" in node.kwargs) == (2, True, False)
    torch.testing.assert_close(call(graph_module, q=q), function(q))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("form", ["fill", "where", "added"])
def test_a_soft_cap_keeps_its_causal_structure(window, form):
    def function(q):
        place = torch.arange(T)
        mask = place[None, :] <= place[:, None]
        if window is not None:
            mask = mask & (place[None, :] > place[:, None] - window)
        scores = torch.tanh(q @ q.transpose(-1, -2) / 20) * 20
        if form == "fill":
            scores = scores.masked_fill(~mask, float("-inf"))
        elif form == "where":
            scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
        else:
            scores = scores + torch.zeros(T, T).masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1) @ q

    q = torch.randn(2, 4, T, 8)
    graph_module, remarks = rewritten(function, q)
    assert applied(remarks, "mask_structure") == 1
    torch.testing.assert_close(call(graph_module, q=q), function(q))


def test_a_window_stays_a_mask_where_the_model_trains():
    def function(q):
        place = torch.arange(T)
        return attend((place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - 2), q)

    q = torch.randn(2, 4, T, 8, requires_grad=True)
    graph_module, remarks = rewritten(function, q, grad=True)
    assert [(r.status, r.code) for r in remarks if r.technique == "mask_structure"] == [("blocked", "FX205")]
    assert "attn_mask" in str(graph_module.graph)


def test_gradients_block_the_operator():
    q, k = torch.randn(2, 4, 1, 8, requires_grad=True), torch.randn(2, 2, 6, 8, requires_grad=True)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)

    def function(q, k, mask):
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)

    _, remarks = rewritten(function, q, k, mask, grad=True)
    assert [r.code for r in remarks if r.status == "blocked"] == ["FX205"]
    _, remarks = rewritten(function, q.detach(), k.detach(), mask)
    assert applied(remarks, "gqa_packing") == 1


def test_a_cache_that_is_written_between_its_repetition_and_its_reading():
    def function(q, cache, new, mask):
        keys = cache[:, :, None].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8)
        cache.index_copy_(2, torch.arange(1), new)
        return F.scaled_dot_product_attention(q, keys, keys, attn_mask=mask)

    args = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 1, 8), torch.ones(2, 1, 1, 6).bool()
    graph_module, remarks = rewritten(function, *args)
    assert "FX206" in [r.code for r in remarks if r.status == "blocked"]
    q, cache, new, mask = args
    expected = function(q, cache.clone(), new, mask)
    torch.testing.assert_close(call(graph_module, q=q, cache=cache.clone(), new=new, mask=mask), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", ["inf", "min", "bool", "fill"])
def test_rows_with_nothing_unmasked_keep_the_models_result(low, dtype):
    """Written out or by the library, an empty row means what the model computed, as long as that is a number."""
    visible = torch.arange(6) < torch.tensor([3, 0])[:, None, None, None]  # [2, 1, 1, 6]
    q = torch.randn(2, 4, 1, 8).to(dtype)
    cache, new = torch.randn(2, 2, 6, 8).to(dtype), torch.randn(2, 2, 1, 8).to(dtype)
    number = float("-inf") if low == "inf" else torch.finfo(dtype).min
    mask = visible if low in ("bool", "fill") else torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, number)

    def function(q, cache, new, mask):
        cache.index_copy_(2, torch.arange(1), new)
        keys = cache[:, :, None].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8)
        if low in ("bool", "inf"):
            return F.scaled_dot_product_attention(q, keys, keys, attn_mask=mask)
        scores = (q @ keys.transpose(-1, -2)) * 0.3
        scores = scores.masked_fill(~mask, number) if low == "fill" else scores + mask
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ keys

    graph_module, remarks = rewritten(function, q, cache.clone(), new, mask)
    assert (applied(remarks, "gqa_packing"), applied(remarks, "cache_extent")) == (1, 1)
    one, two = cache.clone(), cache.clone()
    tolerance = {} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    got = call(graph_module, q=q, cache=one, new=new, mask=mask)
    torch.testing.assert_close(got, function(q, two, new, mask), **tolerance)
    assert torch.equal(one, two)
