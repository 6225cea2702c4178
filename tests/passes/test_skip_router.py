"""Layers that the prompt asks for: against the eager reference, in the cache, and with layers that nobody reads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fxopt
from fxopt.passes.layer_skip import LayerSkip
from fxopt.passes.skip_router import RandomPolicy, RoutedLayer
from fxopt.testing import TINY

IDS = torch.randint(3, 128, (4, 6), generator=torch.Generator().manual_seed(5))
HALF = RandomPolicy(0.5, seed=3)


def routed_model(name="llama"):
    """A model that carries a router for each of its layers, biased so that some rows want it."""
    model = TINY[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.routers = nn.ModuleList(nn.Linear(64, 1) for _ in range(3))
    return model


STATIC = pytest.param("static", marks=pytest.mark.branches_write)


def write(model, ids=IDS, cache="static", tokens=6):
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        out = model.generate(
            ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, cache_implementation=cache,
            disable_compile=True, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def decisions(reference):
    layers = [m for m in reference.modules() if isinstance(m, RoutedLayer)]
    return [layer.decisions for layer in layers]


@pytest.mark.parametrize("cache", [STATIC, pytest.param(None, id="growing")])
@pytest.mark.parametrize(
    ("name", "router"),
    [("llama", HALF), ("llama", "routers"), ("gpt2", HALF), ("gpt_neox", HALF), ("qwen3", "routers")],
)
def test_generates_what_the_reference_generates(name, router, cache, eager_lowering):
    technique = LayerSkip(router=router)
    reference = fxopt.reference(routed_model(name), technique)
    wanted, wanted_logits = write(reference, cache=cache)
    compiled = fxopt.compile(routed_model(name), technique, strict=True)
    tokens, logits = write(compiled, cache=cache)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logits, wanted_logits, atol=2e-5, rtol=1e-5)
    for layer in decisions(reference):
        assert all(later == layer[0] for later in layer), "the prompt's decision holds"
    told = [row for layer in decisions(reference) for row in layer[0]]
    assert any(told) and not all(told)
    report = fxopt.report(compiled)
    assert report.count("layer_skip") == 3 * len(report.graphs)


@pytest.mark.branches_write
def test_a_row_does_not_depend_on_its_neighbours(eager_lowering):
    technique = LayerSkip(router="routers")
    compiled = fxopt.compile(routed_model(), technique, strict=True)
    together, _ = write(compiled)
    for row in range(4):
        assert torch.equal(write(compiled, IDS[row : row + 1])[0], together[row : row + 1])


@pytest.mark.branches_write
@pytest.mark.parametrize("nobody", [0, 1, 2])
def test_a_layer_that_nobody_wants_is_not_read(nobody, eager_lowering):
    """Its weights are NaN, and the model is the one without it."""
    model, other = routed_model(), TINY["llama"]()
    for index, router in enumerate(model.routers):
        router.weight.data.zero_()
        router.bias.data.fill_(-1.0 if index == nobody else 1.0)
    for parameter in model.model.layers[nobody].parameters():
        parameter.data.fill_(float("nan"))
    tokens, logits = write(fxopt.compile(model, LayerSkip(router="routers"), strict=True))
    wanted, wanted_logits = write(fxopt.reference(other, LayerSkip(skip=(nobody,))))
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logits, wanted_logits, atol=2e-5, rtol=1e-5)


def rows_of_linears(model, ids, **kwargs):
    """Rows of the batch that all linears of width 64 or 96 were given in a forward pass."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        model(ids, **kwargs)
    events = [e for e in profile.events() if e.name == "aten::linear"]
    shapes = [e.input_shapes[0] for e in events if e.input_shapes[1][0] <= 96]
    return sum(math.prod(shape[:-1]) for shape in shapes) // ids.shape[1]  # [rows, S, W], or [rows * S, W]


@pytest.mark.parametrize("cache", [STATIC, "growing", "none"])
def test_a_prompt_computes_the_rows_that_want_a_layer(cache, eager_lowering):
    """One row of four wants the first layer, three the second, all the third."""
    from transformers import StaticCache

    counts = torch.tensor([1, 3, 4])
    model = fxopt.compile(TINY["llama"](), LayerSkip(router=first_rows), strict=True)
    given = {"past_key_values": StaticCache(config=model.config, max_cache_len=16)} if cache == "static" else {}
    given["use_cache"] = cache != "none"
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        for _ in range(2):  # a static cache that has its tensors compiles again; nothing may while rows are counted
            model(IDS, **given)
            if cache == "static":
                given["past_key_values"].reset()
        assert rows_of_linears(model, IDS, **given) == 7 * int(counts.sum())
    remarks = fxopt.report(model).graphs[-1].remarks
    told = [r.message for r in remarks if (r.technique, r.status) == ("layer_skip", "applied")]
    assert len(told) == 3 and all("for the rows that want it" in message for message in told)


