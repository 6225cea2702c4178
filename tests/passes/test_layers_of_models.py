"""Finding layers in Hugging Face models: exact counts, and skips against models with the layer deleted or silenced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import fx, nn

from fxopt.passes.layers import Layer, Structure, find_layers, module_path
from fxopt.testing import TINY, capture_generate, inputs_for

pytest.importorskip("transformers")

SELF = ["attention", "mlp"]
CROSS = ["attention", "attention", "mlp"]
GATED = {"model.layers": (3, ["self_attn.o_proj", "mlp.down_proj"])}
EXPERTS = {"model.layers": (3, ["self_attn.o_proj", "mlp.experts.down_proj"])}
BERT = ["attention.output.dense", "output.dense"]

# Name: stacks in the order they run, each with its number of layers and, part by part, what to zero to silence it.
MODELS: dict[str, dict[str, tuple[int, list[str]]]] = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "mistral": GATED,
    "gemma2": GATED,
    "gemma3_text": {"model.layers": (4, ["self_attn.o_proj", "mlp.down_proj"])},
    "phi3": GATED,
    "gpt2": {"transformer.h": (3, ["attn.c_proj", "mlp.c_proj"])},
    "gpt_neox": {"gpt_neox.layers": (3, ["attention.dense", "mlp.dense_4h_to_h"])},
    "opt": {"model.decoder.layers": (3, ["self_attn.out_proj", "fc2"])},
    "falcon": {"transformer.h": (3, ["self_attention.dense", "mlp.dense_4h_to_h"])},
    "mixtral": EXPERTS,
    "bert": {"bert.encoder.layer": (3, BERT)},
    "roberta": {"roberta.encoder.layer": (3, BERT)},
    "vit": {"vit.layers": (3, ["attention.o_proj", "mlp.fc2"])},
    "t5": {
        "encoder.block": (3, ["layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"]),
        "decoder.block": (3, ["layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"]),
    },
    "bart": {
        "model.encoder.layers": (2, ["self_attn.out_proj", "fc2"]),
        "model.decoder.layers": (3, ["self_attn.out_proj", "encoder_attn.out_proj", "fc2"]),
    },
    "gpt_oss": EXPERTS,
    "handwritten": {"layers": (3, ["proj", "down"])},
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@cache
def tiny(name: str) -> nn.Module:
    return TINY[name]()


def output_of(result) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result.logits


def skip_layer(graph: fx.Graph, layer: Layer) -> None:
    """Replace a layer's output by its input and erase what nobody reads any more."""
    layer.output.replace_all_uses_with(layer.input)
    for node in reversed(layer.nodes):
        if not node.users:
            graph.erase_node(node)


