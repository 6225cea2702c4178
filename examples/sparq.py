"""SparQ attention (Ribar et al., arXiv 2312.04985) as a selection function of one's own.

Each KV head takes the channels in which its queries are largest, scores every position on those alone, and attends to
the best sixteenth. The function is traced into the graph; the keys by channel are kept beside the cache.
"""

import time

import torch
from torch import nn
from torch.nn import functional as F

import fxopt

HEADS, KV_HEADS, WIDTH, LENGTH = 32, 8, 128, 8192


def sparq(q, keys, state):
    """q [B, Hkv, G, D], keys [B, Hkv, S, D], state [B, Hkv, D, S] -> scores [B, Hkv, S]."""
    channels = q.abs().sum(2).topk(16, -1)[1]  # [B, Hkv, 16]
    rows = torch.take_along_dim(state, channels[..., None], 2)  # an eighth of the keys is read
    return torch.matmul(torch.take_along_dim(q, channels[:, :, None], 3), rows).amax(2)


class Attention(nn.Module):
    """A decode step on a static cache."""

    def __init__(self):
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(1, KV_HEADS, LENGTH, WIDTH))

    def forward(self, q, k, v, at, mask):
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)


def milliseconds(module, steps=24):
    times = []
    for step in range(LENGTH - steps, LENGTH):
        mask = (torch.arange(LENGTH) <= step)[None, None, None]
        q, k, v = (torch.randn(1, h, 1, WIDTH) for h in (HEADS, KV_HEADS, KV_HEADS))
        started = time.perf_counter()
        module(q, k, v, torch.tensor([step]), mask)
        times.append(time.perf_counter() - started)
    return sorted(times)[steps // 2] * 1e3


torch.set_num_threads(1)  # a step is too short to share out between busy cores
with torch.no_grad():
    exact = milliseconds(fxopt.compile(Attention()))
    sparse = milliseconds(fxopt.compile(Attention(), fxopt.SparseAttention(select=sparq, budget=1 / 16)))
print(f"a step on {LENGTH} positions: exact {exact:.2f} ms, SparQ {sparse:.2f} ms")
