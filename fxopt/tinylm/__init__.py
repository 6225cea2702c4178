"""The small language model that ships with fxopt: a 12-layer Llama trained on the Python standard library.

    >>> from fxopt import tinylm
    >>> model, tokenizer = tinylm.load()
    >>> text = tinylm.heldout()

It was trained for adaptive depth (LayerSkip's recipe), so every depth is an exit that makes sense, and it uses
contexts of up to 4096 tokens. `README.md` beside this file is the model card; `examples/train_tinylm.py` trains it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
"""A Hugging Face model folder: `AutoModelForCausalLM.from_pretrained(FOLDER)` works too."""
HELDOUT = FOLDER / "heldout.txt"
"""About 300 kB of standard-library files that the model has not seen."""
CARD = FOLDER / "README.md"
METRICS = FOLDER / "metrics.json"
"""The numbers of the card, as `python examples/train_tinylm.py --evaluate` writes them."""


def load(dtype: Any = None, folder: str | Path | None = None) -> tuple[Any, Any]:
    """The model in eval mode and its tokenizer; weights are stored in 16 bits and loaded as float32 unless `dtype`
    says otherwise.

    Raises FileNotFoundError when the weights are not there, ValueError when they do not fit the config, and
    ImportError without the `hf` extra.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("fxopt.tinylm needs transformers: pip install 'fxopt[hf]'") from error
    path = Path(folder) if folder is not None else FOLDER
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} has no {', '.join(missing)}; "
            f"train the model with examples/train_tinylm.py --minutes 110 --out {path}"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.float32)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {path} do not have the shapes of its config.json; train or copy them again ({error})"
        ) from error
    return model.eval(), AutoTokenizer.from_pretrained(path)


def heldout() -> str:
    """The held-out text."""
    return HELDOUT.read_bytes().decode("utf-8")
