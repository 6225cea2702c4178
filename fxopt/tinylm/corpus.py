"""The text of the small model: the Python standard library's source, split by file into training and held-out."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Any

END = "<|endoftext|>"


def stdlib_files(root: Path) -> list[Path]:
    """The Python files of the standard library, sorted; generated character tables are left out.

    Raises FileNotFoundError when the test tree, more than half of the text, is missing, as some distributions ship
    Python.
    """
    skip = {"site-packages", "encodings", "__pycache__", "lib2to3", "dist-packages", "config"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    if not (root / "test" / "test_grammar.py").is_file():
        raise FileNotFoundError(
            f"{root} has no test tree (test/test_grammar.py is missing), which is most of the training text. "
            "Install your distribution's test package (such as libpython3-testsuite), or a Python "
            "from python.org, uv or pyenv."
        )
    return files


def is_heldout(name: str) -> bool:
    """One file in 24 is held out, decided by the hash of its path."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 24 == 0


def read_corpus(root: Path | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out texts by relative path. Files that are not UTF-8 are left out, and so are copies of a
    held-out file.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    texts: dict[str, str] = {}
    for path in stdlib_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts[path.relative_to(root).as_posix()] = text
    held = {name: text for name, text in texts.items() if is_heldout(name)}
    held_texts = set(held.values())
    return {n: t for n, t in texts.items() if n not in held and t not in held_texts}, held


def heldout_text(held: dict[str, str], size: int = 300_000) -> str:
    """About `size` bytes of whole held-out files in the order of their hashes, none longer than 60 kB."""
    parts: list[str] = []
    total = 0
    for name in sorted(held, key=lambda n: hashlib.sha256(n.encode()).hexdigest()):
        length = len(held[name].encode())
        if length <= 60_000 and total + length <= size * 1.02:
            parts.append(held[name])
            total += length
    return "".join(parts)


def train_tokenizer(texts: dict[str, str], vocab: int) -> Any:
    """A byte-level BPE over the training files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((texts[n] for n in sorted(texts)), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Any, out: Path, context: int) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=context,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(out)
