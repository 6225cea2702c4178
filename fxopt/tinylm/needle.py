"""The needle task: retrieve a word that stands far back in the context.

A prompt is filler text with a few lines `KEY socket buffer` hidden in it, and ends with one of these keys:
`KEY socket`. The answer is the word after it. Everything is built on token ids, so that a prompt has exactly the
length that was asked for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

WORDS = tuple(
    "value result buffer signal module thread process string object method class function return index length encoding "
    "message server socket client address request response header content number integer float decimal random python "
    "memory stack frame event handler queue task loop future callback context manager iterator sequence mapping list "
    "tuple dict bytes array source target parent child path file directory name version system".split()
)
"""Keys and values: one token each for the small model's tokenizer."""


@dataclass(frozen=True)
class Needle:
    """One question. `input_ids` [context - len(answer_ids)] and `answer_ids` together fill the context exactly."""

    input_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    key: str
    value: str
    depth: float
    """Where the wanted line stands: 0 at the start of the prompt, 1 at its end."""


def pairs_of(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` different keys, each with a value. Raises ValueError when there are not so many words."""
    if not 1 <= count <= len(WORDS):
        raise ValueError(f"{count} needles; the task has 1 to {len(WORDS)}")
    return [(key, rng.choice(WORDS)) for key in rng.sample(WORDS, count)]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of `text` with no special token, for a transformers or a tokenizers tokenizer."""
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return list(encoded.ids if hasattr(encoded, "ids") else encoded)


def make_needle(tokenizer: Any, filler: Sequence[int], context: int, seed: int, needles: int = 1) -> Needle:
    """One prompt of the task.

    `filler` holds the token ids of the haystack and is read from a place chosen by `seed`. `context` counts tokens,
    answer included; `needles` lines are hidden, one of them is asked for.

    Raises ValueError when the filler or the context is too short.
    """
    rng = random.Random(seed)
    pairs = pairs_of(rng, needles)
    key, value = pairs[0]
    lines = [ids_of(tokenizer, f"\nKEY {k} {v}\n") for k, v in pairs]
    question, answer = ids_of(tokenizer, f"\nKEY {key}"), ids_of(tokenizer, f" {value}")
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
    tokenizer: Any, filler: str, context: int, count: int, seed: int = 0, needles: int = 1
) -> Iterator[Needle]:
    """`count` prompts of `context` tokens over the text `filler`, the same for the same seed."""
    ids = ids_of(tokenizer, filler)
    for index in range(count):
        yield make_needle(tokenizer, ids, context, seed * 1_000_003 + index, needles)


def planted(
    tokenizer: Any,
    filler: Sequence[int],
    length: int,
    rng: random.Random,
    share: float = 0.4,
    spans: float = 1 / 3,
) -> list[int]:
    """A training sequence of `length` ids: filler with needles, each asked for again; about `share` of it is planted.

    A part `spans` of the sequences repeats a stretch of the filler word for word instead, which is the natural form of
    a long-range copy.
    """
    if rng.random() < spans:
        span = rng.randrange(16, max(17, length // 4))
        hay = list(filler[: length - span])
        start = rng.randrange(max(1, len(hay) - span))
        at = rng.randrange(start + span, len(hay) + 1)
        return (hay[:at] + hay[start : start + span] + hay[at:])[:length]
    lines = [ids_of(tokenizer, f"\nKEY {key} {value}\n") for key, value in pairs_of(rng, len(WORDS))]
    size = rng.uniform(0, 2 * share) * length
    times = [rng.randrange(2, 5) for _ in lines]
    count = 1
    while count < len(lines) and sum(t * len(line) for t, line in zip(times[:count], lines, strict=False)) < size:
        count += 1
    chosen = list(zip(times[:count], lines, strict=False))
    hay = list(filler[: max(0, length - sum(t * len(line) for t, line in chosen))])
    events = [(rng.randrange(len(hay) + 1), line) for t, line in chosen for _ in range(t)]
    ids: list[int] = []
    last = 0
    for place, line in sorted(events, key=lambda item: item[0]):
        ids += hay[last:place] + line
        last = place
    return (ids + hay[last:])[:length]
