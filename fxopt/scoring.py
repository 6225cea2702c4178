"""Scores of a causal language model: bits per byte, divergence, agreement, exits, and the speed of generation.

All of it is plain PyTorch and Hugging Face `generate`; nothing here knows about graphs. `fxopt.evaluation` builds the
comparison of techniques on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")

HEAD_ROWS = 512
"""Positions the language-model head is applied to at a time, so that logits of a long context never exist at once."""


@dataclass(frozen=True)
class Window:
    """A stretch of text to predict: `inputs` [S] and, for each of its positions, the next token in `targets` [S]."""

    inputs: Tensor
    targets: Tensor
    sizes: Tensor
    """UTF-8 bytes of each target [S]; zeros when only token ids were given."""

    @property
    def size(self) -> int:
        """UTF-8 bytes of the targets."""
        return int(self.sizes.sum())


@dataclass(frozen=True)
class Exit:
    """The quality of the model that stops after `depth` layers, measured with the model's own norm and head."""

    depth: int
    bits_per_byte: float
    agreement: float
    """Share of positions at which the top-1 token is the full model's."""


# --- what is scored -------------------------------------------------------------------------------------------------


def read_text(path: str | Path) -> str:
    """The text of a file.

    Raises FileNotFoundError when it is missing, ValueError when it is empty or not UTF-8 text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {path}; give a path to a UTF-8 text file")
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path} is empty; give a text of at least one context")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); give a text file, not a binary one"
        ) from error
    if "\x00" in text:
        raise ValueError(f"{path} holds NUL bytes; give a text file, not a binary one")
    return text


def require_causal(model: Any) -> nn.Module:
    """The model itself when it is a Hugging Face causal language model.

    Raises TypeError for anything else: an encoder, an encoder-decoder, a model without a language-model head.
    """
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", lambda: False)
    if (
        not isinstance(model, nn.Module)
        or config is None
        or not generates()
        or getattr(config, "is_encoder_decoder", False)
    ):
        raise TypeError(
            f"{type(model).__name__} is not a causal language model of Hugging Face (a decoder with a head, as "
            "AutoModelForCausalLM loads it); quality is bits per byte of the next token, which other models do "
            "not predict"
        )
    return model


def windows(tokenizer: Any, text: str | Sequence[int] | Tensor, context: int, whole: bool = False) -> list[Window]:
    """Cut a text into windows of at most `context` tokens that are predicted one by one, each without sight of the
    others.

    With a tokenizer that has a beginning-of-sequence token every token of the text is predicted once; without one (or
    for token ids) the first token of each window is not. `whole` leaves out a last window that is shorter.

    Raises ValueError when the text is empty or shorter than one context.
    """
    if context < 2:
        raise ValueError(f"context is {context}; at least 2 tokens are needed to predict one")
    if isinstance(text, str):
        if not text.strip():
            raise ValueError("the text is empty; give a text of at least one context")
        ids, sizes = _encode(tokenizer, text)
    else:
        ids = torch.as_tensor(text).flatten()
        sizes = torch.zeros_like(ids)
    if len(ids) < context:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than one context of {context}; "
            "give a longer text or a smaller context"
        )
    first = getattr(tokenizer, "bos_token_id", None)
    found = []
    for start in range(0, len(ids), context):
        chunk, bytes_ = ids[start : start + context], sizes[start : start + context]
        if len(chunk) < (context if whole else 2):
            break
        if first is None:
            found.append(Window(chunk[:-1], chunk[1:], bytes_[1:]))
        else:
            found.append(Window(torch.cat((torch.tensor([first]), chunk[:-1])), chunk, bytes_))
    return found


def _encode(tokenizer: Any, text: str) -> tuple[Tensor, Tensor]:
    """The token ids [N] of a text and the UTF-8 bytes of each [N], which sum to the size of the text.

    Tokens that share a character (byte-level tokenizers split them) give it to the last of them.
    """
    if not getattr(tokenizer, "is_fast", False):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids), torch.tensor([len(tokenizer.decode([i]).encode("utf-8")) for i in ids])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    before = torch.tensor([0, *(len(c.encode("utf-8")) for c in text)]).cumsum(0)
    starts = torch.tensor([0, *(first for first, _ in encoded["offset_mapping"][1:]), len(text)])
    return torch.tensor(encoded["input_ids"]), before[starts].diff()


def progress(items: Iterable[Item], total: int, text: str, show: bool = True) -> Iterator[Item]:
    """The items, with a tqdm bar when tqdm is installed and `show` is set."""
    if show:
        try:
            from tqdm import tqdm

            yield from tqdm(items, total=total, desc=text, leave=False)
            return
        except ImportError:
            pass
    yield from items


# --- quality ---------------------------------------------------------------------------------------------------------


def final_norm_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The norm after the last layer and the language-model head of a Hugging Face decoder."""
    body = getattr(model, "base_model", model)
    body = getattr(body, "decoder", body)
    for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f"):
        norm = getattr(body, name, None)
        if isinstance(norm, nn.Module):
            return norm, model.get_output_embeddings()  # type: ignore[operator]
    raise TypeError(f"{type(model).__name__} has no final norm under a usual name, so its exits cannot be scored")


