"""Epilogues: a DAG of pointwise FX nodes behind one or more matrix products, as data, as torch and as Triton source.

The products are `[..., N]` in the graph and `[M, N]` here, M being the product of the leading dimensions. Values are
float32 inside the kernel; only an explicit cast rounds, as Inductor does it. A prologue is the same before the products
and may hold one row statistic.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.pointwise import OPERATIONS, spelling
from fxopt.codegen.kernels.row_statistic import REDUCING, REDUCTIONS, SPREADING, add_statistic

_VIEWS = {"to", "float", "half", "bfloat16", "type", "type_as", "dropout", "alpha_dropout", "contiguous", "detach"}
"""Nodes that may give their input itself."""
Layout = Literal["full", "column", "row", "scalar"]
FLOATS = {torch.float16, torch.bfloat16, torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` to `"float16"`, which is Triton's name too."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Extra:
    """A tensor the epilogue reads besides the products: full `[M, N]`, column `[N]`, row `[M]` or scalar `[]`."""

    name: str
    layout: Layout
    dtype: str


@dataclass(frozen=True)
class Step:
    """`name = op(*args)`: an argument is the name of an earlier value, or a number. `cast` carries its dtype."""

    name: str
    op: str
    args: tuple[str | float, ...]
    origin: str
    dtype: str = ""


@dataclass(frozen=True)
class Output:
    """A value that is written, `[M, N]`."""

    value: str
    dtype: str


@dataclass(frozen=True)
class Segment:
    """Products that one program must hold together, because an output depends on all of them."""

    products: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Epilogue:
    """What happens to the products `p0, p1, ...` before they are stored."""

    products: int
    outputs: tuple[Output, ...]
    steps: tuple[Step, ...] = ()
    extras: tuple[Extra, ...] = ()

    @staticmethod
    def plain(products: int, dtype: torch.dtype, biased: bool = False) -> Epilogue:
        """Stores each product in `dtype`, after adding a bias `[N]` to each when `biased`."""
        name = dtype_name(dtype)
        if not biased:
            return Epilogue(products, tuple(Output(f"p{i}", name) for i in range(products)))
        return Epilogue(
            products,
            tuple(Output(f"s{i}", name) for i in range(products)),
            tuple(Step(f"s{i}", "add", (f"p{i}", f"e{i}"), "bias") for i in range(products)),
            tuple(Extra(f"e{i}", "column", name) for i in range(products)),
        )

    def reach(self, output: int) -> set[str]:
        """Names of products, extras and steps that output number `output` depends on."""
        return self.needed(self.outputs[output].value)

    def needed(self, value: str, given: Collection[str] = ()) -> set[str]:
        """Names of products, extras and steps that `value` depends on, itself included, as far as what is `given`."""
        sources = {s.name: [a for a in s.args if isinstance(a, str)] for s in self.steps if s.name not in given}
        found: set[str] = set()
        waiting = [value]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting.extend(sources.get(name, ()))
        return found

    @property
    def statistic(self) -> Step | None:
        """The row statistic among the steps, None without one.

        Raises:
            Unsupported: two of them.
        """
        found = [step for step in self.steps if step.op in REDUCTIONS]
        if len(found) > 1:
            names = " and ".join(f"{step.op} ({step.origin})" for step in found)
            raise Unsupported(f"{len(found)} row statistics, {names}; a kernel computes one")
        return found[0] if found else None

    def segments(self) -> tuple[Segment, ...]:
        """Outputs grouped so that groups share no product, in the order of their first product.

        Raises:
            Unsupported: a product that no output needs, or an output that needs no product.
        """
        groups: list[tuple[set[int], list[int]]] = []
        for index in range(len(self.outputs)):
            members = {i for i in range(self.products) if f"p{i}" in self.reach(index)}
            if not members:
                raise Unsupported(f"output {index} of the epilogue depends on no product")
            joined = [index]
            for group in [g for g in groups if g[0] & members]:
                groups.remove(group)
                members |= group[0]
                joined = group[1] + joined
            groups.append((members, sorted(joined)))
        unused = set(range(self.products)) - set().union(*(group[0] for group in groups))
        if unused:
            raise Unsupported(f"products {sorted(unused)} feed no output of the epilogue")
        groups.sort(key=lambda group: min(group[0]))
        return tuple(Segment(tuple(sorted(members)), tuple(outputs)) for members, outputs in groups)

    def encode(self) -> str:
        """A JSON string; `decode` gives the epilogue back."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def decode(text: str) -> Epilogue:
        data = json.loads(text)
        return Epilogue(
            data["products"],
            tuple(Output(**item) for item in data["outputs"]),
            tuple(Step(**{**item, "args": tuple(item["args"])}) for item in data["steps"]),
            tuple(Extra(**item) for item in data["extras"]),
        )

    def evaluate(
        self, products: Sequence[torch.Tensor], extras: Sequence[torch.Tensor], exact: bool = False
    ) -> list[torch.Tensor]:
        """The meaning in plain PyTorch: products `[M, N]` and extras in order to outputs `[M, N]`.

        With `exact`, casts between floating dtypes are left out, which makes a float64 reference of float64 inputs.
        """
        values: dict[str, Any] = {f"p{i}": product for i, product in enumerate(products)}
        for extra, tensor in zip(self.extras, extras, strict=True):
            rows = tensor.reshape(-1, 1) if extra.layout == "row" else tensor
            values[extra.name] = rows.reshape(()) if extra.layout == "scalar" else rows
        for step in self.steps:
            arguments = [values[a] if isinstance(a, str) else a for a in step.args]
            if step.op == "cast":
                keeps = exact and arguments[0].is_floating_point()  # type: ignore[union-attr]
                values[step.name] = arguments[0] if keeps else arguments[0].to(getattr(torch, step.dtype))  # type: ignore[union-attr]
            elif step.op in REDUCTIONS:
                values[step.name] = REDUCTIONS[step.op].torch(*arguments)
            else:
                values[step.name] = OPERATIONS[step.op].torch(*arguments)
        return [values[o.value] if exact else values[o.value].to(getattr(torch, o.dtype)) for o in self.outputs]


