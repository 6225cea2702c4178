"""``fxopt demo``: a real model, a real text, speed and quality of what fxopt does to it, and what was rewritten."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.decoding import prompt_in_eager
from fxopt.passes.early_exit import EarlyExit
from fxopt.passes.layer_skip import LayerSkip
from fxopt.passes.modules import module_stacks
from fxopt.passes.technique import Technique
from fxopt.reporting import report

CONTEXT = 512
"""Tokens of a window: half of them are the prompt, the rest is written or scored token by token."""
WRITTEN = CONTEXT // 2 + 1
"""Tokens after the prompt, in text and score; all caches are made for as many, so that each graph compiles once."""
STEPS, ROUNDS = 40, 5
"""Decode steps of a timed round, and rounds; the ways take turns."""
LEFT_OUT = """not in this table: sparse_attention, which pays on long contexts (fxopt bench context, fxopt bench
sparse); mixture_of_depths, which has to be trained (examples/train_mod.py); on a CPU async_softmax and flat_gemm,
whose kernels need a GPU"""


def run(model_name: str | None = None, *, shown: int = 48, page: str = "fxopt-report.html") -> None:
    """Print the demo. `model_name`: a Hugging Face folder or hub name; default: the model that ships with fxopt. Of the
    text that it writes the first `shown` tokens are printed.

    Scores and times the exact rewrites and two approximate techniques against eager and Inductor, then generates a
    continuation of a held-out text in eager PyTorch and through the exact rewrites, whose tokens have to be identical.
    Everywhere the prompt is read in eager PyTorch: what is compiled, and so what the first minutes go to, is the decode
    step of each way.
    """
    from fxopt import tinylm
    from fxopt.bench.kept import newest
    from fxopt.evaluation import evaluate, load_model

    model, tokenizer = load_model(model_name or "tinylm")
    text = tinylm.HELDOUT.read_text(encoding="utf-8")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{model_name or 'tinylm (ships with fxopt)'}: {size:.1f} million parameters, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}\n", flush=True)  # fmt: skip
    table = evaluate(
        model, text, (), *techniques(model, trained=model_name is None), tokenizer=tokenizer, context=CONTEXT,
        limit=CONTEXT // 2, decode_steps=STEPS, rounds=ROUNDS, compile_prompt=False,
    )  # fmt: skip
    print(f"{table}\n{LEFT_OUT}\n")
    compiled = table.models["fxopt"]
    prompt = torch.tensor([tokenizer.encode(text[: 8 * CONTEXT])[: CONTEXT // 2]])
    expected, found = (_generate(way, prompt) for way in (model, compiled))
    print(f"--- the last lines of a prompt of {prompt.shape[1]} tokens\n{_last_lines(tokenizer.decode(prompt[0]))}")
    print(f"--- fxopt.compile(model) writes\n{tokenizer.decode(found[0, prompt.shape[1] :][:shown])}")
    same = torch.equal(expected, found)
    print(f"--- {WRITTEN} tokens identical to eager PyTorch: {'yes' if same else 'NO'}\n\n{report(compiled).summary()}")
    try:
        print(f"\nreport: {report(compiled).to_html(page)}")
    except ImportError as error:
        print(f"\nno page: {error}")
    if model_name is None:
        print("\nA kept result; fxopt demo --full measures it here.")
        show_contexts(newest("context"))


def measure_contexts(picture_path: str = "fxopt-contexts.png") -> None:
    """Measure tokens per second against the length of the context again (`fxopt demo --full`), print it and draw it."""
    from fxopt.bench import load_suite

    show_contexts(load_suite("context")().to_dict(), picture_path)


def show_contexts(result: dict[str, Any], picture_path: str = "fxopt-contexts.png") -> None:
    """Print a result of the suite `context`, which says what the length of the context does to each way; draw it."""
    from fxopt.bench import context

    print(context.lines(result))
    try:
        context.picture(result, picture_path)
        print(f"picture: {picture_path}")
    except ImportError as error:
        print(f"no picture: {error}")


def techniques(model: Any, trained: bool) -> tuple[Technique, ...]:
    """What the demo shows beside the exact rewrites.

    `trained`: the model had layer dropout and early-exit losses, so that its last layers are the ones to spare.
    """
    layers = len(module_stacks(model)[-1])
    last = tuple(range(layers - layers // 3, layers))
    skip = LayerSkip(skip=last, phase="decode") if trained else LayerSkip(speedup=1.5, phase="decode")
    return skip, EarlyExit(layers=(layers // 2,), confidence="state", threshold=0.9, phase="decode")


def _generate(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), prompt_in_eager() as follow:
        written: torch.Tensor = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=WRITTEN, min_new_tokens=WRITTEN,
            do_sample=False, cache_implementation="static", disable_compile=True, pad_token_id=0,
            logits_processor=[follow],
        )  # fmt: skip
    return written


def _last_lines(text: str, lines: int = 8) -> str:
    return "\n".join(text.splitlines()[-lines:])