class Variants:
    """Compile a model once and run several rewritten copies of its graph."""

    def __init__(self, name: str) -> None:
        self.model, self.inputs = tiny(name), inputs_for(name, tiny(name))
        self.graphs: list[fx.GraphModule] = []
        self.running: fx.GraphModule | None = None
        torch._dynamo.reset()
        self.compiled = torch.compile(self.model, backend=self._backend)
        with torch.no_grad():
            self.unchanged = output_of(self.compiled(**self.inputs))

    def _backend(self, module: fx.GraphModule, _inputs, **_) -> Callable:
        self.graphs.append(module)
        self.running = module
        return lambda *args: self.running(*args)

    @property
    def structure(self) -> Structure:
        return find_layers(self.graphs[0].graph)

    def run(self, edit: Callable[[fx.Graph, Structure], None]) -> torch.Tensor:
        module = fx.GraphModule(self.graphs[0], copy.deepcopy(self.graphs[0].graph))
        edit(module.graph, find_layers(module.graph))
        module.graph.lint()
        module.recompile()
        self.running = module
        with torch.no_grad():
            return output_of(self.compiled(**self.inputs))

    def eager(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return output_of(model(**self.inputs))


def without_layer(model: nn.Module, path: str, index: int) -> nn.Module:
    """`model` with one layer deleted from its ModuleList, and its entries deleted from the config."""
    model = copy.deepcopy(model)
    layers = model.get_submodule(path)
    removed = layers[index]
    config = getattr(model, "config", None)
    if config is not None and not config.is_encoder_decoder:
        for key, entry in list(vars(config).items()):
            if isinstance(entry, list) and len(entry) == len(layers):
                setattr(config, key, entry[:index] + entry[index + 1 :])
        config.num_hidden_layers = len(layers) - 1
    del layers[index]
    attention = getattr(getattr(removed, "layer", [None])[0], "SelfAttention", None)
    if getattr(attention, "has_relative_attention_bias", False):
        # T5 computes the position bias of all layers in its first one.
        heir = layers[0].layer[0].SelfAttention
        heir.has_relative_attention_bias = True
        heir.relative_attention_bias = attention.relative_attention_bias
    return model


def with_silent_part(model: nn.Module, layer_path: str, projection: str) -> nn.Module:
    """`model` with the last projection of one part set to zero."""
    model = copy.deepcopy(model)
    zeroed = [p for n, p in model.named_parameters() if n.startswith(f"{layer_path}.{projection}")]
    assert zeroed
    with torch.no_grad():
        for parameter in zeroed:
            parameter.zero_()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    variants = Variants(name)
    assert len(variants.graphs) == 1
    found = variants.structure
    assert [(s.path, len(s.layers)) for s in found.stacks] == [(p, n) for p, (n, _) in MODELS[name].items()]
    assert found.rejected == ()
    close = {"rtol": 2e-5, "atol": 2e-5}
    for number, (path, (_, projections)) in enumerate(MODELS[name].items()):
        stack = found.stacks[number]
        assert_stack(variants.graphs[0].graph, stack, len(projections))
        for index, layer in enumerate(stack.layers):

            def skip(graph, structure, number=number, index=index):
                gone = structure.stacks[number].layers[index]
                skip_layer(graph, gone)
                assert_weights_unread(graph, gone)

            expected = variants.eager(without_layer(variants.model, path, index))
            torch.testing.assert_close(variants.run(skip), expected, **close, msg=lambda m, p=layer.path: f"{p}: {m}")
            assert not torch.allclose(expected, variants.unchanged, atol=1e-3)
        for part, projection in enumerate(projections):

            def silence(graph, structure, number=number, part=part):
                chosen = structure.stacks[number].layers[1].parts[part]
                chosen.add.replace_all_uses_with(chosen.stream)
                graph.erase_node(chosen.add)

            expected = variants.eager(with_silent_part(variants.model, stack.layers[1].path, projection))
            torch.testing.assert_close(variants.run(silence), expected, **close)
    torch._dynamo.reset()


def assert_stack(graph: fx.Graph, stack, parts: int) -> None:
    for index, layer in enumerate(stack.layers):
        assert (layer.index, layer.path, layer.call) == (index, f"{stack.path}.{index}", 0)
        assert [part.kind for part in layer.parts] == (SELF if parts == 2 else CROSS)
        assert layer.input not in layer.nodes
        assert layer.output in layer.nodes
        inside = [n for n in graph.nodes if n.op != "placeholder" and f"{module_path(n)}.".startswith(f"{layer.path}.")]
        assert list(layer.nodes) == inside
    for before, after in zip(stack.layers, stack.layers[1:], strict=False):
        assert before.output is after.input


def assert_weights_unread(graph: fx.Graph, layer: Layer) -> None:
    weights = [n for n in graph.nodes if n.op == "placeholder" and module_path(n).startswith(f"{layer.path}.")]
    read = [n.name for n in weights if n.users]
    assert weights
    assert all("relative_attention_bias" in n for n in read)


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *((name, cache) for name in ("llama", "gemma3_text", "gpt2") for cache in ("static", "dynamic")),
        ("bart", "dynamic"),
        ("gpt_oss", "static"),
    ],
)
def test_prompt_and_decode_graphs(name, cache):
    model = tiny(name)
    graphs = capture_generate(model, inputs_for(name, model)["input_ids"], cache=cache, new_tokens=3)
    assert len(graphs) >= 2
    path, (count, projections) = list(MODELS[name].items())[-1]
    for module in graphs:
        found = find_layers(module.graph)
        assert [(stack.path, len(stack.layers)) for stack in found.stacks] == [(path, count)]
        assert_stack(module.graph, found.stacks[0], len(projections))
        writes = [n for n in module.graph.nodes if n.target == "index_copy_"]
        assert bool(writes) == (cache == "static")
        assert all(found.layer_of(node) is not None for node in writes)
    (stack,) = find_layers(graphs[-1].graph).stacks
    assert stack.layers[0].input.meta["example_value"].shape[1] == 1
    if (name, cache) == ("llama", "static"):
        for layer in stack.layers:
            targets = [node.target for node in layer.nodes if node.op == "call_method"]
            assert (targets.count("index_copy_"), targets.count("add_")) == (2, 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit"])
def test_one_layer_compiled_on_its_own(name):
    model = tiny(name)
    found: list[Structure] = []

    def backend(module, _inputs, **_):
        found.append(find_layers(module.graph))
        return module.forward

    path = next(iter(MODELS[name]))
    layer = model.get_submodule(path)[1]
    torch._dynamo.reset()
    layer.compile(backend=backend)
    try:
        with torch.no_grad():
            model(**inputs_for(name, model))
    finally:
        layer._compiled_call_impl = None
        torch._dynamo.reset()
    assert [[part.kind for part in layer.parts] for one in found for layer in one.layers()] == [SELF]
    assert [stack.path for one in found for stack in one.stacks] == [""]


def test_training_graph():
    model = copy.deepcopy(tiny("gpt2")).train()
    (module,) = _capture(model, grad=True)
    (stack,) = find_layers(module.graph).stacks
    assert_stack(module.graph, stack, 2)


def _capture(model: nn.Module, **options) -> list[fx.GraphModule]:
    from fxopt.testing import capture

    return capture(model, input_ids=torch.arange(3, 15).view(2, 6), use_cache=False, **options)