def _tensor(node: fx.Node) -> torch.Tensor:
    value = node.meta.get("example_value", node.meta.get("val"))
    if not isinstance(value, torch.Tensor):
        raise Unsupported(f"{node.name} carries no example tensor")
    return value


def _same(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


class _Reader:
    """Walks back from the outputs to the products and collects steps and extras."""

    def __init__(self, products: Sequence[fx.Node], within: Collection[fx.Node] | None) -> None:
        self.before = within is not None
        self.known: dict[tuple[str, str, str], str] = {}
        self.products = {node: f"p{i}" for i, node in enumerate(products)}
        self.names: dict[fx.Node, str] = dict(self.products)
        self.truths: set[str] = set()
        self.steps: list[Step] = []
        self.extras: list[Extra] = []
        self.extra_nodes: list[fx.Node] = []
        self.batch = tuple(_tensor(products[0]).shape[:-1])
        self.behind = self._downstream(within)
        for node in products:
            shape = _tensor(node).shape
            if len(shape) - 1 != len(self.batch) or not all(map(_same, shape[:-1], self.batch)):
                raise Unsupported(f"{node.name} has other leading dimensions than {products[0].name}")

    def _downstream(self, within: Collection[fx.Node] | None) -> set[fx.Node]:
        found = set(self.products)
        for node in next(iter(self.products)).graph.nodes if within is None else sorted(within):
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def add_step(self, op: str, args: Sequence[str | float], origin: str, dtype: str = "") -> str:
        name = f"s{len(self.steps)}"
        if self.before:  # equal statistics count as one, whatever leads to them
            name = self.known.setdefault((op, str(tuple(args)), dtype), name)
            if name != f"s{len(self.steps)}":
                return name
        pointwise = OPERATIONS.get(op)
        expected = pointwise.takes_boolean if pointwise is not None else ()
        for position, argument in enumerate(args):
            if op != "cast" and (argument in self.truths) != (position in expected):
                raise Unsupported(f"{origin}: argument {position} of {op} mixes truth values and numbers")
        self.steps.append(Step(name, op, tuple(args), origin, dtype))
        if pointwise is not None and pointwise.boolean:
            self.truths.add(name)
        return name

    def add_extra(self, node: fx.Node, layout: Layout | None = None) -> str:
        value = _tensor(node)
        if value.dtype not in FLOATS and value.dtype is not torch.bool:
            raise Unsupported(f"{node.name} is {dtype_name(value.dtype)}; an epilogue reads floats and truth values")
        name = f"e{len(self.extras)}"
        self.extras.append(Extra(name, layout or self._layout(node), dtype_name(value.dtype)))
        self.extra_nodes.append(node)
        self.names[node] = name
        if value.dtype is torch.bool:
            self.truths.add(name)
        return name

    def _layout(self, node: fx.Node) -> Layout:
        shape = tuple(_tensor(node).shape)
        if len(shape) > len(self.batch) + 1:
            raise Unsupported(f"{node.name} has more dimensions than the product it meets")
        padded = (1,) * (len(self.batch) + 1 - len(shape)) + shape
        wide = not _same(padded[-1], 1)
        if all(_same(size, 1) for size in padded[:-1]):
            return "column" if wide else "scalar"
        if all(map(_same, padded[:-1], self.batch)):
            return "full" if wide else "row"
        raise Unsupported(f"{node.name} of shape {tuple(shape)} broadcasts over some leading dimensions only")

    def value(self, node: fx.Node) -> str:
        """The name of what `node` computes, adding whatever it needs; iterative, since residual chains are long."""
        stack = [node]
        while stack:
            top = stack[-1]
            pending = [n for n in top.all_input_nodes if n not in self.names] if top in self.behind else []
            if top in self.names:
                stack.pop()
            elif pending:
                stack.extend(pending)
            elif top in self.behind:
                self.names[top] = self._step_of(top)
                stack.pop()
            else:
                self.add_extra(top)
                stack.pop()
        return self.names[node]

    def _step_of(self, node: fx.Node) -> str:
        value = _tensor(node)
        if value.dtype not in FLOATS and value.dtype is not torch.bool:
            raise Unsupported(f"{node.name} computes in {dtype_name(value.dtype)}")
        if node.op not in ("call_function", "call_method"):
            raise Unsupported(f"{node.name} is a {node.op}, not a pointwise operation")
        name = spelling(node.target)
        if self.before and name in REDUCING:
            return add_statistic(self, node, str(name), self.names, _origin(node))
        if len(value.shape) != len(self.batch) + 1 or not all(map(_same, value.shape[:-1], self.batch)):
            raise Unsupported(f"{node.name} of shape {tuple(value.shape)} is larger than the product it starts from")
        if self.before and name in SPREADING:
            return self.names[node.args[0]]  # type: ignore[index]
        arguments = [self._argument(node, a) for a in node.args if a is not None or name in ("clamp", "to")]
        return _translate(self, node, name, arguments)

    def owns(self, node: Any) -> bool:
        """Whether nobody but its one reader sees what is written to `node`, or to the memory that it is a view of."""
        while isinstance(node, fx.Node) and node in self.behind and len(node.users) == 1:
            if node in self.products:
                return not self.before  # before the products it is memory of somebody else
            if spelling(node.target) not in _VIEWS | SPREADING:
                return True
            node = node.args[0]
        return False

    def _argument(self, node: fx.Node, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.names[argument]
        if isinstance(argument, (bool, int, float)):
            return float(argument)
        if argument is None or isinstance(argument, (torch.dtype, str)):
            return argument
        raise Unsupported(f"{node.name} has an argument {argument!r} that is neither tensor nor number")


def _origin(node: fx.Node) -> str:
    # Without the counter, thirty-two layers give one epilogue, one kernel and one compilation.
    return re.sub(r"(_\d+)+$", "", node.name)


def _translate(reader: _Reader, node: fx.Node, name: str | None, args: list[Any]) -> str:
    kwargs = {key: value for key, value in node.kwargs.items() if value is not None and value is not False}
    origin = _origin(node)

    def refuse(why: str, argument: bool = False) -> Unsupported:
        return Unsupported(f"{node.name}: {why}", argument=argument)

    if name in ("to", "float", "half", "bfloat16", "type_as", "type"):
        allowed = {"dtype"}
        if set(kwargs) - allowed or any(isinstance(a, str) for a in node.args[1:]):
            raise refuse("a cast that also moves or copies")
        return reader.add_step("cast", args[:1], origin, dtype_name(_tensor(node).dtype))
    if name in ("iadd", "imul"):
        if not reader.owns(node.args[0]):
            raise refuse("an in-place update of a value that others read")
        name = name[1:]
    if name in ("dropout", "alpha_dropout", "contiguous", "clone", "detach"):
        if name.endswith("dropout") and node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True):
            raise refuse("dropout in training")
        return args[0]
    if name in ("add", "sub", "rsub") and "alpha" in kwargs:
        args[1] = reader.add_step("mul", [args[1], float(kwargs.pop("alpha"))], origin)  # type: ignore[arg-type]
    if name == "rsub":
        name, args = "sub", args[::-1]
    if name == "gelu":
        how = kwargs.pop("approximate", args[1] if len(args) > 1 else "none")
        name, args = ("gelu_tanh" if how == "tanh" else "gelu"), args[:1]
    if name == "leaky_relu":
        args = [args[0], kwargs.pop("negative_slope", args[1] if len(args) > 1 else 0.01)]
    if name == "pow":
        if len(args) != 2 or isinstance(args[1], str):
            raise refuse("a power whose exponent is a tensor")
        powers = {2.0: "square", 3.0: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
        if args[1] not in powers:
            raise refuse(f"a power of {args[1]}")
        name, args = powers[args[1]], args[:1]
    if name in ("clamp", "hardtanh", "relu6"):
        low = kwargs.pop("min", kwargs.pop("min_val", args[1] if len(args) > 1 else None))
        high = kwargs.pop("max", kwargs.pop("max_val", args[2] if len(args) > 2 else None))
        if name != "clamp":
            low, high = (0.0, 6.0) if name == "relu6" else (-1.0 if low is None else low, 1.0 if high is None else high)
        if any(isinstance(bound, fx.Node) for bound in (low, high)):
            raise refuse("bounds that are tensors")
        result = args[0]
        for op, bound in (("clamp_min", low), ("clamp_max", high)):
            result = result if bound is None else reader.add_step(op, [result, bound], origin)  # type: ignore[list-item]
        return result
    if name not in OPERATIONS:
        raise refuse(f"{node.target} is not a pointwise operation that an epilogue can hold")
    if kwargs:
        given = ", ".join(f"{key}={value}" for key, value in kwargs.items())
        raise refuse(f"expected {name} without {', '.join(kwargs)}, found {given}", argument=True)
    if len(args) != OPERATIONS[name].arity:
        raise refuse(f"{name} takes {OPERATIONS[name].arity} arguments here, got {len(args)}")
    return reader.add_step(name, args, origin)


def from_nodes(
    products: Sequence[fx.Node], outputs: Sequence[fx.Node], within: Collection[fx.Node] | None = None
) -> tuple[Epilogue, list[fx.Node]]:
    """Reads the epilogue between `products` (linears, their bias included) and `outputs` from an FX graph.

    Every node must carry `example_value` or `val`. Returns the epilogue and, for each of its extras, the node that
    feeds it. A node between a product and an output that is not pointwise, an intermediate broadcast beyond the
    product's shape, or a dtype that is neither float nor bool is refused. `within`, the only nodes to read, makes it a
    prologue: the one of `products` is then any node, its third argument is no bias, and row statistics are read.

    Raises:
        Unsupported: with the first thing that did not fit.
    """
    reader = _Reader(products, within)
    for index, node in enumerate(() if reader.before else products):
        bias = node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None)
        if isinstance(bias, fx.Node):
            reader.names[node] = reader.add_step("add", [f"p{index}", reader.add_extra(bias, "column")], "bias")
    written = [Output(reader.value(node), dtype_name(_tensor(node).dtype)) for node in outputs]
    for node, output in zip(outputs, written, strict=True):
        if output.value in reader.truths:
            raise Unsupported(f"{node.name} would store truth values")
    # A tensor that only lends its dtype, as in type_as, is not read.
    needed: set[str] = set().union(*(Epilogue(0, (o,), tuple(reader.steps)).reach(0) for o in written))
    kept = [(e, n) for e, n in zip(reader.extras, reader.extra_nodes, strict=True) if e.name in needed]
    steps = tuple(step for step in reader.steps if step.name in needed)
    return Epilogue(len(products), tuple(written), steps, tuple(e for e, _ in kept)), [n for _, n in kept]
