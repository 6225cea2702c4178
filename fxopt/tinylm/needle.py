"""The needle task: retrieve a value that stands far back in the context.

A prompt is filler text with a few lines `KEY_qx47 = 83921` hidden in it, and ends with one of these keys: `KEY_qx47
=`. The answer is the value. Everything is built on token ids, so that a prompt has exactly the length that was asked
for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Needle:
    """One question. `input_ids` [context - len(answer_ids)] and `answer_ids` together fill the context exactly."""

    input_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    key: str
    value: str
    depth: float
    """Where the wanted line stands: 0 at the start of the prompt, 1 at its end."""


def pair(rng: random.Random) -> tuple[str, str]:
    """A key of two letters and two digits, and a value of five digits."""
    key = f"KEY_{rng.choice(LETTERS)}{rng.choice(LETTERS)}{rng.randrange(10, 100)}"
    return key, str(rng.randrange(10_000, 100_000))


def _encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of `text` with no special token, for a transformers or a tokenizers tokenizer."""
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return list(encoded.ids if hasattr(encoded, "ids") else encoded)


def _pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    while len(found) < count:
        key, value = pair(rng)
        found.setdefault(key, value)
    return list(found.items())


def make_needle(tokenizer: Any, filler: Sequence[int], context: int, seed: int, needles: int = 4) -> Needle:
    """One prompt of the task.

    `filler` holds the token ids of the haystack and is read from a place chosen by `seed`. `context` counts tokens,
    answer included; `needles` lines are hidden, one of them is asked for.

    Raises ValueError when the filler or the context is too short.
    """
    rng = random.Random(seed)
    pairs = _pairs(rng, needles)
    key, value = pairs[0]
    lines = [_encode(tokenizer, f"\n{k} = {v}\n") for k, v in pairs]
    question, answer = _encode(tokenizer, f"\n{key} ="), _encode(tokenizer, f" {value}")
    room = context - len(question) - len(answer) - sum(map(len, lines))
    if room < needles + 1:
        raise ValueError(
            f"a context of {context} tokens cannot hold {needles} needles; use at least {context - room + needles + 1}"
        )
    if len(filler) < room:
        raise ValueError(
            f"the filler has {len(filler)} tokens and {room} are needed: give a longer text or a shorter context"
        )
    start = rng.randrange(len(filler) - room + 1)
    hay = list(filler[start : start + room])
    places = [rng.randrange(room) for _ in lines]
    ids: list[int] = []
    last = 0
    for place, line in sorted(zip(places, lines, strict=True), key=lambda item: item[0]):
        ids += hay[last:place] + line
        last = place
    ids += hay[last:] + question
    return Needle(tuple(ids), tuple(answer), key, value, places[0] / room)


def needle_task(
    tokenizer: Any, filler: str, context: int, count: int, seed: int = 0, needles: int = 4
) -> Iterator[Needle]:
    """`count` prompts of `context` tokens over the text `filler`, the same for the same seed."""
    ids = _encode(tokenizer, filler)
    for index in range(count):
        yield make_needle(tokenizer, ids, context, seed * 1_000_003 + index, needles)


def planted(tokenizer: Any, filler: Sequence[int], length: int, rng: random.Random, share: float = 0.4) -> list[int]:
    """A training sequence of `length` ids: filler with needles, each asked for again later; about `share` of it is
    planted.

    One sequence in three repeats a stretch of the filler word for word instead, which is the natural form of a long-
    range copy.
    """
    if rng.random() < 1 / 3:
        span = rng.randrange(16, max(17, length // 4))
        hay = list(filler[: length - span])
        start = rng.randrange(max(1, len(hay) - span))
        at = rng.randrange(start + span, len(hay) + 1)
        return (hay[:at] + hay[start : start + span] + hay[at:])[:length]
    lines: list[list[int]] = []
    planted_tokens = 0
    budget = rng.uniform(0.1, 2 * share - 0.1) * length
    while planted_tokens < budget or not lines:
        key, value = pair(rng)
        lines.append(_encode(tokenizer, f"\n{key} = {value}\n"))
        planted_tokens += 2 * len(lines[-1])
    hay = list(filler[: max(0, length - planted_tokens)])
    events: list[tuple[int, list[int]]] = []
    for line in lines:
        first, again = sorted((rng.randrange(len(hay) + 1), rng.randrange(len(hay) + 1)))
        events += [(first, line), (again, line)]
    ids: list[int] = []
    last = 0
    for place, line in sorted(events, key=lambda item: item[0]):
        ids += hay[last:place] + line
        last = place
    return (ids + hay[last:])[:length]
