"""Finding layers in hand-written models: what must match, what must not, and what the fields mean."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fxopt.passes.layers import Structure, find_layers, module_path, source_line
from fxopt.testing import Handwritten, HandwrittenLayer, capture

WIDTH = 32
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if memory is not None:
            _, k, v = self.qkv(memory).chunk(3, -1)
        return self.out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


class Mlp(nn.Sequential):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Block(nn.Module):
    """A pre-norm layer, or another arrangement of the same parts."""

    def __init__(self, style: str = "pre") -> None:
        super().__init__()
        self.style = style
        self.attention, self.mlp = Attention(), Mlp()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        if self.style == "post":
            x = self.norm1(x + F.dropout(self.attention(x), 0.1, self.training))
            return self.norm2(x + self.mlp(x))
        if self.style == "sandwich":
            x = x + self.norm1(self.attention(x))
            return x + self.norm2(self.mlp(x))
        if self.style == "parallel":
            return x + F.dropout(self.mlp(self.norm1(x)) + self.attention(self.norm1(x)), 0.1, self.training)
        if self.style == "parallel in turn":
            h = self.norm1(x)
            return x + self.attention(h) + self.mlp(h)
        if self.style == "in place":
            h = self.attention(self.norm1(x))
            h += x
            return self.mlp(self.norm2(h)).add_(h)
        if self.style == "flattened":
            h = (x + self.attention(self.norm1(x))).reshape(-1, WIDTH)
            return (h + self.mlp(self.norm2(h))).view(x.shape)
        if self.style == "scaled":
            x = x * 0.9 + 0.5 * self.attention(self.norm1(x))
            return torch.clamp(x + 0.5 * self.mlp(self.norm2(x)), -50, 50)
        if self.style == "cross":
            x = x + self.attention(self.norm1(x))
            x = x + self.attention(self.norm1(x), memory)
            return x + self.mlp(self.norm2(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Chain(nn.Module):
    """Embeds, runs a container in a loop, and projects. Takes features, or token ids."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.tokens = nn.Embedding(9, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) if x.is_floating_point() else self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def structure(model: nn.Module, *inputs: Tensor, **options) -> tuple[Structure, fx.GraphModule]:
    (module,) = capture(model, *(inputs or (X,)), **options)
    return find_layers(module.graph), module


def kinds(layer) -> list[str]:
    return [part.kind for part in layer.parts]


def assert_chained(found: Structure) -> None:
    for stack in found.stacks:
        for before, after in zip(stack.layers, stack.layers[1:], strict=False):
            assert before.output is after.input
        for layer in stack.layers:
            assert layer.output in layer.nodes
            assert layer.input not in layer.nodes
            assert all(node.op != "placeholder" for node in layer.nodes)


def with_edits(model: nn.Module, edit, *inputs: Tensor) -> Tensor:
    """Run `model` with its graph changed by ``edit(structure)``; dead pure nodes are removed."""

    def backend(module: fx.GraphModule, _inputs, **_):
        found = find_layers(module.graph)
        edit(found)
        remove_dead(module.graph, {n for layer in found.layers() for n in layer.nodes})
        module.graph.lint()
        module.recompile()
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(model, backend=backend)(*(inputs or (X,)))
    torch._dynamo.reset()
    return result


def remove_dead(graph: fx.Graph, nodes: set[fx.Node]) -> None:
    for node in reversed(graph.nodes):
        if node in nodes and not node.users:
            graph.erase_node(node)


STYLES = {
    "pre": ["attention", "mlp"],
    "post": ["attention", "mlp"],
    "sandwich": ["attention", "mlp"],
    "parallel": ["mlp", "attention"],
    "parallel in turn": ["attention", "mlp"],
    "in place": ["attention", "mlp"],
    "flattened": ["attention", "mlp"],
    "scaled": ["attention", "mlp"],
    "cross": ["attention", "attention", "mlp"],
}


@pytest.mark.parametrize("style", STYLES)
def test_arrangements_of_a_layer(style):
    model = Chain(*(Block(style) for _ in range(3))).eval()
    found, _ = structure(model)
    (stack,) = found.stacks
    assert stack.path == "blocks"
    assert [(layer.index, layer.path, layer.call) for layer in stack.layers] == [
        (i, f"blocks.{i}", 0) for i in range(3)
    ]
    assert [kinds(layer) for layer in stack.layers] == [STYLES[style]] * 3
    assert_chained(found)
    assert found.rejected == ()


