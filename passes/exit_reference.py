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


class Scorer:
    """What is read at an exit, in plain PyTorch: logits of the state, and how sure they, or the state, are."""

    def __init__(self, setting: EarlyExit, model: nn.Module, stack: ModuleStack, *, whole: bool) -> None:
        self.setting = setting
        self.own = setting.find(model)
        self.whole = whole
        self._model = None if whole and not setting.reads_logits else model
        self._stack = stack
        self._head: Any = None

    @property
    def head(self) -> Any:
        """The model's own; ``[B, S, W]`` to ``[B, S, V]``, of an encoder to ``[B, C]``."""
        if self._head is None:
            assert self._model is not None, "an encoder without a head is scored by its states"
            self._head = ClassifierHead(self._model) if self.whole else ModelHead(self._model, self._stack)
        return self._head

    def logits(self, n: int, hidden: Tensor) -> Tensor:
        """``hidden: [B, S, W]`` after n layers; ``[B, S, V]``, of an encoder ``[B, C]``."""
        own = self.own.heads.get(n)
        if own is None:
            return self.head(hidden)
        return own(hidden[:, 0] if self.whole else hidden)

    def sure(self, n: int, hidden: Tensor, before: Tensor, logits: Tensor | None) -> Tensor:
        """Confidence of states ``hidden, before: [N, W]`` after n and n - 1 layers, or of ``logits: [N, V]``."""
        kind = self.setting.confidence
        if kind == "state":
            return measures.saturation(hidden, before)
        if n in self.own.classifiers:
            return measures.of_classifier(self.own.classifiers[n](hidden))
        assert logits is not None
        scores = self.shortened(logits)
        return (kind if callable(kind) else measures.of_logits(kind, scores.shape[-1]))(scores)

    def shortened(self, logits: Tensor) -> Tensor:
        """The logits of the shortlist."""
        if self.own.tokens is not None:
            return logits.index_select(-1, self.own.tokens.to(logits.device))
        return logits if self.setting.shortlist is None else logits[..., : self.setting.shortlist]


class ExitState:
    """What one forward pass knows about its exits."""

    def __init__(self, setting: EarlyExit, scorer: Scorer, layers: int) -> None:
        self.setting = setting
        self.scorer = scorer
        self.at = 0 if scorer.whole else -1
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
        self._left: list[tuple[int, Tensor, Tensor]] = []

    def begin(self, hidden: Tensor, filled: int) -> None:
        """A new forward pass; `filled`: tokens already in the cache."""
        rows = hidden.shape[0]
        self.exited = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
        self.choice = self.run = None
        self.position = filled + hidden.shape[1] - 1
        self.active = self.setting.phase == "all" or (filled > 0 and hidden.shape[1] == 1)
        self.depths.append([self.layers] * rows)
        self._left = []

    def score(self, n: int, hidden: Tensor) -> None:
        """Decide at the exit after `n` layers; ``hidden: [B, S, W]``."""
        setting = self.setting
        assert self.exited is not None and self.before is not None
        if not self.active or (setting.rows == "all" and bool(self.exited.all())):
            return
        logits: Tensor | None = None
        if setting.reads_logits:
            scored = self.scorer.logits(n, hidden if self.scorer.whole else hidden[:, -1:])
            logits = scored if self.scorer.whole else scored[:, -1]
        if setting.confidence == "patience":
            assert logits is not None
            self.choice, self.run = measures.agreement(self.scorer.shortened(logits), self.choice, self.run)
            newly = self.run >= setting.threshold
        else:
            newly = self.scorer.sure(n, hidden[:, self.at], self.before, logits) > self._threshold(hidden)
        if setting.rows == "all":
            newly = newly.all().expand_as(self.exited)
        leaves = newly & ~self.exited
        for row, goes in enumerate(leaves.tolist()):
            if goes:
                self.depths[-1][row] = n
        if n in self.scorer.own.heads and bool(leaves.any()):
            self._left.append((n, leaves, hidden))
        self.exited = self.exited | newly

    def finish(self, _model: nn.Module, _args: Any, output: Any) -> Any:
        """Forward hook: rows that left at an exit with a head of its own have that head's logits."""
        if not self._left:
            return output
        logits = output[0] if isinstance(output, tuple) else output.logits
        for n, leaves, hidden in self._left:
            if self.scorer.whole:
                mine = self.scorer.logits(n, hidden)
            else:
                mine = self.scorer.logits(n, hidden[:, hidden.shape[1] - logits.shape[1] :])
            logits = torch.where(leaves.reshape(-1, *[1] * (logits.ndim - 1)), mine, logits)
        if isinstance(output, tuple):
            return (logits, *output[1:])
        output.logits = logits
        return output

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
            # Of a hybrid model, layers of a convolution or a recurrence know no length.
            attending = [layer for layer in cache.layers if hasattr(layer, "get_seq_length")]
            return int(attending[0].get_seq_length()) if attending and attending[0].is_initialized else 0
    return 0


def with_exits(model: nn.Module, stack: ModuleStack, setting: EarlyExit, *, whole: bool) -> nn.Module:
    """`model` with its layers wrapped in place; ``model.exit_state.depths`` tells how deep each pass went."""
    state = ExitState(setting, Scorer(setting, model, stack, whole=whole), len(stack))
    for index in range(len(stack)):
        stack.layers[index] = LayerWithExit(stack.layers[index], index, state)
    object.__setattr__(model, "exit_state", state)
    if state.scorer.own.heads:
        model.register_forward_hook(state.finish)
    return model
