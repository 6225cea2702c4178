"""Put the exits of one graph into it: a check after each of the layers, and a ``torch.cond`` for what follows it.

With exits after layers 6 and 8 of 12::

    h6 -> check -> pred6
    h8, pred8 = cond(pred6, pass, layers 7 to 8 and the check after them)
    logits    = cond(pred8, pass, layers 9 to 12 and the head)

A chain, not a nest: a conditional within a branch must not write caches in place, in any version of torch. ``pass``
hands on the state, the decision and the logits of the exit that was taken, and updates the caches of its layers.
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
    trial = find_region(graph, layers[first - 1].output, ())
    exit_nodes(trial, _identity(steps, first), layers)
    late = [] if compat.cond_may_write() or not trial.effects else defer_writes(trial.effects, rewriter)
    sizes = [weight_bytes(layer.nodes) for layer in layers]
    checker = Checker(setting, stack, head, own, rewriter)
    checks: list[Check] = []
    within: set[fx.Node] = set()
    for number, n in enumerate(setting.layers):
        checks.append(checker.insert(number, stream[n], stream[n - 1], checks[-1] if checks else None))
        if setting.rows == "each":
            until = setting.layers[number + 1] if number + 1 < len(setting.layers) else len(layers)
            within |= _hold(range(n, until), cached, checks[-1].exited, stack, stream, steps, context)
    if setting.rows == "each":
        _keep_logits(setting, head, own, checker, checks, stream)
    output = next(iter(graph.find_nodes(op="output")))
    output.args = ((*_results(output), checks[-1].level),)  # until it is counted
    # With rows at different depths, a row that left by the model's head must not get what another exit's own one says.
    alike = setting.rows == "all" or not own.heads or all(n in own.heads for n in setting.layers)
    carried = alike and all(check.logits is not None for check in checks)
    costs: list[ExitCost] = []
    inside = {node for layer in layers for node in layer.nodes}
    policy = 0
    for number in reversed(range(len(checks))):
        n, check = setting.layers[number], checks[number]
        following = checks[number + 1] if number + 1 < len(checks) else None
        order = list(graph.nodes)
        last = [*late, output][0] if following is None else max(following.nodes).next
        apart = {*check.nodes, *order[order.index(last) :]}
        region = passing = find_region(graph, stream[n], apart, within)
        alias = _identity(steps, n)
        temporary: set[fx.Node] = set()
        if following is not None:
            alias |= _passing(check, following, logits=carried)
        elif head is not None and carried:
            assert check.logits is not None
            alias[head.logits] = check.logits
        elif head is not None and own.heads and setting.rows == "all":
            chosen = _chosen_logits(setting.layers, head, own, checker, checks, stream[n])
            temporary = set(graph.nodes) - set(order)  # of the branch alone
            passing = find_region(graph, stream[n], apart, within)
            passing.results = [chosen if node is head.logits else node for node in region.results]
        kept = exit_nodes(passing, alias, layers)
        branch = outline(kept, passing.results, alias)
        policy += weight_bytes(node for node in kept if node in inside)
        costs.append(exit_cost(n, layers, sizes, head, check, policy))
        rewriter.erase(temporary)
        insert_cond(region, check.predicate, branch, rewriter, f"exit_{number}", last)
    *results_left, level = _results(output)
    output.args = (tuple(results_left),)
    return costs[::-1], level


def _passing(check: Check, following: Check, *, logits: bool) -> dict[fx.Node, fx.Node]:
    """What stands for the results of the next check where this exit, or one before it, was taken."""
    names = ("predicate", "exited", "level", "choice", "run", *(["logits"] if logits else []))
    pairs = [(getattr(following, name), getattr(check, name)) for name in names]
    return {later: earlier for later, earlier in pairs if later is not None}


def _chosen_logits(
    counts: Sequence[int], head: Head, own: OwnModules, checker: Checker, checks: list[Check], state: fx.Node
) -> fx.Node:
    """What the head of the exit that was taken, its own or the model's, says of the state that the rows left with."""
    said = [checker.full_logits(n, state)[0] if n in own.heads else head.logits for n in counts]
    chosen, place = said[-1], head.logits
    for check, mine in reversed(list(zip(checks[:-1], said[:-1], strict=True))):
        chosen = place = checker.putting(head.logits, after=place)(torch.where, [check.predicate, mine, chosen])
    return chosen


def _keep_logits(
    setting: EarlyExit, head: Head | None, own: OwnModules, checker: Checker, checks: list[Check], stream: list[fx.Node]
) -> None:
    """Let rows that left at an exit with a head of its own have that head's logits, whatever runs for others.

    A row that left by the model's own head needs nothing: that head, at the end, reads the state that was frozen.
    """
    if head is None:
        return
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
        rewriter.replace(logits, result, only=lambda user, fresh=fresh: user not in fresh)  # type: ignore[misc]
        logits = result


def _steps(layers: Sequence[Layer], stream: Sequence[fx.Node]) -> dict[int, tuple[fx.Node, fx.Node]]:
    """By the index of the first layer of each step, the stream before that step and after it."""
    return {
        index: (
            stream[index] if not index or layers[index].input is layers[index - 1].output else layers[index].input,
            stream[index + 1],
        )
        for index in range(len(layers))
    }  # fmt: skip


def _identity(steps: dict[int, tuple[fx.Node, fx.Node]], start: int) -> dict[fx.Node, fx.Node]:
    """Each layer from `start` on returns what it is given."""
    return {after: before for index, (before, after) in steps.items() if index >= start}


def _hold(
    indices: range, cached: set[int], exited: fx.Node, stack: Stack, stream: list[fx.Node],
    steps: dict[int, tuple[fx.Node, fx.Node]], context: PassContext,
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
            steps[first] = (stream[first], done.end)
            stream[until] = done.end
            return {keep, *done.nodes}
    if not alone:
        attend_for_rows_left([layers[index] for index in indices], exited, context)
    for index in indices:
        stream[index + 1] = _freeze(layers[index].output, stream[first], exited, rewriter)
        steps[index] = (stream[index], stream[index + 1])
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
