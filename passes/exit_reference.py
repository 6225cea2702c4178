"""The meaning of early exit in plain PyTorch: layers that go on filling their cache and change nothing.

Each layer is wrapped. Before layer n, where n is an exit, the state is scored with the model's own final norm and head.
A row that has exited passes every later layer unchanged; the layer is still called, on the state of the exit, so that
its cache receives that state through its own norm, projections and rotary embedding. What the layer computes beyond
that is thrown away: this defines the result and saves nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxopt.passes import confidence as measures
from fxopt.passes.modules import ModuleStack, WrappedLayer
from fxopt.passes.technique import SettingError

if TYPE_CHECKING:
    from fxopt.passes.early_exit import EarlyExit


class ModelHead:
    """Final norm and head of a model, found in its module tree; ``[B, S, W]`` to ``[B, S, V]``."""

    def __init__(self, model: nn.Module, stack: ModuleStack) -> None:
        self.head = _output_embedding(model)
        names = [name for name, _ in stack.owner.named_children()]
        later = names[names.index(stack.name) + 1 :]
        norms = [
            name for name in later
            if "norm" in f"{name}{type(getattr(stack.owner, name)).__name__}".lower() and "emb" not in name.lower()
        ]  # fmt: skip
        # OPT and some others register the final norm before the layers.
        norms += [
            n
            for n in names
            if n not in later and n.startswith("final") and "norm" in n and getattr(stack.owner, n) is not None
        ]
        self.norm = getattr(stack.owner, norms[0]) if norms else None
        self.project = getattr(stack.owner, "project_out", None)
        self.config = getattr(model, "config", None)
        self.bias = getattr(model, "final_logits_bias", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        config = self.config
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.project is not None:
            hidden = self.project(hidden)
        if getattr(config, "model_type", "") in ("t5", "mt5") and getattr(config, "tie_word_embeddings", False):
            hidden = hidden * config.d_model**-0.5  # type: ignore[union-attr]
        logits = self.head(hidden)
        if self.bias is not None:
            logits = logits + self.bias
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits


class ClassifierHead:
    """What an encoder does after its layers: final norm, pooler and classifier; ``[B, S, W]`` to ``[B, C]``."""

    def __init__(self, model: nn.Module) -> None:
        trunk: Any = model.base_model
        self.norm = getattr(trunk, "layernorm", None)
        self.pooler = getattr(trunk, "pooler", None)
        self.classifier: Any = model.classifier

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden = hidden if self.norm is None else self.norm(hidden)
        if not isinstance(self.classifier, nn.Linear):
            return self.classifier(hidden)  # picks its position itself
        return self.classifier(hidden[:, 0] if self.pooler is None else self.pooler(hidden))


def _output_embedding(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        for name in ("lm_head", "head", "output", "embed_out"):
            candidate = getattr(model, name, None)
            if isinstance(candidate, nn.Linear):
                return candidate
        raise SettingError(
            f"no head was found in {type(model).__name__} (get_output_embeddings(), lm_head, head); an exit scores the "
            "hidden state with the model's own head. Hand over the model with its head, not its trunk."
        )
    return head


class ExitState:
    """What one forward pass knows about its exits."""

    def __init__(self, setting: EarlyExit, head: Any, layers: int, *, whole: bool) -> None:
        self.setting = setting
        self.head = head
        self.at = 0 if whole else -1
        """The position whose state is looked at: an encoder's first, a decoder's last."""
        self.layers = layers
        self.exited: Tensor | None = None
        self.before: Tensor | None = None
        self.choice: Tensor | None = None
        self.run: Tensor | None = None
        self.active = True
        self.position = 0
        self.depths: list[list[int]] = []
        """For each forward pass, the number of layers that ran, row by row."""

    def begin(self, hidden: Tensor, filled: int) -> None:
        """A new forward pass; `filled`: tokens already in the cache."""
        rows = hidden.shape[0]
        self.exited = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
        self.choice = self.run = None
        self.position = filled + hidden.shape[1] - 1
        self.active = self.setting.phase == "all" or (filled > 0 and hidden.shape[1] == 1)
        self.depths.append([self.layers] * rows)

    def score(self, n: int, hidden: Tensor) -> None:
        """Decide at the exit after `n` layers; ``hidden: [B, S, W]``."""
        setting = self.setting
        assert self.exited is not None
        if not self.active or (setting.rows == "all" and bool(self.exited.all())):
            return
        if setting.confidence == "state":
            assert self.before is not None
            sure = measures.saturation(hidden[:, self.at], self.before)
        else:
            scores = self.head(hidden) if self.at == 0 else self.head(hidden[:, -1:])[:, -1]
            if setting.shortlist is not None:
                scores = scores[:, : setting.shortlist]
            if setting.confidence == "patience":
                self.choice, self.run = measures.agreement(scores, self.choice, self.run)
                sure = self.run
            elif callable(setting.confidence):
                sure = setting.confidence(scores)
            else:
                sure = measures.of_logits(setting.confidence, scores.shape[-1])(scores)
        newly = sure >= setting.threshold if setting.confidence == "patience" else sure > self._threshold(hidden)
        if setting.rows == "all":
            newly = newly.all().expand_as(self.exited)
        for row, goes in enumerate((newly & ~self.exited).tolist()):
            if goes:
                self.depths[-1][row] = n
        self.exited = self.exited | newly

    def _threshold(self, hidden: Tensor) -> Any:
        schedule = measures.schedule_of(self.setting.threshold)
        if schedule is None:
            return self.setting.threshold
        return schedule(torch.tensor(float(self.position), device=hidden.device))


class LayerWithExit(WrappedLayer):
    """A layer that passes rows that have exited through unchanged, after letting them fill the cache."""

    def __init__(self, layer: nn.Module, index: int, state: ExitState) -> None:
        super().__init__(layer, index)
        object.__setattr__(self, "state", state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        state: ExitState = self.state
        if self.index == 0:
            state.begin(hidden, _filled((*args, *kwargs.values())))
        if self.index in state.setting.layers:
            state.score(self.index, hidden)
        assert state.exited is not None
        state.before = hidden[:, state.at]
        result = self.layer(*args, **kwargs)
        keep = state.exited.reshape(-1, 1, 1)
        if isinstance(result, tuple):
            return (torch.where(keep, hidden, result[0]), *result[1:])
        return torch.where(keep, hidden, result)


def _filled(values: tuple[Any, ...]) -> int:
    for value in values:
        cache = getattr(value, "self_attention_cache", value)
        if hasattr(cache, "get_seq_length") and hasattr(cache, "layers"):
            return int(cache.get_seq_length()) if cache.layers and cache.layers[0].is_initialized else 0
    return 0


def with_exits(model: nn.Module, stack: ModuleStack, setting: EarlyExit) -> nn.Module:
    """`model` with its layers wrapped in place; ``model.exit_state.depths`` tells how deep each pass went."""
    generates = getattr(model, "can_generate", None)
    whole = generates is not None and not generates()
    head: Any = None
    if setting.confidence != "state":
        head = ClassifierHead(model) if whole else ModelHead(model, stack)
    state = ExitState(setting, head, len(stack), whole=whole)
    for index in range(len(stack)):
        stack.layers[index] = LayerWithExit(stack.layers[index], index, state)
    object.__setattr__(model, "exit_state", state)
    return model
