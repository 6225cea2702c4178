"""The numbers of the model card. `python examples/train_tinylm.py --evaluate` prints them."""

from __future__ import annotations

import gzip
import hashlib
import lzma
from collections.abc import Iterable
from typing import Any

import torch

from fxopt.tinylm.needle import Needle, needle_task

SIGNATURE = "def copy_file(source, target, *, follow_symlinks=True):\n"
"""The start of the card's sample: a function that the standard library does not have under this name."""
QUICK_BYTES = 20_000
"""Size of the slice that a test can score in seconds."""


@torch.no_grad()
def needle_accuracy(model: Any, questions: Iterable[Needle]) -> float:
    """Share of needle questions whose whole value the model would write greedily.

    The answer is scored in one forward after the prompt: greedy decoding writes it exactly when every one of its
    tokens is the top-1 choice after those before.
    """
    right = asked = 0
    for question in questions:
        answer = torch.tensor(question.answer_ids)
        ids = torch.tensor([[*question.input_ids, *question.answer_ids[:-1]]])
        logits = model(ids.to(model.device), use_cache=False, logits_to_keep=len(answer)).logits[0]
        right += bool((logits.argmax(-1).cpu() == answer).all())
        asked += 1
    return right / asked


def sample(model: Any, tokenizer: Any, prompt: str = SIGNATURE, tokens: int = 120) -> str:
    """A continuation drawn at temperature 0.7 with seed 0, prompt included. Greedily so small a model soon repeats
    itself.
    """
    inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt").to(model.device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=0)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def measure(
    model: Any, tokenizer: Any, text: str, long: int = 4096, questions: int = 30, show: bool = True
) -> dict[str, Any]:
    """All metrics on a held-out text: quality at context 512 and `long` on the same bytes, exits, needles, a sample."""
    from fxopt import scoring

    data = text.encode("utf-8")
    exits = scoring.exit_scores(model, tokenizer, text, 512, show=show)
    needles = []
    for context, lines in ((512, 1), (1024, 1), (2048, 1), (long, 1), (long, 4)):
        task = needle_task(tokenizer, text, context, questions, needles=lines)
        shown = scoring.progress(task, questions, f"{lines} needles, context {context}", show)
        needles.append({"context": context, "needles": lines, "found": needle_accuracy(model, shown)})
    return {
        "bytes": len(data),
        "heldout_sha256": hashlib.sha256(data).hexdigest(),
        "xz_bits_per_byte": len(lzma.compress(data, preset=9)) * 8 / len(data),
        "gzip_bits_per_byte": len(gzip.compress(data, 9, mtime=0)) * 8 / len(data),
        "bits_per_byte": exits[-1].bits_per_byte,
        f"bits_per_byte_{long}": scoring.bits_per_byte(model, tokenizer, text, long, show=show),
        "bits_per_byte_slice": scoring.bits_per_byte(model, tokenizer, data[:QUICK_BYTES].decode("utf-8", "ignore")),
        "exits": [{"depth": e.depth, "bits_per_byte": e.bits_per_byte, "agreement": e.agreement} for e in exits],
        "needles": needles,
        "sample": sample(model, tokenizer),
    }
