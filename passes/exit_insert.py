"""Put the exits of one graph into it: a check after each of the layers, and a ``torch.cond`` for what follows.

Exits nest: what follows the second is a part of what follows the first. So every exit branch is outlined from the
graph as it stands, and the conditionals are inserted from the last exit to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt.codegen import compat
from fxopt.passes import cache_rows, depth
from fxopt.passes.compaction import compact
from fxopt.passes.context import PassContext
from fxopt.passes.exit_check import Check, Checker, Head
from fxopt.passes.exit_cost import ExitCost, exit_cost, weight_bytes
from fxopt.passes.exit_modules import OwnModules
from fxopt.passes.exit_region import RegionError, defer_writes, exit_nodes, find_region, insert_cond, outline
from fxopt.passes.frozen_attention import attend_for_rows_left
from fxopt.passes.layers import Layer, Stack
from fxopt.passes.rewriter import Rewriter

if TYPE_CHECKING:
    from fxopt.passes.early_exit import EarlyExit


def insert_exits(
    setting: EarlyExit, stack: Stack, head: Head | None, own: OwnModules, context: PassContext
) -> tuple[list[ExitCost], fx.Node]:
    """Insert every exit of `setting`; the cost of each, and the node ``[B]`` of the exits that rows took.

    Raises :class:`RegionError` for a graph that cannot be outlined; a first look finds most of these while nothing has
    been changed.
    """
    graph, rewriter, layers = context.graph, context.rewriter, stack.layers
    stream = [layers[0].input, *(layer.output for layer in layers)]
    steps = _steps(layers, stream)
    first = setting.layers[0]
    # Asked while the layers are as they were captured: writes that move and rows that are held hide them.
    cached = {index for index, layer in enumerate(layers) if cache_rows.new_rows(layer)}
    trial = find_region(graph, layers[first - 1].output, (), ())
    exit_nodes(trial, _identity(steps, first), layers)
    # Exits nest, and a cond inside a branch may not write in any version of torch: it is functionalised without the
    # mode that knows of writes ("cond_true might be modifying the input!").
    written = trial.effects and (len(setting.layers) > 1 or not compat.cond_may_write())
    late = defer_writes(graph, layers[first:], rewriter) if written else []
    sizes = [weight_bytes(layer.nodes) for layer in layers]
    checker = Checker(setting, stack, head, own, rewriter)
    checks: list[Check] = []
    within: set[fx.Node] = set()
    for number, n in enumerate(setting.layers):
        checks.append(checker.insert(number, stream[n], stream[n - 1], checks[-1] if checks else None))
        if setting.rows == "each":
            until = setting.layers[number + 1] if number + 1 < len(setting.layers) else len(layers)
            within |= _hold(range(n, until), cached, checks[-1].exited, stack, stream, steps, context)
    kept_logits = _keep_logits(setting, head, own, checker, checks, stream) if setting.rows == "each" else {}
    output = next(iter(graph.find_nodes(op="output")))
    output.args = ((*_results(output), checks[-1].level),)  # until the branches have joined
    costs, prepared = [], []
    for n, check in zip(setting.layers, checks, strict=True):
        alias = _identity(steps, n)
        temporary: list[fx.Node] = []
        if head is not None:
            logits = check.logits
            if n in own.heads and logits is None:
                logits, temporary = checker.full_logits(n, stream[n])
            if logits is not None:
                alias[head.logits] = logits
        for later, (merged, before) in kept_logits.items():
            if later > n:
                alias[merged] = before
        if check is not checks[-1]:
            alias[checks[-1].level] = check.level
        region = find_region(graph, stream[n], check.nodes, late, within)
        kept = exit_nodes(region, alias, layers)
        costs.append(exit_cost(n, layers, sizes, head, check, kept))
        prepared.append((region.results, outline(kept, region.results, alias)))
        rewriter.erase(temporary)  # of the branch alone
    # Innermost first: the conditional of a later exit becomes part of the run branch of the one before it.
    standing: dict[fx.Node, fx.Node] = {}
    for number in reversed(range(len(checks))):
        results, branch = prepared[number]
        region = find_region(graph, stream[setting.layers[number]], checks[number].nodes, late, within)
        now = [standing.get(r, r) for r in results]
        before = late[0] if late else output
        parts = insert_cond(region, now, checks[number].predicate, branch, rewriter, f"exit_{number}", before)
        standing.update(zip(results, parts, strict=True))
    *results_left, level = _results(output)
    output.args = (tuple(results_left),)
    return costs, level


def _keep_logits(
    setting: EarlyExit, head: Head | None, own: OwnModules, checker: Checker, checks: list[Check], stream: list[fx.Node]
) -> dict[int, tuple[fx.Node, fx.Node]]:
    """Let rows that left at an exit with a head of its own have that head's logits, whatever runs for others.

    A row that left by the model's own head needs nothing: that head, at the end, reads the state that was frozen.
    Returns, by exit, the merged logits and those before it was merged.
    """
    merged: dict[int, tuple[fx.Node, fx.Node]] = {}
    if head is None:
        return merged
    logits, rewriter = head.logits, checker.rewriter
    for number, n in enumerate(setting.layers):
        if n not in own.heads:
            continue
        check = checks[number]
        if check.logits is None:
            check.logits, made = checker.full_logits(n, stream[n])
            check.nodes += made
        put = checker.putting(head.logits, after=logits)
        newly = [check.exited, *([checks[number - 1].exited] if number else [])]
        shape = (-1, *[1] * (depth.value(head.logits).ndim - 1))

        def choose(mine: Any, others: Any, gone: Any, earlier: Any = None, shape: Any = shape) -> Any:
            rows = gone if earlier is None else torch.logical_and(gone, torch.logical_not(earlier))
            return torch.where(torch.reshape(rows, shape), mine, others)

        known = set(rewriter.graph.nodes)
        result = put(choose, [check.logits, logits, *newly])
        fresh = {node for node in rewriter.graph.nodes if node not in known}
        before = logits
        rewriter.replace(before, result, only=lambda user, fresh=fresh: user not in fresh)  # type: ignore[misc]
        merged[n] = (result, before)
        logits = result
    return merged


def _steps(layers: Sequence[Layer], stream: Sequence[fx.Node]) -> dict[int, tuple[int, fx.Node, fx.Node]]:
    """For the layer with each index: the index after what it is a step of, the stream before that and after it."""
    return {
        index: (
            index + 1,
            stream[index] if not index or layers[index].input is layers[index - 1].output else layers[index].input,
            stream[index + 1],
        )
        for index in range(len(layers))
    }  # fmt: skip


def _identity(steps: dict[int, tuple[int, fx.Node, fx.Node]], start: int) -> dict[fx.Node, fx.Node]:
    """Each layer from `start` on returns what it is given."""
    return {after: before for index, (_, before, after) in steps.items() if index >= start}


def _hold(
    indices: range, cached: set[int], exited: fx.Node, stack: Stack, stream: list[fx.Node],
    steps: dict[int, tuple[int, fx.Node, fx.Node]], context: PassContext,
) -> set[fx.Node]:  # fmt: skip
    """Let rows that have exited keep their state through the layers of `indices`; returns nodes of the region after it.

    Layers without a cache run on the rows that are left. Those of `cached` run on all, because each row owes every
    cache an entry, but for their attention.
    """
    layers, rewriter = stack.layers, context.rewriter
    first, until = indices.start, indices.stop
    alone = depth.value(stream[first]).shape[0] == 1
    if not alone and cached.isdisjoint(indices):
        place = exited.next
        keep = rewriter.call(torch.logical_not, (exited,), like=exited, before=place)
        try:
            done = compact(stream[first], layers[until - 1].output, keep, rewriter)
        except RegionError as error:
            rewriter.erase([keep])
            context.missed(error.code, error.node, f"rows that have exited are computed along: {error.message}")
        else:
            for index in indices:
                del steps[index]
            steps[first] = (until, stream[first], done.end)
            stream[until] = done.end
            return {keep, *done.nodes}
    if not alone:
        attend_for_rows_left([layers[index] for index in indices], exited, context)
    for index in indices:
        stream[index + 1] = _freeze(layers[index].output, stream[first], exited, rewriter)
        steps[index] = (index + 1, stream[index], stream[index + 1])
    return set()


def _results(output: fx.Node) -> tuple[Any, ...]:
    values = output.args[0]
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def _freeze(result: fx.Node, state: fx.Node, exited: fx.Node, rewriter: Rewriter) -> fx.Node:
    """Let rows that have exited keep their state through a layer; returns the stream after it."""
    rows = rewriter.call(torch.reshape, (exited, (-1, 1, 1)), like=result, after=result)
    kept = rewriter.call(torch.where, (rows, state, result), like=result, after=rows)
    rewriter.replace(result, kept, only=lambda user: user is not kept)
    return kept
