"""Models that the suites build from configs; random weights are as good as any for timing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def llama(layers: int = 12, width: int = 768, heads: int = 12, kv_heads: int = 4, **settings: Any) -> nn.Module:
    """A Llama-shaped causal LM, float32, eval."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError("this suite builds a Hugging Face model: pip install 'fxopt[hf]'") from error
    values: dict[str, Any] = {
        "vocab_size": 32000, "hidden_size": width, "intermediate_size": width * 8 // 3 // 64 * 64,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**values, **settings})).eval()