@pytest.mark.parametrize("style", [style for style in STYLES if style != "cross"])
def test_skipping_a_part_is_zeroing_its_branch(style):
    model = Chain(*(Block(style) for _ in range(3))).eval()
    for kind in ("attention", "mlp"):
        zeroed = copy.deepcopy(model)
        out = zeroed.blocks[1].attention.out if kind == "attention" else zeroed.blocks[1].mlp[2]
        nn.init.zeros_(out.weight), nn.init.zeros_(out.bias)

        def skip(found: Structure, kind=kind) -> None:
            (part,) = (p for p in found.stacks[0].layers[1].parts if p.kind == kind)
            part.add.replace_all_uses_with(part.stream)

        torch.testing.assert_close(with_edits(model, skip), zeroed(X))
        assert not torch.allclose(model(X), zeroed(X), atol=1e-4)


@pytest.mark.parametrize("style", ["pre", "post", "parallel", "flattened"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_skipping_a_layer_is_deleting_its_module(style, index):
    model = Chain(*(Block(style) for _ in range(3))).eval()
    shorter = copy.deepcopy(model)
    del shorter.blocks[index]

    def skip(found: Structure) -> None:
        layer = found.stacks[0].layers[index]
        layer.output.replace_all_uses_with(layer.input)

    torch.testing.assert_close(with_edits(model, skip), shorter(X))


def test_eager_attention_right_after_the_embedding():
    found, _ = structure(Chain(Block("post"), Block("post")), torch.randint(0, 9, (2, 5)))
    assert [kinds(layer) for layer in found.stacks[0].layers] == [["attention", "mlp"]] * 2


def test_training_graph_with_dropout():
    found, _ = structure(Chain(*(Block("post") for _ in range(2))).train(), grad=True)
    assert [kinds(layer) for layer in found.stacks[0].layers] == [["attention", "mlp"]] * 2


def test_dynamic_shapes():
    (module,) = capture(Handwritten(), torch.randint(0, 128, (2, 9)), dynamic=True)
    found = find_layers(module.graph)
    (stack,) = found.stacks
    assert len(stack.layers) == 3
    assert any(isinstance(size, torch.SymInt) for size in stack.layers[0].input.meta["example_value"].shape)
    assert_chained(found)


def test_one_module_called_again_and_again():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.groups = nn.ModuleList([Block("post")])

        def forward(self, x):
            for _ in range(4):
                x = self.groups[0](x)
            return x * 2

    found, _ = structure(Shared())
    (stack,) = found.stacks
    assert [(layer.index, layer.call, layer.path) for layer in stack.layers] == [(i, i, "groups.0") for i in range(4)]
    assert_chained(found)


def test_two_modules_called_in_turn_twice():
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for _ in range(2):
                for block in self.blocks:
                    x = block(x)
            return x * 2

    found, _ = structure(Looped())
    (stack,) = found.stacks
    assert [(layer.index, layer.call) for layer in stack.layers] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert_chained(found)


def test_the_same_stack_on_two_inputs_is_two_chains():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = Chain(Block(), Block())

        def forward(self, x):
            return self.tower(x) - self.tower(x * 2)

    found, _ = structure(Siamese())
    assert [[(layer.index, layer.call) for layer in stack.layers] for stack in found.stacks] == [
        [(0, 0), (1, 0)],
        [(0, 1), (1, 1)],
    ]


def test_encoder_and_decoder_of_equal_shape():
    class EncoderDecoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.ModuleList(Block() for _ in range(2))
            self.decoder = nn.ModuleList(Block("cross") for _ in range(3))

        def forward(self, x):
            y = x * 2
            for block in self.encoder:
                x = block(x)
            memory = x.tanh()
            for block in self.decoder:
                y = block(y, memory)
            return y.sum(-1)

    found, _ = structure(EncoderDecoder())
    assert [(stack.path, len(stack.layers)) for stack in found.stacks] == [("encoder", 2), ("decoder", 3)]
    assert kinds(found.stacks[1].layers[2]) == ["attention", "attention", "mlp"]
    assert_chained(found)


def test_numbered_names_without_a_container():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.block_1, self.block_2 = Block(), Block()

        def forward(self, x):
            return self.block_2(self.block_1(x.tanh())).sum(-1)

    (stack,) = structure(Named())[0].stacks
    assert (stack.path, [layer.index for layer in stack.layers]) == ("block_*", [1, 2])


def test_sequential_with_other_members():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), Block(), Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))
    (stack,) = structure(model)[0].stacks
    assert [layer.path for layer in stack.layers] == ["1", "2", "3"]


