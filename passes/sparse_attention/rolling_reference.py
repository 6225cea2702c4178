"""What :mod:`.rolling` means, in eager PyTorch on a cache that forgets nothing: the query that the sinks meet.

Once `capacity` tokens were seen the sinks are as far away as in a full cache: the query that meets them is the one that
the attention would make at position ``capacity - 1``. The attention itself is asked for it, with the rotation of that
position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Nearer:
    """Runs attentions a second time at a nearer position for their queries; ``query`` is None until a cache is full."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.asks = self.decodes = False
        self.query: Tensor | None = None
        self.rotations: dict[int, tuple[Any, Any]] = {}
        """id of a rotation's first tensor -> the rotation (held, so that ids stay true), and that of the last place."""

    def attach(self, model: nn.Module) -> None:
        """Watch the rotary embeddings and the attentions of a Hugging Face model."""
        for name, child in model.named_modules():
            if name.rpartition(".")[2].startswith("rotary_emb"):
                child.register_forward_hook(self.rotated, with_kwargs=True)
            elif isinstance(getattr(child, "layer_idx", None), int):
                child.register_forward_pre_hook(self.ask, with_kwargs=True)

    def enter(self, decodes: bool) -> None:
        """A forward begins, of one new token or another."""
        self.decodes, self.query = decodes, None
        self.rotations.clear()

    def rotated(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Note what a rotary embedding gives at the last place, where a position is behind it."""
        places = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and not a.is_floating_point()]
        if self.decodes and any(int(p.max()) >= self.capacity for p in places):
            near = type(module).forward(module, *map(self._near, args), **{k: self._near(v) for k, v in kwargs.items()})
            self.rotations[id(output[0])] = output, near

    def ask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the query that an attention makes with the nearer rotation; its cache and result are left alone."""
        self.query = None
        given = kwargs.get("position_embeddings")
        found = self.rotations.get(id(given[0])) if given is not None else None
        if found is None:
            return
        # The cache has another name in every other model.
        changed = {name: None if hasattr(value, "get_seq_length") else value for name, value in kwargs.items()}
        changed |= {"position_embeddings": found[1], "attention_mask": None}
        self.asks = True
        try:
            with torch.no_grad():
                type(module).forward(module, *args, **changed)
        finally:
            self.asks = False

    def _near(self, value: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_floating_point():
            return value.clamp(max=self.capacity - 1)
        return value
