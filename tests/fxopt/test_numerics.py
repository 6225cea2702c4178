"""numerics: an error planted in a pass is found in that pass; rounding and approximation are not called errors."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import torch

import fxopt
from fxopt import LayerSkip, SettingError, Technique
from fxopt.inspection.numerics import numerics
from fxopt.planning import decode_inputs
from fxopt.testing import TINY

IDS = torch.tensor([[5, 17, 3, 99, 42, 8, 61]])


@pytest.fixture
def planted():
    """``planted(name, factor)``: an exact technique that multiplies one residual addition of layer 1 by `factor`."""
    made = []

    def make(name, factor, exact=True):
        @dataclasses.dataclass(frozen=True)
        class Planted(Technique):
            def reference(self, model):
                return model

            def rewrite(self, graph, context):
                add = next(n for n in graph.nodes if n.target is operator.add and context.structure.layer_of(n)
                           and context.structure.layer_of(n).index == 1)  # fmt: skip
                new = context.rewriter.call(torch.mul, (add, factor), like=add, after=add, name=f"{name}_scaled")
                context.rewriter.replace(add, new, only=lambda user: user is not new)
                context.applied(add, "scaled")

        Planted.name, Planted.exact = name, exact
        Planted.__init_subclass__()
        Technique.registry[name] = Planted
        made.append(name)
        return Planted()

    yield make
    for name in made:
        Technique.registry.pop(name, None)


def verdicts(numbers):
    return {stage.name: stage.verdict for stage in numbers.stages}


def test_an_error_is_bisected_to_its_pass_and_node(planted):
    model = TINY["handwritten"]()
    first, second, third = planted("aa_harmless", 1.0), planted("bb_wrong", 1.001), planted("cc_harmless", 1.0)
    numbers = numerics(model, (IDS,), first, second, third, compiled=False)
    found = verdicts(numbers)
    assert found["aa_harmless"] in ("as eager", "rounding", "closer") and found["bb_wrong"] == "diverges"
    assert numbers.first == "bb_wrong"
    assert numbers.culprit is not None and "bb_wrong_scaled" in numbers.culprit.made
    assert numbers.culprit.module.startswith("layers.1") and "testing.py" in numbers.culprit.source
    assert numbers.culprit.error == pytest.approx(1e-3, rel=0.6)
    text = numbers.text(80)
    assert "bb_wrong is the first pass that diverges" in text and max(map(len, text.split("\n"))) <= 80
    # limited by number and by name
    assert numerics(model, (IDS,), first, second, passes=["aa_harmless"], compiled=False).first == ""
    with pytest.raises(SettingError, match="bb_wrong"):
        numerics(model, (IDS,), first, passes=["bb_wrong"])


def test_skipping_is_measured_against_its_own_reference():
    numbers = numerics(TINY["handwritten"](), (IDS,), LayerSkip(skip=(1,)), compiled=False)
    stage = next(s for s in numbers.stages if s.name == "layer_skip")
    assert numbers.first == "" and stage.verdict in ("as eager", "rounding", "closer")
    assert stage.kl is not None and stage.kl > 1e-4 and 0 <= stage.agreement <= 1


def test_an_error_in_an_approximate_pass_is_found(planted):
    wrong = planted("zz_wrong", 1.01, exact=False)
    numbers = numerics(TINY["handwritten"](), (IDS,), LayerSkip(skip=(2,)), wrong, compiled=False)
    assert verdicts(numbers)["layer_skip"] != "diverges" and numbers.first == "zz_wrong"


def test_low_precision_rounding_is_no_error():
    model = TINY["handwritten"]().to(torch.bfloat16)
    numbers = numerics(model, (IDS,), compiled=False)
    assert numbers.first == "" and numbers.stages[0].error < 0.05
    assert model.head.weight.dtype == torch.bfloat16


def test_what_inductor_computes_is_the_last_stage():
    model = TINY["handwritten"]()
    numbers = numerics(model, (IDS,), LayerSkip(skip=(1,)))
    compiled = numbers.stages[-1]
    assert compiled.name == "compiled" and compiled.verdict in ("as eager", "rounding", "closer")
    assert numbers.first == "" and 0 < compiled.error < 1e-5
    skipped = next(s for s in numbers.stages if s.name == "layer_skip")
    assert compiled.kl == pytest.approx(skipped.kl, rel=1e-3) and compiled.agreement == skipped.agreement
    assert fxopt.reports() == []


@pytest.mark.parametrize("everywhere", [True, False], ids=["in a node", "only where it is fused"])
def test_an_error_of_the_compiler_is_found_behind_the_passes(monkeypatch, everywhere):
    """The compiler is wrong about the GELU of layer 1: always, or only while its value is not asked for."""

    def wrong(gm, inputs, mode, patches):
        node = [n for n in gm.graph.nodes if "gelu" in str(n.target)][1]
        outputs = gm.graph.output_node().args[0]
        if everywhere or node not in outputs:
            users = list(node.users)
            with gm.graph.inserting_after(node):
                new = gm.graph.call_function(torch.mul, (node, 1.01))
            for user in users:
                user.replace_input_with(node, new)
            gm.recompile()
        return gm.forward

    monkeypatch.setattr("fxopt.codegen.compat.compile_with_inductor", wrong)
    numbers = numerics(TINY["handwritten"](), (IDS,), LayerSkip(skip=(2,)))
    assert [s.name for s in numbers.stages if s.verdict == "diverges"] == ["compiled"] and numbers.first == "compiled"
    text = numbers.text(200)
    if everywhere:
        assert numbers.culprit is not None and numbers.culprit.target == "gelu"
        assert numbers.culprit.module == "layers.1" and "testing.py" in numbers.culprit.source
        assert numbers.culprit.error == pytest.approx(1e-2, rel=1e-2)
        assert "compiled is the first stage that diverges. The first value that differs is gelu" in text
    else:
        assert numbers.culprit is None and "Where every value is kept, none does" in text


def test_a_decode_step_on_a_static_cache():
    pytest.importorskip("transformers")
    model = TINY["llama"]()
    step = decode_inputs(model, cache=32)
    step["input_ids"] = step["input_ids"] + 5  # the embedding of the padding, 0, is zero
    for layer in step["past_key_values"].layers:
        layer.keys.normal_(generator=torch.Generator().manual_seed(1))
        layer.cumulative_length.fill_(7)
    kept = [layer.keys.clone() for layer in step["past_key_values"].layers]
    numbers = numerics(model, step, LayerSkip(skip=(1,)), compiled=False)
    assert numbers.first == "" and {"gqa_packing", "cache_extent", "layer_skip"} <= {s.name for s in numbers.stages}
    assert all(stage.error > 0 for stage in numbers.stages)
    assert all(torch.equal(a, b.keys) for a, b in zip(kept, step["past_key_values"].layers, strict=True))
