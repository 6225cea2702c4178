"""Decoding with `generate`: forced to a text, so that settings which act in decode can be scored, and timed.

Plain PyTorch and Hugging Face `generate`, like `fxopt.scoring`; nothing here knows about graphs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fxopt.scoring import Window


@contextmanager
def prompt_in_eager() -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Compiled models run their prompt in eager PyTorch and compile only what follows it.

    Gives a logits processor for `generate`, which is called after each forward, so first after the prompt.
    """

    def follow(input_ids: Tensor, scores: Tensor) -> Tensor:
        torch.compiler.set_stance("default")
        return scores

    torch.compiler.set_stance("force_eager")
    try:
        yield follow
    finally:
        torch.compiler.set_stance("default")


class _Forced:
    """A logits processor for `generate` that makes it write given tokens, and notes the time of each step."""

    def __init__(self, tokens: Sequence[int], prompt: int) -> None:
        self.tokens, self.prompt, self.times = tokens, prompt, list[float]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        forced = torch.full_like(scores, -math.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.prompt]] = 0.0
        return forced


@dataclass(frozen=True)
class Forced:
    """What a teacher-forced generation gave: logits [N, V] for the N forced tokens, seconds of the prompt, seconds of
    each later step.
    """

    logits: Tensor | None
    prompt_seconds: float
    step_seconds: list[float]


def force(
    model: Any,
    prompt: Tensor,
    tokens: Sequence[int],
    cache: str = "static",
    keep_logits: bool = True,
    compile_prompt: bool = True,
    room: int | None = None,
) -> Forced:
    """Let `generate` read prompt [S] and then write `tokens`, whatever it would have liked to write, through its own
    cache. Without `compile_prompt` the prompt is read in eager PyTorch (see `prompt_in_eager`). `room`: for how many
    tokens a static cache is made, since each size compiles anew; as many as are written when not given.

    This is how a setting that acts in decode is scored: one forward over the text would take the path of a prompt.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    device = next(model.parameters()).device
    never = model.config.get_text_config().vocab_size  # no token has this id, so nothing ends the text early
    watch = _Forced(tokens, len(prompt))
    settings = GenerationConfig(
        max_new_tokens=max(room or 0, len(tokens)), do_sample=False, use_cache=True, cache_implementation=cache,
        eos_token_id=never, pad_token_id=0,
        output_logits=keep_logits, return_dict_in_generate=True, disable_compile=True,
    )  # fmt: skip
    ids = prompt[None].to(device)
    end = len(prompt) + len(tokens)

    def written(input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= end, device=input_ids.device)

    with torch.no_grad(), nullcontext() if compile_prompt else prompt_in_eager() as follow:
        began = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList([watch, *([follow] if follow else [])]),
            stopping_criteria=StoppingCriteriaList([written]),
        )
    steps = [b - a for a, b in zip(watch.times, watch.times[1:], strict=False)]
    return Forced(torch.cat(out.logits) if keep_logits else None, watch.times[0] - began, steps)


def decode_logits(
    model: Any, window: Window, prompt: int, cache: str = "static", compile_prompt: bool = True
) -> Tensor:
    """Logits [S - prompt + 1, V] of the last positions of a window, token by token on a cache after a prompt of
    `prompt` tokens.
    """
    tokens = window.targets[prompt - 1 :].tolist()
    forced = force(model, window.inputs[:prompt], tokens, cache, compile_prompt=compile_prompt)
    assert forced.logits is not None
    return forced.logits


def speeds(
    models: dict[str, Any],
    prompt: Tensor,
    steps: int,
    rounds: int,
    cache: str = "static",
    compile_prompt: bool = True,
    room: int | None = None,
) -> dict[str, Speed]:
    """Tokens per second of prefill and decode for each model, measured in interleaved rounds.

    Every round lets each model read the prompt [S] and write `steps` tokens; the models take turns, so that a machine
    that slows down slows all of them. The first round warms up (and compiles) and does not count.
    """
    measured = {name: Speed([], []) for name in models}
    tokens = prompt[:1].expand(steps + 1).tolist()
    for turn in range(rounds + 1):
        for name, model in models.items():
            forced = force(model, prompt, tokens, cache, keep_logits=False, compile_prompt=compile_prompt, room=room)
            if turn:
                measured[name].prefills.append(len(prompt) / forced.prompt_seconds)
                measured[name].decodes.append(1 / median(forced.step_seconds))
    return measured


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one sequence, a number for each round; a round's decode is by the median of its steps."""

    prefills: list[float]
    decodes: list[float]

    @property
    def prefill(self) -> float:
        """The median of the rounds."""
        return median(self.prefills)

    @property
    def decode(self) -> float:
        """The median of the rounds."""
        return median(self.decodes)

    def over(self, other: Speed) -> float:
        """How many times faster decode is than that of `other`: the median of the ratios, round by round."""
        return median([own / its for own, its in zip(self.decodes, other.decodes, strict=True)])
