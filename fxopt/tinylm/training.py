"""The recipe of the small model, its training forward and its optimizer; `examples/train_tinylm.py` runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.tinylm.haystack import Batch

Schedule = tuple[tuple[float, Any], ...]
"""Pairs of a fraction of the training and the value that holds from there."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the text."""

    hidden: int = 160
    intermediate: int = 480
    layers: int = 12
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 4096
    theta: float = 100_000.0
    tokens: int = 4096
    """Tokens a step."""
    muon_lr: float = 0.02
    writer_lr: tuple[float, float] = (1.0, 6.0)
    """Multiples of the rate for the matrices that write to the residual stream (o_proj, down_proj): in the layers of
    the first stack, and in those that join later, which find a stream that is already full."""
    adam_lr: float = 0.004
    warmup: int = 20
    """Steps in which the learning rates rise from nothing."""
    dropout: float = 0.1
    """Layer dropout of the deepest layer."""
    exit_weight: float = 0.3
    exit_rows: int = 1024
    """Positions a step that the exit is scored on; a multiple of 512."""
    gap: Schedule = ((0.0, 0.0), (0.44, 0.3), (0.87, 0.6))
    """Share of the steps whose positions jump once, so that short sequences show long distances (PoSE, 2309.10400)."""
    repeated: Schedule = ((0.0, 0.0), (0.54, 0.08), (0.64, 0.25), (0.82, 0.4))
    """Share of the sequences that repeat shuffled tokens, of which only the repetition is scored."""
    planted: Schedule = ((0.0, 0.1), (0.44, 0.2), (0.64, 0.25), (0.82, 0.4))
    """Share of the sequences with planted copies; at least 0.4 of the long ones, 0.9 in the last phase."""
    rates: Schedule = ((0.0, 1.0), (0.81, 0.19), (0.82, 0.3), (0.96, 0.25), (1.0, 0.02))
    """Learning rates over the training, piecewise linear, after the warm-up."""
    seed: int = 0
    growth: Schedule = ((0.0, 3), (0.12, 6), (0.28, 9), (0.4, 12))
    """From which fraction of the training the stack has how many layers."""
    contexts: Schedule = ((0.0, 256), (0.5, 512), (0.88, 4096))
    """From which fraction of the training sequences are how long."""
    long: int = 2048
    """The length of every `long_every`-th step between `long_from` of the training and the last phase."""
    long_from: float = 0.4
    long_every: int = 8
    long_planted: float = 0.4
    """Least share of the sequences of the long steps with planted copies."""
    density: float = 0.4
    """Mean part of a planted sequence that is planted lines."""
    tails: int = 0
    """Needle questions a step, in batches of fxopt/tinylm/haystack.py; 0 for the batches described above."""
    tail: int = 8
    """Tokens of such a question, text before it included."""
    alone: float = 0.65
    """Share of the questions that see no needle but their own."""
    answer_weight: float = 32.0
    """By how much the answer of a question outweighs a token of text in the loss."""
    half: bool = False
    """Whether matrices are multiplied in bfloat16: faster by half on a CPU that has AMX, slower on an older one."""

    @property
    def reach(self) -> int:
        """The longest context of the training."""
        return max(self.long, *(length for _, length in self.contexts)) + self.tail


LONG = replace(
    Recipe(), seed=1, tokens=2048, rates=((0.0, 0.3), (0.55, 0.3), (1.0, 0.0)), growth=((0.0, 12),),
    contexts=((0.0, 512),), long=4096, long_from=0.0, long_every=8, tails=16, half=True,
)  # fmt: skip
"""The second training, from the weights of the first: sixteen needle questions a step, behind four windows of 512
tokens spread over 4,096 positions or, every eighth step, behind all 4,096. Nothing but the rate follows the progress,
and that is constant at first, so that the number of steps can still be chosen while it runs."""

QUICK = replace(
    Recipe(), hidden=32, intermediate=64, layers=4, heads=4, kv_heads=1, head_dim=16, vocab=384, tokens=512,
    exit_rows=512,
    growth=((0.0, 2), (0.3, 4)), contexts=((0.0, 64), (0.5, 128), (0.9, 256)), long=256, warmup=1,
)  # fmt: skip


