"""What a user can write, how it is refused, and whose setting wins."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn

import fxopt
from fxopt import LayerSkip, SettingError, Technique
from fxopt.options import parse_options
from fxopt.testing import TINY, Handwritten, HandwrittenLayer

IDS = torch.tensor([[5, 17, 3, 99, 42, 8, 61]])


@pytest.mark.parametrize(
    ("options", "mode", "words"),
    [
        ({"layerskip": True}, None, "Did you mean 'layer_skip'"),
        ({"layer_skip": {"skp": (1,)}}, None, "Did you mean 'skip'"),
        ({"layer_skip": {"skp": (1,)}}, None, "LayerSkip has no field 'skp'; it has skip, keep, speedup"),
        ({"cpu_linear": {"name": "x"}}, None, "option 'cpu_linear': CpuLinear has no field 'name'; it has none"),
        ({"layer_skip": 3}, None, "takes a LayerSkip"),
        ({"disable": None}, None, "not None (NoneType)"),
        ({"disable": 3}, None, "disable takes names of passes"),
        ({"layer_skip": True}, None, "exactly one of"),
        ({"layer_skip": {"speedup": 1}}, None, "above 1"),
        ({"disable": ("layer_skp",)}, None, "Did you mean 'layer_skip'"),
        ({"layer_skip": {"skip": (1,)}, "disable": "layer_skip"}, None, "switches"),
        ({"strict": "yes"}, None, "True or False"),
        ({"record": "all"}, None, "0, 1 or 'full'"),
        ({}, "reduce-overheads", "Did you mean 'reduce-overhead'"),
    ],
)
def test_wrong_options_raise_with_the_next_step(options, mode, words):
    with pytest.raises(SettingError) as error:
        parse_options(options, mode)
    assert words in str(error.value)


def test_a_wrong_option_reaches_the_user_through_torch_compile():
    with pytest.raises(Exception, match="Did you mean 'layer_skip'"):
        torch.compile(Handwritten(), backend="fxopt", options={"layer_skp": True})(IDS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((LayerSkip,), "is a class"),
        (("layer_skip",), "not 'layer_skip'"),
        (({"layers.9": LayerSkip(skip=(0,))},), "matches the path 'layers.9'"),
        (({"layer.*": LayerSkip(skip=(0,))},), "no module of Handwritten"),
        ((LayerSkip(skip=(0,)), LayerSkip(skip=(1,))), "two settings"),
    ],
)
def test_wrong_arguments_of_compile_raise(given, words):
    with pytest.raises(SettingError) as error:
        fxopt.compile(Handwritten(), *given)
    assert words in str(error.value)


def test_a_pair_that_cannot_hold_together_raises_before_anything_is_compiled():
    exits, routed = fxopt.EarlyExit(layers=(1,)), fxopt.MixtureOfDepths(capacity=0.5)
    with pytest.raises(SettingError, match="EarlyExit.* together with MixtureOfDepths.*Remove one"):
        fxopt.compile(Handwritten(), exits, routed)
    with pytest.raises(SettingError, match="MixtureOfDepths.* together with|EarlyExit.* together with"):
        fxopt.compile(routed(Handwritten()), exits)


def test_compile_takes_modules_only():
    with pytest.raises(SettingError, match="nn.Module"):
        fxopt.compile(lambda x: x)
    with pytest.raises(SettingError, match="wrapped by torch.compile"):
        fxopt.compile(torch.compile(Handwritten()))


# -- decorating -----------------------------------------------------------------------------------------------------


def skipped(model, *techniques):
    return fxopt.reference(model, *techniques)(IDS)


def test_decorating_changes_no_eager_result_and_no_key():
    model = TINY["handwritten"]()
    before, keys = model(IDS), list(model.state_dict())
    assert LayerSkip(skip=(1,))(model) is model
    assert torch.equal(model(IDS), before)
    assert list(model.state_dict()) == keys


def test_an_instance_setting_acts(eager_lowering):
    model = TINY["handwritten"]()
    expected = skipped(model, LayerSkip(skip=(1,)))
    LayerSkip(skip=(1,))(model)
    assert torch.equal(fxopt.reference(model)(IDS), expected)
    assert torch.equal(torch.compile(model, backend="fxopt")(IDS), expected)


def test_changing_a_setting_recompiles_once(eager_lowering):
    model = TINY["handwritten"]()
    expected = {i: skipped(model, LayerSkip(skip=(i,))) for i in (0, 1)}
    LayerSkip(skip=(0,))(model)
    compiled = torch.compile(model, backend="fxopt")
    assert torch.equal(compiled(IDS), expected[0])
    LayerSkip(skip=(1,))(model)
    for _ in range(3):
        assert torch.equal(compiled(IDS), expected[1])
    assert sum(len(r.graphs) for r in fxopt.reports()) == 2


def test_a_class_setting_acts_and_recompiles(eager_lowering):
    @LayerSkip(skip=(0,))
    class Decorated(Handwritten):
        pass

    torch.manual_seed(0)
    model = Decorated().eval()
    compiled = torch.compile(model, backend="fxopt")
    assert torch.equal(compiled(IDS), skipped(model, LayerSkip(skip=(0,))))
    LayerSkip(skip=(2,))(Decorated)
    assert torch.equal(compiled(IDS), skipped(model, LayerSkip(skip=(2,))))
    assert sum(len(r.graphs) for r in fxopt.reports()) == 2


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Handwritten()

    def forward(self, ids):
        return self.inner(ids) * 1.0


class Named(Handwritten):
    """Decorated in the test below."""


def test_the_nearest_setting_wins(eager_lowering):
    def build():
        torch.manual_seed(0)
        model = Outer().eval()
        torch.manual_seed(0)
        model.inner = Named().eval()
        return model

    def expect(model, technique):
        return fxopt.reference(model.inner, technique)(IDS)

    options, by_class = LayerSkip(skip=(0,)), LayerSkip(skip=(1,))
    path, instance = LayerSkip(skip=(2,)), LayerSkip(skip=(0, 1))
    model = build()
    fxopt.compile(model, options)
    assert torch.equal(model(IDS), expect(model, options))
    by_class(Named)
    try:
        model = build()
        fxopt.compile(model, options)
        assert torch.equal(model(IDS), expect(model, by_class))
        fxopt.compile(model, options, {"inner": path})
        assert torch.equal(model(IDS), expect(model, path))
        instance(model.inner)
        fxopt.compile(model, options, {"inner": path})
        assert torch.equal(model(IDS), expect(model, instance))
        rows = [s for g in fxopt.report(model).graphs for s in g.settings]
        assert any(s.origin.startswith("instance") for s in rows)
    finally:
        del Named._fxopt_class_settings, Named._fxopt_class_settings_kept


def test_a_decorated_technique_in_disable_names_both_places():
    model = LayerSkip(skip=(1,))(TINY["handwritten"]())
    with pytest.raises(SettingError, match=r"decoration of Handwritten.*disable="):
        fxopt.compile(model, disable="layer_skip")


def test_deepcopy_keeps_the_decoration_and_drops_the_compilation(eager_lowering):
    model = LayerSkip(skip=(1,))(TINY["handwritten"]())
    expected = skipped(model)
    fxopt.compile(model)
    copied = copy.deepcopy(model)
    assert copied.forward.args[0] is copied
    assert not torch.equal(copied(IDS), expected)
    assert torch.equal(fxopt.compile(copied)(IDS), expected)


def test_pickle_keeps_the_decoration(eager_lowering):
    model = LayerSkip(skip=(1,))(TINY["handwritten"]())
    expected = skipped(model)
    fxopt.compile(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(torch.compile(loaded, backend="fxopt")(IDS), expected)


def test_save_pretrained_round_trip(tmp_path, eager_lowering):
    transformers = pytest.importorskip("transformers")
    model = LayerSkip(skip=(1,))(TINY["llama"]())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_graph_break_inside_a_decorated_module_is_noticed(eager_lowering):
    class Breaks(Handwritten):
        def forward(self, ids):
            x = self.embed(ids)
            torch._dynamo.graph_break()
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model = Outer()
    model.inner = LayerSkip(skip=(1,))(Breaks())
    model.eval()
    expected = fxopt.reference(model)(IDS)
    fxopt.compile(model)
    torch.testing.assert_close(model(IDS), expected)
    assert any(r.code == "FX602" for r in fxopt.report(model).remarks)


# -- techniques from outside ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Doubler(Technique):
    """Multiplies every linear's result by `factor`, with plain FX calls."""

    name: ClassVar[str] = "doubler"
    factor: float = 2.0

    def reference(self, model):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda m, a, out: out * self.factor)
        return model

    def rewrite(self, graph, context):
        for node in list(graph.nodes):
            if node.op == "call_function" and getattr(node.target, "__name__", "") == "linear" and context.covers(node):
                with graph.inserting_after(node):
                    scaled = graph.call_function(torch.mul, (node, self.factor))
                node.replace_all_uses_with(scaled, delete_user_cb=lambda user, new=scaled: user is not new)
                context.applied(node, "doubled")


