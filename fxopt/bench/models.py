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


def weights_of_no_meaning(*, device: str = "cpu", dtype: torch.dtype = torch.float32, **shape: Any) -> nn.Module:
    """A Llama of any size with weights drawn where they lie, in [-0.03, 0.03), and norms of one.

    Made on the meta device first: drawing a billion numbers by the model's own initialisation takes longer than the
    measurement.
    """
    with torch.device("meta"):
        model = llama(**shape)
    rotary = llama(**{**shape, "layers": 1, "vocab_size": 8, "intermediate_size": 8}).model.rotary_emb  # type: ignore[union-attr]
    model.to(dtype).to_empty(device=device)
    model.tie_weights()  # type: ignore[operator]
    model.model.rotary_emb = rotary.to(device)  # type: ignore[union-attr]
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.uniform_(-0.03, 0.03, generator=generator)
    return model.eval()
