"""Scores of a causal language model: bits per byte, divergence, agreement, exits.

All of it is plain PyTorch; nothing here knows about graphs. `fxopt.decoding` scores and times through `generate`, and
`fxopt.evaluation` builds the comparison of techniques on both.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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


def digest(cut: Sequence[Window], *settings: object) -> str:
    """A hash of windows of token ids and of anything that prints the same when it is the same."""
    found = hashlib.sha256(repr(settings).encode())
    for window in cut:
        found.update(window.inputs.long().numpy().tobytes())
    return found.hexdigest()[:16]


def seen(cut: Sequence[Window]) -> dict[str, Any]:
    """What a recipe notes of the windows that it was calibrated on: how many, and their :func:`digest`."""
    return {"windows": len(cut), "text": digest(cut)}


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
        self.bits, self.kl = 0.0, 0.0
        self.agreed, self.tokens, self.bytes = 0, 0, 0

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
