"""Rows that have exited attend to nothing: counted in rows that the attention operator reads, step by step."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.codegen.ops import attention as operator
from fxopt.passes.early_exit import EarlyExit
from fxopt.testing import TINY

IDS = torch.randint(3, 128, (4, 6), generator=torch.Generator().manual_seed(5))
LAYERS = 3


def every_other_row(logits):
    """Rows part whatever the weights."""
    return torch.cumsum(torch.ones_like(logits[:, 0]), 0) % 2


EACH = EarlyExit(layers=(1, 2), confidence=every_other_row, threshold=0.5, rows="each", phase="decode")


@pytest.fixture
def rows_read(monkeypatch):
    """Rows of the batch that each call of the operator with one new token was to read."""
    counted = []
    run = operator.cpu_attention.run

    def count(query, key, value, mask, extent, sinks, **options):
        if query.shape[2] == 1:
            rows = torch.ones(len(query)) if extent is None else extent.expand(len(query))
            counted.append(int((rows > 0).sum()))
        return run(query, key, value, mask, extent, sinks, **options)

    monkeypatch.setattr(operator.cpu_attention, "run", count)
    return counted


@torch.no_grad()
def write(model, cache):
    with torch._dynamo.config.patch(recompile_limit=64):
        out = model.generate(
            IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False, cache_implementation=cache, disable_compile=True,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("cache", ["static", None], ids=["static", "growing"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_rows_that_have_exited_read_no_key(name, cache, rows_read, eager_lowering):
    """Grouped and ungrouped heads, masks and none: layers read as many rows as have not left, and tokens are right."""
    reference = fxopt.reference(TINY[name](), EACH)
    wanted, wanted_logits = write(reference, cache)
    steps = reference.exit_state.depths[1:]  # behind the prompt
    assert any(len(set(rows)) > 1 for rows in steps), "rows are meant to part"
    compiled = fxopt.compile(TINY[name](), EACH, strict=True)
    rows_read.clear()
    tokens, logits = write(compiled, cache)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logits, wanted_logits, atol=2e-5, rtol=1e-5)
    # Before the exit, ungrouped heads without a mask are the library's.
    first = 1 if cache is None and name != "llama" else 0
    left = [sum(depth > index for depth in rows) for rows in steps for index in range(first, LAYERS)]
    assert rows_read == [rows for rows in left if rows]
    said = {(r.status, r.code) for r in fxopt.report(compiled).remarks if r.technique == "early_exit"}
    assert said == {("applied", ""), ("analysis", "FX604"), ("blocked", "FX503")}, "the prompt alone runs every layer"