def build(recipe: Recipe) -> Any:
    """A LlamaForCausalLM whose layers start as the identity (output projections are zero)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocab, hidden_size=recipe.hidden, intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim, rms_norm_eps=1e-5,
        max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.theta},
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.05)
        for layer in model.model.layers:
            for name, weight in layer.named_parameters():
                if weight.dim() == 2:
                    weight.normal_(0, weight.shape[1] ** -0.5 / 2)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.zero_()
    return model


def rate_multiple(recipe: Recipe, name: str) -> float:
    """By what the learning rate of a matrix of the layers is multiplied."""
    if not name.endswith(("o_proj.weight", "down_proj.weight")):
        return 1.0
    index = int(name.split("layers.")[1].split(".")[0])
    return recipe.writer_lr[index >= recipe.growth[0][1]]


def rope_tables(recipe: Recipe, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each [length, head_dim]."""
    inverse = recipe.theta ** -(torch.arange(0, recipe.head_dim, 2).float() / recipe.head_dim)
    angles = torch.arange(length).float()[:, None] * inverse
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def attend(q, k, v, windows: int, mask):  # type: ignore[no-untyped-def]
    """Causal attention of q [B, H, T, D] over k and v, or that of `haystack.Batch` when there is a mask."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    extent = q.shape[2] - mask.shape[0]

    def fold(t):  # type: ignore[no-untyped-def]
        return t[0, :, :extent].unflatten(1, (windows, -1)).transpose(0, 1)

    text = F.scaled_dot_product_attention(fold(q), fold(k), fold(v), is_causal=True, enable_gqa=True)
    tails = F.scaled_dot_product_attention(q[:, :, extent:], k, v, attn_mask=mask, enable_gqa=True)
    return torch.cat((text.transpose(0, 1).flatten(1, 2)[None], tails), 2)


def block(x, qw, kw, vw, ow, gw, uw, dw, n1, n2, cos, sin, head_dim: int, windows: int, mask, dtype):  # type: ignore[no-untyped-def]
    """One Llama layer on x [B, T, hidden]: what the Hugging Face layer computes, in a form that compiles to few
    loops. Matrices are multiplied in `dtype`; attention stays in float32, whose backward is the faster on a CPU.
    """
    batch, length, width = x.shape

    def linear(t, *weights):  # type: ignore[no-untyped-def]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        return F.linear(t.to(dtype), weight.to(dtype))

    def rotate(t):  # type: ignore[no-untyped-def]
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat((-b, a), -1) * sin

    h = F.rms_norm(x, (width,), n1, 1e-5)
    qkv = linear(h, qw, kw, vw).float().view(batch, length, -1, head_dim).transpose(1, 2)
    q, k, v = qkv.split((qw.shape[0] // head_dim, kw.shape[0] // head_dim, vw.shape[0] // head_dim), 1)
    a = attend(rotate(q), rotate(k), v, windows, mask)
    x = x + linear(a.transpose(1, 2).reshape(batch, length, -1), ow)
    h = F.rms_norm(x, (width,), n2, 1e-5)
    gate, up = linear(h, gw, uw).chunk(2, -1)
    return x + linear(F.silu(gate) * up, dw)


class Trunk:
    """Runs the first `depth` layers of the Hugging Face model for training, with layer dropout, and keeps one exit
    state.
    """

    def __init__(self, model: Any, recipe: Recipe, compiled: bool) -> None:
        self.model, self.recipe = model, recipe
        self.block = torch.compile(block, dynamic=False) if compiled else block
        self.cos, self.sin = rope_tables(recipe, recipe.reach)
        torch._dynamo.config.cache_size_limit = 32

    def __call__(self, batch: Batch, depth: int, dropped: set[int], exit_at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch to two normed states [B, T, hidden]: the last, and after `exit_at` layers."""
        x = self.model.model.embed_tokens(batch.inputs)
        cos, sin = self.cos[batch.positions], self.sin[batch.positions]
        dtype = torch.bfloat16 if self.recipe.half else torch.float32
        early = x
        for index, layer in enumerate(self.model.model.layers[:depth]):
            if index not in dropped:
                a, m = layer.self_attn, layer.mlp
                x = self.block(
                    x, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, a.o_proj.weight,
                    m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight, layer.input_layernorm.weight,
                    layer.post_attention_layernorm.weight, cos, sin, self.recipe.head_dim, batch.windows, batch.mask, dtype,
                )  # fmt: skip
            if index + 1 == exit_at:
                early = x
        norm = self.model.model.norm
        shape = (x.shape[-1],)
        return F.rms_norm(x, shape, norm.weight, 1e-5), F.rms_norm(early, shape, norm.weight, 1e-5)


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of the full model and of one exit, with their gradients, in chunks that stay in the CPU's cache.

    last, early [N, hidden], head [V, hidden], targets [N], scored [N] (how much a position counts). The exit is
    scored on its first `rows` positions, half against the text and half against the full model's distribution.
    Returns the loss to train on and both parts.
    """

    @staticmethod
    def forward(ctx, last, early, head, targets, scored, rows: int, weight: float):  # type: ignore[no-untyped-def]
        chunk, total, exit_total = 512, scored.sum(), scored[:rows].sum().clamp(min=1)
        d_last, d_early, d_head = torch.empty_like(last), torch.zeros_like(early), torch.zeros_like(head)
        full, hard, soft = (torch.zeros(()) for _ in range(3))
        for start in range(0, len(last), chunk):
            here = slice(start, min(start + chunk, len(last)))
            goal, counts = targets[here, None], scored[here, None]
            scores = last[here] @ head.T
            picked = scores.gather(1, goal)
            top = scores.logsumexp(1, keepdim=True)
            full += ((top - picked) * counts).sum() / total
            chances = scores.sub_(top).exp_()
            if start < rows:
                e_scores = early[here] @ head.T
                e_top = e_scores.logsumexp(1, keepdim=True)
                hard += ((e_top - e_scores.gather(1, goal)) * counts).sum() / exit_total
                soft += ((e_top - (chances * e_scores).sum(1, keepdim=True)) * counts).sum() / exit_total
                slope = e_scores.sub_(e_top).exp_().sub_(chances, alpha=0.5)
                slope.scatter_add_(1, goal, torch.full(goal.shape, -0.5)).mul_(counts * (weight / exit_total))
                torch.mm(slope, head, out=d_early[here])
                d_head.addmm_(slope.T, early[here])
            chances.scatter_add_(1, goal, torch.full(goal.shape, -1.0)).mul_(counts / total)
            torch.mm(chances, head, out=d_last[here])
            d_head.addmm_(chances.T, last[here])
        ctx.save_for_backward(d_last, d_early, d_head)
        part = (hard + soft) / 2
        ctx.mark_non_differentiable(full, part)
        return full + weight * part, full, part

    @staticmethod
    def backward(ctx, slope, *_):  # type: ignore[no-untyped-def]
        return (*(slope * saved for saved in ctx.saved_tensors), None, None, None, None)


def orthogonalise(grads: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The nearest semi-orthogonal matrices to grads [N, a, b], roughly, by the quintic Newton-Schulz iteration of
    Muon, which bears bfloat16.
    """
    x = (grads / (grads.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    flip = x.shape[-2] > x.shape[-1]
    if flip:
        x = x.mT
    for _ in range(steps):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * (s @ s)) @ x
    return (x.mT if flip else x).float()


class Muon:
    """Momentum with orthogonalised updates for the matrices of the layers; those of one shape go through together."""

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        multiples: list[float],
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.parameters, self.multiples, self.momentum, self.dtype = parameters, multiples, momentum, dtype
        self.buffers = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, lr: float, decay: float = 0.02) -> None:
        groups: dict[torch.Size, list[int]] = {}
        for index, p in enumerate(self.parameters):
            if p.grad is not None:
                groups.setdefault(p.shape, []).append(index)
        for shape, members in groups.items():
            updates = []
            for index in members:
                grad, buffer = self.parameters[index].grad, self.buffers[index]
                assert grad is not None
                buffer.lerp_(grad, 1 - self.momentum)
                updates.append(grad.lerp(buffer, self.momentum))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for index, update in zip(members, orthogonalise(torch.stack(updates), dtype=self.dtype), strict=True):
                self.parameters[index].mul_(1 - lr * decay).add_(update, alpha=-lr * scale * self.multiples[index])
