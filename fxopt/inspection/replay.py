"""Run a model's captured graphs with any selection of passes, as FX or by Inductor, and watch their values."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxopt.backend import describe, own_module, run_passes
from fxopt.codegen import compat, post_grad
from fxopt.options import Settings
from fxopt.passes import order
from fxopt.passes.provenance import node_id, number_nodes
from fxopt.passes.record import GraphRecord, Recorder


class Only(Settings):
    """Settings of which only some passes act."""

    allowed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, settings: Settings, allowed: frozenset[str]) -> Only:
        """`settings`, of which only the passes in `allowed` act."""
        made = cls(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(Settings)})
        object.__setattr__(made, "allowed", allowed)
        return made

    def reach(self, name: str, graph: fx.Graph) -> Any:
        return super().reach(name, graph) if name in self.allowed else []


Runner = Callable[..., Any]


class Replay:
    """A backend that runs each captured graph with the passes in ``allowed``, as FX, without Inductor."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.allowed: frozenset[str] = frozenset()
        self.names: list[str] = []
        self.graphs: list[Captured] = []
        self.watching = False
        """Keep the values that the nodes have as FX."""
        self.compiling = False
        """Run by Inductor, and keep the values that the nodes have then."""

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Runner:
        captured = Captured(gm, self)
        self.graphs.append(captured)
        reached = {n for n in order.names() if n not in self.settings.disable and self.settings.reach(n, gm.graph)}
        self.names = [n for n in order.names() if n in reached | set(self.names)]
        return captured

    def acted(self, name: str) -> bool:
        """Whether a pass changed any graph in the present setting."""
        return any(
            not stage.is_noop for g in self.graphs if self.allowed in g.stages
            for stage in g.stages[self.allowed].record.stages[1:] if stage.name == name
        )  # fmt: skip


@dataclass
class _Stage:
    module: fx.GraphModule
    record: GraphRecord
    wrappers: list[Any]
    patches: dict[str, Any]


class Captured:
    """One captured graph, and the forms that passes give it, made when they are first run."""

    def __init__(self, gm: fx.GraphModule, replay: Replay) -> None:
        number_nodes(gm.graph)
        self.module = gm
        self.replay = replay
        self.stages: dict[frozenset[str], _Stage] = {}
        self.values: dict[frozenset[str], dict[int, Tensor]] = {}
        self.compiled_values: dict[int, Tensor] = {}

    def stage(self, allowed: frozenset[str]) -> _Stage:
        if allowed not in self.stages:
            settings = Only.of(self.replay.settings, allowed)
            gm = fx.GraphModule(self.module, copy.deepcopy(self.module.graph))
            record = GraphRecord(0, "-", "")
            describe(record, gm)
            recorder = Recorder(record, "1")
            recorder.stage("captured", gm.graph, level="torch", seconds=0.0)
            gm, wrappers, patches = run_passes(gm, record, recorder, settings)
            self.stages[allowed] = _Stage(gm, record, wrappers, patches)
        return self.stages[allowed]

    def __call__(self, *inputs: Any) -> Any:
        stage = self.stage(self.replay.allowed)
        run: Runner = stage.module.forward
        if self.replay.compiling:
            run = self._compiled(stage)
        elif self.replay.watching:
            watch = _Watch(stage.module)
            self.values[self.replay.allowed] = watch.values
            run = watch.run
        for wrap in stage.wrappers:
            run = wrap(run)
        return run(*inputs)


    def _compiled(self, stage: _Stage) -> Runner:
        """The stage as Inductor compiles it when every value that it computes is asked for besides."""

        def run(*inputs: Any) -> Any:
            gm = own_module(stage.module)
            output = gm.graph.output_node()
            own = output.args[0]
            assert isinstance(own, (tuple, list))
            watched = [n for n in gm.graph.nodes if is_watched(n) and isinstance(n.meta.get("example_value"), Tensor)]
            output.args = ((*own, *watched),)
            gm.recompile()
            patches = {**stage.patches, **post_grad.patches(gm)}
            result = compat.compile_with_inductor(gm, list(inputs), self.replay.settings.mode, patches)(*inputs)
            values = zip(watched, result[len(own) :], strict=True)
            self.compiled_values = {node_id(n): v.detach().clone() for n, v in values if isinstance(v, Tensor)}
            return tuple(result[: len(own)])

        return run


def is_watched(node: fx.Node) -> bool:
    """Whether a node computes a value of its own: not what it writes in place, which is another value later on."""
    return node.op == "call_function" or (node.op == "call_method" and not str(node.target).endswith("_"))


class _Watch(fx.Interpreter):
    """Keeps the value of every node that is a tensor, by node id."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[int, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op not in ("placeholder", "get_attr"):
            self.values[node_id(n)] = value.detach().clone()
        return value