def test_a_technique_from_outside_works_everywhere(eager_lowering):
    model = TINY["handwritten"]()
    expected = fxopt.reference(model, Doubler(3.0))(IDS)
    assert torch.equal(fxopt.compile(model, Doubler(3.0))(IDS), expected)
    assert fxopt.report(model).count("doubler") == 13
    options = {"doubler": {"factor": 3.0}}
    assert torch.equal(torch.compile(TINY["handwritten"](), backend="fxopt", options=options)(IDS), expected)
    decorated = Doubler(3.0)(TINY["handwritten"]())
    assert torch.equal(torch.compile(decorated, backend="fxopt")(IDS), expected)
    part = fxopt.compile(TINY["handwritten"](), {"layers.0": Doubler(3.0)})
    part(IDS)
    assert fxopt.report(part).count("doubler") == 4


@dataclasses.dataclass(frozen=True)
class Faulty(Technique):
    name: ClassVar[str] = "faulty"

    def rewrite(self, graph, context):
        for node in reversed(list(graph.nodes)):
            if not node.users and node.op == "call_function":
                graph.erase_node(node)
        next(n for n in graph.nodes if n.op == "call_function").replace_all_uses_with(next(iter(graph.nodes)))
        raise RuntimeError("something went wrong half-way")


def test_a_technique_that_raises_leaves_the_model_as_it_was(eager_lowering):
    model = TINY["handwritten"]()
    expected = model(IDS)
    fxopt.compile(model, Faulty())
    with pytest.warns(UserWarning, match=r"pass 'faulty' failed.*disable=\('faulty',\)"):
        assert torch.equal(model(IDS), expected)
    assert [r.code for r in fxopt.report(model).remarks if r.technique == "faulty"] == ["FX901"]
    strict = fxopt.compile(TINY["handwritten"](), Faulty(), strict=True)
    with pytest.raises(Exception, match="half-way"):
        strict(IDS)


def test_a_decorated_module_that_never_runs_leaves_the_rest_alone(eager_lowering):
    model = TINY["handwritten"]()
    model.unused = LayerSkip(skip=(0,))(nn.Sequential(HandwrittenLayer(64, 4), HandwrittenLayer(64, 4)))
    expected = model(IDS)
    assert torch.equal(fxopt.compile(model)(IDS), expected)
    assert fxopt.report(model).count("layer_skip") == 0


def test_a_misspelt_field_of_a_constructor():
    with pytest.raises(SettingError, match=r"LayerSkip has no field 'skp'; it has skip, .* Did you mean 'skip'"):
        LayerSkip(skp=(1,))


def test_a_technique_with_an_init_of_its_own_says_itself_what_it_takes():
    class Own(LayerSkip):
        name = "own_init_for_a_test"

        def __init__(self, layers):
            super().__init__(skip=layers)

    try:
        assert Own(layers=(1,)).skip == (1,)
    finally:
        del LayerSkip.registry["own_init_for_a_test"]