def first_rows(state, layer):
    return torch.cumsum(torch.ones_like(state[:, 0]), 0) <= (1, 3, 4)[layer]


@pytest.mark.branches_write
def test_decode_steps_say_what_all_rows_cost(eager_lowering):
    model = fxopt.compile(routed_model(), LayerSkip(router="routers"), strict=True)
    write(model, tokens=2)
    (decode,) = [g for g in fxopt.report(model).graphs if g.role == "decode"]
    told = [r.message for r in decode.remarks if "weights are read whatever the number of rows" in r.message]
    assert len(told) == 3 and all("% more bytes" in message for message in told)


@pytest.mark.branches_write
def test_two_conversations_and_reset(eager_lowering):
    from transformers import StaticCache

    model = fxopt.compile(routed_model(), LayerSkip(router="routers"), strict=True)
    conversations = [IDS, IDS.flip(1)]
    apart = [write(model, ids, tokens=4)[0] for ids in conversations]
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in conversations]
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        for _ in range(2):  # the second time after a reset, with the two prompts exchanged
            steps = [[model(ids, past_key_values=c).logits[:, -1:].argmax(-1)]
                     for ids, c in zip(conversations, caches, strict=True)]  # fmt: skip
            for _ in range(3):
                for tokens, cache in zip(steps, caches, strict=True):
                    tokens.append(model(tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
            for tokens, wanted in zip(steps, apart, strict=True):
                assert torch.equal(torch.cat(tokens, 1), wanted)
            for cache in caches:
                cache.reset()
            conversations.reverse()
            apart.reverse()


@pytest.mark.branches_write
def test_routers_from_a_file_become_the_models(tmp_path, eager_lowering):
    safetensors = pytest.importorskip("safetensors.torch")
    source = routed_model()
    path = str(tmp_path / "routers.safetensors")
    safetensors.save_file({k: v.detach() for k, v in source.routers.state_dict().items()}, path)
    model = fxopt.compile(TINY["llama"](), LayerSkip(router=path), strict=True)
    assert {k for k in model.state_dict() if "router" in k} == {
        f"fxopt_router.{i}.{part}" for i in range(3) for part in ("weight", "bias")
    }
    wanted, _ = write(fxopt.reference(source, LayerSkip(router="routers")))
    assert torch.equal(write(model)[0], wanted)


def test_random_policy_keeps_its_rate_and_repeats():
    state = torch.zeros(2500, 4)
    told = torch.cat([RandomPolicy(0.75, seed=7)(state, layer) for layer in range(4)])
    assert len(told) == 10_000
    sigma = (10_000 * 0.75 * 0.25) ** 0.5
    assert abs(int(told.sum()) - 7500) < 4 * sigma
    again = torch.cat([RandomPolicy(0.75, seed=7)(state, layer) for layer in range(4)])
    assert torch.equal(told, again)
    assert not torch.equal(told, torch.cat([RandomPolicy(0.75, seed=8)(state, layer) for layer in range(4)]))
    assert LayerSkip(router=RandomPolicy(0.5)).digest != LayerSkip(router=RandomPolicy(0.5, seed=1)).digest


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"router": "routers", "skip": (1,)}, "exactly one"),
        ({"router": "routers", "decide": "token"}, "each token"),
        ({"router": "routers", "part": "mlp"}, "whole layers"),
        ({"router": "routers", "phase": "decode"}, "whole layers"),
    ],
)
def test_bad_settings_are_refused_at_once(fields, said):
    with pytest.raises(fxopt.SettingError, match=said):
        LayerSkip(**fields)


def test_routers_that_are_none_are_refused(tmp_path):
    (tmp_path / "broken.safetensors").write_text("nothing")
    for path, said in (
        ("gates", "has no module 'gates'"),
        ("model", r"a router is nn.Linear\(width, 1\)"),
        (str(tmp_path / "broken.safetensors"), "cannot be read"),
    ):
        with pytest.raises(fxopt.SettingError, match=said):
            fxopt.compile(routed_model(), LayerSkip(router=path))
