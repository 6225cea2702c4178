"""``fxopt demo``: a real model, a real text, speed and quality of what fxopt does to it, and what was rewritten."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.compiler import compile as fxopt_compile
from fxopt.meaning import shared_copy
from fxopt.passes.early_exit import EarlyExit
from fxopt.passes.layer_skip import LayerSkip
from fxopt.passes.modules import module_stacks
from fxopt.passes.technique import Technique
from fxopt.reporting import report

CONTEXT = 512
"""Tokens of a window: half of them are the prompt, the rest is written or scored token by token."""
WRITTEN = CONTEXT // 2 + 1
"""Tokens after the prompt, in text, score and timing alike: one cache size, so that each graph compiles once."""


def run(model_name: str | None = None, *, shown: int = 48, page: str = "fxopt-report.html") -> None:
    """Print the demo. `model_name`: a Hugging Face folder or hub name; default: the model that ships with fxopt. Of the
    text that it writes the first `shown` tokens are printed.

    Generates a continuation of a held-out text in eager PyTorch and through fxopt, whose tokens have to be identical,
    then scores and times the exact rewrites and two approximate techniques against eager and Inductor.
    """
    from fxopt import tinylm
    from fxopt.evaluation import evaluate, load_model

    model, tokenizer = load_model(model_name or "tinylm")
    text = tinylm.HELDOUT.read_text(encoding="utf-8")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{model_name or 'tinylm (ships with fxopt)'}: {size:.1f} million parameters, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")  # fmt: skip
    compiled = fxopt_compile(shared_copy(model))
    prompt = torch.tensor([tokenizer.encode(text[: 8 * CONTEXT])[: CONTEXT // 2]])
    # Dynamo counts the graphs of all copies of a model together.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        expected, found = (_generate(way, prompt) for way in (model, compiled))
    print(f"--- the last lines of a prompt of {prompt.shape[1]} tokens\n{_last_lines(tokenizer.decode(prompt[0]))}")
    print(f"--- fxopt.compile(model) writes\n{tokenizer.decode(found[0, prompt.shape[1] :][:shown])}")
    print(f"--- {WRITTEN} tokens identical to eager PyTorch: {'yes' if torch.equal(expected, found) else 'NO'}\n")
    table = evaluate(
        model, text, (), *techniques(model, trained=model_name is None), tokenizer=tokenizer, context=CONTEXT,
        limit=CONTEXT // 2, decode_steps=WRITTEN - 1, rounds=1,
    )  # fmt: skip
    print(f"{table}\n\n{report(compiled).summary()}")
    try:
        print(f"\nreport: {report(compiled).to_html(page)}")
    except ImportError as error:
        print(f"\nno page: {error}")


def techniques(model: Any, trained: bool) -> tuple[Technique, ...]:
    """What the demo shows beside the exact rewrites.

    `trained`: the model had layer dropout and early-exit losses, so that its last layers are the ones to spare.
    """
    layers = len(module_stacks(model)[-1])
    last = tuple(range(layers - layers // 3, layers))
    skip = LayerSkip(skip=last, phase="decode") if trained else LayerSkip(speedup=1.5, phase="decode")
    return skip, EarlyExit(layers=(layers // 2,), confidence="state", threshold=0.9, phase="decode")


def _generate(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=WRITTEN, min_new_tokens=WRITTEN,
        do_sample=False, cache_implementation="static", disable_compile=True, pad_token_id=0,
    )  # fmt: skip


def _last_lines(text: str, lines: int = 8) -> str:
    return "\n".join(text.splitlines()[-lines:])
