"""``fxopt.generate``: lossless self-speculation. The model drafts with a part of itself and verifies with all of it.

The draft is the reference of an approximate technique: the same weights with layers left out (Draft & Verify,
arXiv 2309.08168; LayerSkip, arXiv 2404.16710). It proposes a few tokens, one pass of the whole model checks them, and
the longest agreeing prefix is kept, so greedy tokens are those of the model alone and sampling keeps its distribution.
Drafting and verifying are Hugging Face's assisted generation; draft and model each keep a cache of their own.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from fxopt.compiler import require_module
from fxopt.meaning import reference
from fxopt.passes.layer_skip import LayerSkip
from fxopt.passes.technique import SettingError, Technique

_drafts: weakref.WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = weakref.WeakKeyDictionary()


def generate(model: nn.Module, input_ids: Tensor, draft: Technique | None = None, **hf_generate_kwargs: Any) -> Any:
    """``model.generate(input_ids, ...)``, drafted by `model` itself under the approximate technique `draft`.

    Args:
        input_ids: ``[1, S]``; Hugging Face's assisted generation takes one sequence.
        draft: how the draft leaves work out; default ``LayerSkip(speedup=2)``. Whether it pays depends on how often
            the draft is right: models trained for early exit draft well, others may be slower than without.

    Raises:
        SettingError: for more than one sequence, a static cache, or a draft that changes nothing.
    """
    require_module(model)
    if not hasattr(model, "generate"):
        raise SettingError(
            f"{type(model).__name__} has no generate(); self-speculation needs a Hugging Face causal LM."
        )
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise SettingError(
            f"fxopt.generate drafts for one sequence, input_ids [1, S]; given was {list(input_ids.shape)}. "
            "Use model.generate for a batch."
        )
    if hf_generate_kwargs.get("cache_implementation") not in (None, "dynamic", "dynamic_full"):
        raise SettingError(
            f"cache_implementation={hf_generate_kwargs['cache_implementation']!r}: rejected drafts are "
            "taken back out of the cache, which takes a dynamic one; leave it out."
        )
    technique = LayerSkip(speedup=2) if draft is None else draft
    if not isinstance(technique, Technique) or type(technique).exact:
        raise SettingError(f"draft={draft!r}: an approximate technique, such as LayerSkip(speedup=2).")
    assistant = _drafts.setdefault(model, {}).get(technique.digest)
    if assistant is None:
        assistant = _drafts[model][technique.digest] = reference(model, technique)
    return model.generate(input_ids, assistant_model=assistant, **hf_generate_kwargs)  # type: ignore[operator]