def test_stream_changed_between_layers():
    class Injected(Chain):
        def forward(self, x):
            extra = x.sin()
            for block in self.blocks:
                x = block(x) + extra
            return x.sum(-1)

    found, _ = structure(Injected(Block(), Block(), Block()))
    (stack,) = found.stacks
    for before, after in zip(stack.layers, stack.layers[1:], strict=False):
        assert before.output in after.input.all_input_nodes


def test_hidden_states_as_outputs():
    class Returning(Chain):
        def forward(self, x):
            states = [x.tanh()]
            for block in self.blocks:
                states.append(block(states[-1]))
            return states

    found, module = structure(Returning(Block(), Block("post")))
    (stack,) = found.stacks
    assert_chained(found)
    assert module.graph.output_node().all_input_nodes == [
        *(layer.input for layer in stack.layers),
        stack.layers[-1].output,
    ]


def test_values_computed_in_one_layer_for_all():
    class Biased(Block):
        def __init__(self, first):
            super().__init__()
            self.first = first

        def forward(self, state):
            x, bias = state
            if self.first:
                bias = torch.relu(x.new_ones(5, 5)) * 0.1
            h = self.norm1(x)
            x = x + self.attention.out((h @ h.transpose(-1, -2) + bias).softmax(-1) @ h)
            return x + self.mlp(self.norm2(x)), bias

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Biased(i == 0) for i in range(3))

        def forward(self, x):
            state = (x.tanh(), None)
            for block in self.blocks:
                state = block(state)
            return state

    found, _ = structure(Model())
    assert [kinds(layer) for layer in found.stacks[0].layers] == [["attention", "mlp"]] * 3
    assert_chained(found)


# -- additions written in the loop of the parent ----------------------------------------------------------------------


class ListOfLists(nn.Module):
    """``for attention, mlp in layers: x = attention(norm(x)) + x; x = mlp(norm(x)) + x``."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), Mlp()]) for _ in range(depth)
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        for norm1, attention, norm2, mlp in self.layers:
            x = attention(norm1(x)) + x
            x = mlp(norm2(x)) + x
        return self.head(x)


class ParallelLists(nn.Module):
    """Attentions, MLPs and norms in a list each."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * depth))
        self.mlps = nn.ModuleList(Mlp() for _ in range(depth))
        self.attentions = nn.ModuleList(Attention() for _ in range(depth))
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        for i in range(self.depth):
            x = x + self.attentions[i](self.norms[2 * i](x))
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return x.sum(-1)


@pytest.mark.parametrize(("model", "path"), [(ListOfLists(), "layers"), (ParallelLists(), "attentions")])
def test_additions_in_the_loop_of_the_parent(model, path):
    found, _ = structure(model)
    (stack,) = found.stacks
    assert (stack.path, [layer.index for layer in stack.layers]) == (path, [0, 1, 2])
    assert [kinds(layer) for layer in stack.layers] == [["attention", "mlp"]] * 3
    assert_chained(found)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_skipping_in_the_loop_of_the_parent(index):
    model = ListOfLists()
    shorter = copy.deepcopy(model)
    del shorter.layers[index]

    def skip(found: Structure) -> None:
        layer = found.stacks[0].layers[index]
        layer.output.replace_all_uses_with(layer.input)

    torch.testing.assert_close(with_edits(model, skip), shorter(X))


# -- one layer on its own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["pre", "post", "parallel"])
def test_a_layer_compiled_on_its_own(style):
    found, module = structure(Block(style).eval())
    (stack,) = found.stacks
    (layer,) = stack.layers
    assert (stack.path, layer.path, layer.index) == ("", "", 0)
    assert sorted(kinds(layer)) == ["attention", "mlp"]
    assert layer.input.op == "placeholder"
    assert layer.output in module.graph.output_node().all_input_nodes


