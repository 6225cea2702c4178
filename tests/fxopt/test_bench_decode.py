"""``fxopt bench decode`` on a small model: the suite runs, its check finds a wrong peer, its figures are right."""

from __future__ import annotations

import types

import pytest
import torch

from fxopt.bench import decode, draw, load_suite
from fxopt.bench.decode_step import Step, filled_cache
from fxopt.bench.models import llama, weights_of_no_meaning
from fxopt.codegen import roofline
from fxopt.codegen.dataflow import Dataflow

pytest.importorskip("transformers")
TINY = {**decode.QUICK, "width": 64, "head_dim": 16, "intermediate_size": 96, "vocab_size": 128, "layers": 1}


@pytest.fixture(scope="module")
def model():
    return weights_of_no_meaning(**TINY)


@pytest.fixture
def eager_peers(monkeypatch, tmp_path):
    """Every peer runs the model as it stands: the suite is the subject, not what compilers make of the model."""
    monkeypatch.setattr(decode, "QUICK", TINY)
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))

    def peers(model, quick, on_gpu):
        return {name: (model.forward, False) for name in ("fxopt", "eager", "inductor default")}

    monkeypatch.setattr(decode, "peers_of", peers)


def test_the_suite_measures_every_batch_and_context(eager_peers, tmp_path):
    result = load_suite("decode")(quick=True, count=False)
    assert list(dict.fromkeys(row.case for row in result.rows)) == [
        f"batch {batch}, context {context}" for batch in (1, 2) for context in (64, 128)
    ]
    assert {row.peer for row in result.rows} == {"fxopt", "eager", "inductor default"}
    assert all(row.bound is not None and row.bound > 0 for row in result.rows)
    assert "tokens against float32, 8 each: eager 8 equal; fxopt 8 equal; inductor default 8 equal" in result.remarks
    assert sum("x the best peer" in remark for remark in result.remarks) == 4
    pytest.importorskip("matplotlib")
    draw("decode", result, tmp_path / "tokens.svg")
    assert (tmp_path / "tokens.svg").stat().st_size > 1000


def test_a_call_after_an_interruption_goes_on(eager_peers, monkeypatch):
    measured, checked, asked, room = decode.measured, decode.check_tokens, [], [2]

    def counting(model, calls, batch, context, *more):
        asked.append((batch, context))
        if len(asked) > room[0]:
            raise KeyboardInterrupt
        return measured(model, calls, batch, context, *more)

    def tokens(*arguments):
        asked.append("tokens")
        room[0] += 1
        return checked(*arguments)

    monkeypatch.setattr(decode, "measured", counting)
    monkeypatch.setattr(decode, "check_tokens", tokens)
    with pytest.raises(KeyboardInterrupt):
        decode.run(quick=True, count=False)
    assert asked == ["tokens", (1, 64), (1, 128), (2, 64)]
    asked.clear()
    result = decode.run(quick=True, count=False)
    assert asked == [(2, 64), (2, 128)] and len(result.rows) == 4 * 3
    assert [row.case for row in result.rows[:2]] == ["batch 1, context 64"] * 2 and result.rows[0].bound > 0
    assert any(remark.startswith("tokens against float32") for remark in result.remarks)
    asked.clear()
    room[0] = 9
    decode.run(quick=True, count=False)
    assert asked[0] == "tokens" and len(asked) == 5, "what was finished is measured again when asked again"


@pytest.mark.slow
def test_the_suite_as_it_is_called():
    result = load_suite("decode")(quick=True)
    assert {row.peer for row in result.rows} == {"fxopt", "eager", "inductor default", "inductor, forced gqa"}
    assert any("launches of one Llama-3-8B layer in the code for H200" in remark for remark in result.remarks)


def test_a_peer_with_other_tokens_is_not_timed(model):
    def wrong(**inputs):
        found = model(**inputs)
        return types.SimpleNamespace(logits=-found.logits)

    calls = {"eager": (model.forward, False), "inductor": (wrong, False)}
    with torch.no_grad(), pytest.raises(AssertionError, match="inductor: only 0 of 8 tokens"):
        decode.check_tokens(model, calls, 64, "cpu", torch.float32)


def test_a_tie_is_a_difference_within_rounding():
    right = [torch.tensor([1.0, 3.0, 2.99]), torch.tensor([5.0, 0.0, 1.0])]
    own = [torch.tensor([1.0, 2.98, 2.99]), torch.tensor([0.0, 0.0, 1.0])]
    assert decode.compared(own, right, 0.02) == (0, 1)
    assert decode.compared(right, right, 0.0) == (2, 0)
    assert decode.compared(own, right, 0.001) == (0, 0)


def test_tokens_of_another_dtype_are_held_against_float32(model):
    half = weights_of_no_meaning(dtype=torch.bfloat16, **TINY)
    with torch.no_grad():
        (said,) = decode.check_tokens(half, {"eager": (half.forward, False)}, 64, "cpu", torch.bfloat16)
    assert said.startswith("tokens against float32, 8 each: eager")


def test_bytes_that_a_step_reads(model):
    config = model.config
    layers = filled_cache(config, 64, 2, torch.float32, "cpu").layers
    stored = sum(4 * t.numel() for layer in layers for t in (layer.keys, layer.values))
    assert decode.cache_bytes(model, 2, 64, torch.float32) == stored
    table = model.get_input_embeddings().weight.numel() * 4
    assert decode.weight_bytes(model) == sum(p.numel() * 4 for p in model.parameters()) - table
    tied = weights_of_no_meaning(tie_word_embeddings=True, **TINY)
    assert decode.weight_bytes(tied) == sum(p.numel() * 4 for p in tied.parameters())


def test_steps_may_share_a_cache(model):
    first = Step(model.forward, model, 64, "cpu", batch=2)
    second = Step(model.forward, model, 64, "cpu", batch=2, cache=first.cache)
    with torch.no_grad():
        one, other, again = first(64).clone(), second(64).clone(), first(64)
    assert one.shape == (2, 1, 128)
    assert torch.equal(one, other)
    assert torch.equal(one, again)


def test_kernels_are_counted_without_copies():
    device = torch.autograd.DeviceType
    events = [
        types.SimpleNamespace(name=name, device_type=kind)
        for name, kind in (
            ("gemv", device.CUDA), ("Memcpy DtoD", device.CUDA), ("Memset", device.CUDA), ("aten::mm", device.CPU),
            ("triton_poi_fused_0", device.CUDA),
        )
    ]  # fmt: skip
    assert decode.kernels_in(events) == 2


def test_the_workspace_of_split_k():
    with torch.device("meta"):
        model = llama(**{**TINY, "width": 2048}).to(torch.bfloat16)
    flow = Dataflow("bfloat16", torch.device("cpu"), model=roofline.DEVICES["H200"])
    assert decode.workspace_bytes(model, 1, flow) == 0, "GEMV does not split"
    # The widest of the groups that split K in four: [4, M, N] float32, and a sum of squares where a norm is inside.
    assert decode.workspace_bytes(model, 8, flow) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_what_cannot_be_measured_here():
    with pytest.raises(ValueError, match="--quick tries it on a CPU"):
        load_suite("decode")()
    with pytest.raises(ValueError, match="--device cuda needs a GPU"):
        load_suite("decode")(device="cuda")