@torch.no_grad()
def bits_per_byte(
    model: Any,
    tokenizer: Any,
    text: str,
    context: int = 512,
    exit_layers: Sequence[int] | None = None,
    show: bool = False,
) -> float | dict[int, float]:
    """Bits per byte of `text` under the model, in windows of `context` tokens.

    With `exit_layers` a dict: for each number of layers in it, the bits per byte of the model that stops there.
    """
    if exit_layers is not None:
        return {e.depth: e.bits_per_byte for e in exit_scores(model, tokenizer, text, context, exit_layers, show)}
    require_causal(model)
    cut = windows(tokenizer, text, context)
    bits, device = 0.0, next(model.parameters()).device
    for window in progress(cut, len(cut), f"context {context}", show):
        logits = model(window.inputs[None].to(device), use_cache=False).logits[0]
        bits += nll_bits(logits, window.targets.to(device))
    return bits / sum(w.size for w in cut)


def nll_bits(logits: Tensor, targets: Tensor) -> float:
    """Bits to code targets [S] under logits [S, V], summed."""
    total = 0.0
    for some, goal in zip(logits.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        total += nn.functional.cross_entropy(some.float(), goal, reduction="sum").item()
    return total / math.log(2)


@torch.no_grad()
def exit_scores(
    model: Any, tokenizer: Any, text: str, context: int = 512, depths: Sequence[int] | None = None, show: bool = False
) -> list[Exit]:
    """Quality at each depth (a count of layers that have run; all of them when not given), from one pass over the
    text.
    """
    require_causal(model)
    layers = model.config.get_text_config().num_hidden_layers
    depths = list(depths) if depths is not None else list(range(1, layers + 1))
    wrong = [n for n in depths if not 1 <= n <= layers]
    if wrong:
        raise ValueError(f"exit after {wrong} layers; the model has {layers}, so depths lie in 1..{layers}")
    norm, head = final_norm_and_head(model)
    cut = windows(tokenizer, text, context)
    device = next(model.parameters()).device
    bits, agreed, count = dict.fromkeys(depths, 0.0), dict.fromkeys(depths, 0), 0
    for window in progress(cut, len(cut), "exits", show):
        targets = window.targets.to(device)
        body = model.base_model(window.inputs[None].to(device), use_cache=False, output_hidden_states=True)
        states = body.hidden_states
        for start in range(0, len(targets), HEAD_ROWS):
            here = slice(start, start + HEAD_ROWS)
            full = head(body.last_hidden_state[0, here])
            top = full.argmax(-1)
            for depth in depths:
                logits = full if depth == layers else head(norm(states[depth][0, here]))
                bits[depth] += nll_bits(logits, targets[here])
                agreed[depth] += int((logits.argmax(-1) == top).sum())
        count += len(targets)
    size = sum(w.size for w in cut)
    return [Exit(n, bits[n] / size, agreed[n] / count) for n in depths]


class Divergence:
    """Running sums over positions: bits of the text, KL divergence to the unmodified model, top-1 agreement with it."""

    def __init__(self) -> None:
        self.bits = self.kl = 0.0
        self.agreed = self.tokens = self.bytes = 0

    @torch.no_grad()
    def add(self, logits: Tensor, original: Tensor, targets: Tensor, size: int) -> None:
        """logits, original [S, V] and targets [S]; `size` bytes."""
        for some, base, goal in zip(*(t.split(HEAD_ROWS) for t in (logits, original, targets)), strict=True):
            log, base_log = some.float().log_softmax(-1), base.float().log_softmax(-1)
            self.bits -= log.gather(1, goal[:, None]).sum().item() / math.log(2)
            self.kl += nn.functional.kl_div(log, base_log, reduction="sum", log_target=True).item()
            self.agreed += int((some.argmax(-1) == base.argmax(-1)).sum())
            self.tokens += len(goal)
        self.bytes += size

    def result(self) -> dict[str, float | None]:
        """bits_per_byte (None without a tokenizer), perplexity per token, kl in nats per token, agreement."""
        return {
            "bits_per_byte": self.bits / self.bytes if self.bytes else None,
            "perplexity": 2 ** (self.bits / self.tokens),
            "kl": max(0.0, self.kl / self.tokens),
            "agreement": self.agreed / self.tokens,
        }


# --- generation: teacher-forced scores and speed ---------------------------------------------------------------------


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