def test_layers_compiled_one_at_a_time():
    model = Handwritten()
    graphs = []

    def backend(module, _inputs, **_):
        graphs.append(find_layers(module.graph))
        return module.forward

    torch._dynamo.reset()
    for layer in model.layers:
        layer.compile(backend=backend)
    model(torch.randint(0, 128, (1, 6)))
    torch._dynamo.reset()
    assert graphs
    assert all([kinds(layer) for layer in found.layers()] == [["attention", "mlp"]] for found in graphs)


# -- what must not match ----------------------------------------------------------------------------------------------


def rejection(model: nn.Module, path: str, *inputs: Tensor):
    found, _ = structure(model, *inputs)
    (rejected,) = (r for r in found.rejected if r.path == path)
    assert path not in [stack.path for stack in found.stacks]
    return rejected, found


def test_convolutions_of_changing_width():
    model = nn.Sequential(nn.Conv1d(8, 16, 3), nn.Conv1d(16, 32, 3), nn.Conv1d(32, 32, 3))
    rejected, found = rejection(model, "", torch.randn(2, 8, 20))
    assert rejected.code == "FX110"
    assert "[2, 8, 20] to [2, 16, 18]" in rejected.reason
    assert not found.stacks


def test_list_of_heads():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x):
            return torch.stack([head(x) + x for head in self.heads])

    rejected, found = rejection(Heads(), "heads")
    assert rejected.code == "FX111"
    assert not found.stacks


def test_chained_without_residual():
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    rejected, found = rejection(model, "")
    assert rejected.code == "FX114"
    assert not found.stacks


class Mixture(nn.Module):
    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(Mlp() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * (expert(x) + x) for i, expert in enumerate(self.experts))


def test_experts_are_no_layers():
    blocks = [Block() for _ in range(3)]
    for block in blocks:
        block.mlp = Mixture()
    rejected, found = rejection(Chain(*blocks), "blocks.*.mlp.experts")
    assert rejected.code == "FX111"
    (stack,) = found.stacks
    assert [kinds(layer) for layer in stack.layers] == [["attention", "mlp"]] * 3


def test_a_graph_without_layers():
    found, _ = structure(nn.Linear(WIDTH, 3))
    assert found.stacks == ()
    assert [r.code for r in found.rejected] == ["FX112"]


def test_checkpointed_layers_are_named_as_the_cause():
    class Checkpointed(Chain):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x.sum(-1)

    found, _ = structure(Checkpointed(Block(), Block()), grad=True)
    (rejected,) = found.rejected
    assert rejected.code == "FX112"
    assert "checkpoint" in rejected.reason


def test_stages_of_changing_shape_with_layers_inside():
    class Stage(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.blocks = nn.ModuleList(HandwrittenLayer(width, 4) for _ in range(2))
            self.down = nn.Linear(width, 2 * width)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.down(x)

    found, _ = structure(nn.Sequential(Stage(WIDTH), Stage(2 * WIDTH)))
    assert [(stack.path, len(stack.layers)) for stack in found.stacks] == [("0.blocks", 2), ("1.blocks", 2)]
    assert [r.code for r in found.rejected] == ["FX110"]


# -- fields -----------------------------------------------------------------------------------------------------------


def test_nodes_hold_the_side_effects():
    class Caching(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(WIDTH))

        def forward(self, x):
            self.seen.add_(x.mean((0, 1)))
            return super().forward(x)

    found, module = structure(Chain(Caching(), Caching()))
    writes = [node for node in module.graph.nodes if node.target == "add_"]
    assert [found.layer_of(node).index for node in writes] == [0, 1]


def test_provenance_of_nodes():
    found, _ = structure(Chain(Block(), Block()))
    layer = found.stacks[0].layers[1]
    assert module_path(layer.output) == "blocks.1"
    assert "test_layers.py:" in source_line(layer.output)
    assert source_line(layer.output).endswith("in forward")


def test_text_for_the_report():
    found, _ = structure(Chain(Block(), Block()))
    assert str(found) == f"blocks: 2 layers, stream [2, 5, {WIDTH}], attention + mlp"
