"""One Dynamo capture for many settings: graphs are captured once and rewritten anew for each technique."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import backend, reporting
from fxopt.options import Settings
from fxopt.passes.provenance import number_nodes
from fxopt.passes.record import GraphRecord, Recorder
from fxopt.passes.technique import Technique


class Recaptured:
    """A Dynamo backend that keeps what it is handed, and runs it as the technique in use rewrites it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.entries: list[_Entry] = []
        self.technique: Technique | None = None
        self.strict = True
        model.compile(backend=self)

    def __call__(self, gm: fx.GraphModule, inputs: Any, **_: Any) -> Any:
        entry = _Entry(gm)
        self.entries.append(entry)
        entry.use(self.technique, self.strict)
        return lambda *args: entry.run(*args)  # the run of the technique in use at the time

    def use(self, technique: Technique | None) -> Recaptured:
        self.technique = technique
        for entry in self.entries:
            entry.use(technique, self.strict)
        return self

    def remarks(self, status: str | None = None) -> list[Any]:
        """Remarks on the technique in use, of all graphs."""
        name = self.technique.name if self.technique else ""
        found = [r for e in self.entries if e.record for r in e.record.remarks if r.technique == name]
        return [r for r in found if status in (None, r.status)]


class _Entry:
    def __init__(self, gm: fx.GraphModule) -> None:
        number_nodes(gm.graph)
        self.gm = gm
        self.graph = backend._copy_graph(gm.graph)
        self.record: GraphRecord | None = None
        self.rewritten: fx.GraphModule | None = None
        self.run: Any = None

    def use(self, technique: Technique | None, strict: bool = True) -> None:
        gm = fx.GraphModule(self.gm, backend._copy_graph(self.graph))
        gm.compile_subgraph_reason = getattr(self.gm, "compile_subgraph_reason", None)
        self.record = reporting.new_record("test", 0)
        settings = Settings.build({technique.name: technique} if technique else {}, strict=strict)
        gm, wrappers, _ = backend.run_passes(gm, self.record, Recorder(self.record, "0"), settings)
        self.rewritten = gm
        run: Any = gm.forward
        for wrap in wrappers:
            run = wrap(run)
        self.run = run


def generate(model: Any, ids: torch.Tensor, cache: str | None = "static", tokens: int = 10, **kwargs: Any) -> Any:
    """Greedy generation with logits; ``cache``: "static", or None for a growing one."""
    with torch.no_grad():
        return model.generate(
            ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, cache_implementation=cache,
            return_dict_in_generate=True, output_logits=True, **kwargs,
        )  # fmt: skip
