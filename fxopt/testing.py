"""Tiny models and a capture harness, for tests of passes and for anyone who writes a technique.

Every model is built from a config with a fixed seed: nothing is downloaded. They are small enough (width 64, two to
four layers, a vocabulary of 128) that compiling one takes seconds on a CPU, and they keep what makes an architecture
hard to match: grouped queries, sliding windows, norms on both sides, parallel branches, experts, cross-attention.

    >>> from fxopt.testing import TINY, capture, inputs_for
    >>> model = TINY["llama"]()
    >>> (graph_module,) = capture(model, **inputs_for("llama", model))
    >>> print(graph_module.graph)

All but ``TINY["handwritten"]`` need the ``hf`` extra (``pip install 'fxopt[hf]'``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["TINY", "Handwritten", "HandwrittenLayer", "capture", "capture_generate", "inputs_for"]

VOCAB = 128
WIDTH = 64
LAYERS = 3

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GATED = _DECODER | {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16}
_GPT = {"vocab_size": VOCAB, "n_positions": 256, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
_SEQ2SEQ_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}


class HandwrittenLayer(nn.Module):
    """One pre-norm decoder layer; ``x: [B, S, W]`` in and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Handwritten(nn.Module):
    """A decoder in plain PyTorch: an ``nn.ModuleList``, nothing of Hugging Face. ``ids: [B, S]`` to ``[B, S, V]``."""

    def __init__(self, layers: int = LAYERS, width: int = WIDTH, heads: int = 4, vocab: int = VOCAB) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(256, width)
        self.layers = nn.ModuleList(HandwrittenLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Build in float32 and eval mode from seed 0, leaving the caller's random state as it was.

    Norm weights and biases start at their trivial values (ones, zeros), which would hide a wrong rewrite; they are
    drawn too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _hf(model_class: str, config_class: str, **settings: Any) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("the tiny Hugging Face models need the `hf` extra: pip install 'fxopt[hf]'") from error
    config = getattr(transformers, config_class)(**settings)
    return _seeded(lambda: getattr(transformers, model_class)(config))


def _tiny(model_class: str, config_class: str, **settings: Any) -> Callable[[], nn.Module]:
    return partial(_hf, model_class, config_class, **settings)


TINY: dict[str, Callable[[], nn.Module]] = {
    "llama": _tiny("LlamaForCausalLM", "LlamaConfig", **_GATED),
    "qwen2": _tiny("Qwen2ForCausalLM", "Qwen2Config", **_GATED),
    "qwen3": _tiny("Qwen3ForCausalLM", "Qwen3Config", **_GATED),
    "mistral": _tiny("MistralForCausalLM", "MistralConfig", **_GATED, sliding_window=8),
    "gemma2": _tiny(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        **_GATED,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma3_text": _tiny(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        **_GATED | {"num_hidden_layers": 4},
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": _tiny("Phi3ForCausalLM", "Phi3Config", **_GATED),
    "gpt2": _tiny("GPT2LMHeadModel", "GPT2Config", **_GPT, bos_token_id=1, eos_token_id=None),
    "gpt_neox": _tiny("GPTNeoXForCausalLM", "GPTNeoXConfig", **_DECODER, intermediate_size=96),
    "opt": _tiny("OPTForCausalLM", "OPTConfig", **_DECODER, ffn_dim=96, word_embed_proj_dim=WIDTH),
    "falcon": _tiny("FalconForCausalLM", "FalconConfig", **_DECODER, new_decoder_architecture=False),
    "mixtral": _tiny("MixtralForCausalLM", "MixtralConfig", **_GATED, num_local_experts=4, num_experts_per_tok=2),
    "bert": _tiny("BertForMaskedLM", "BertConfig", **_DECODER, intermediate_size=96),
    "roberta": _tiny("RobertaForMaskedLM", "RobertaConfig", **_DECODER, intermediate_size=96),
    "vit": _tiny(
        "ViTForImageClassification",
        "ViTConfig",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
    ),
    "t5": _tiny(
        "T5ForConditionalGeneration",
        "T5Config",
        **_SEQ2SEQ_TOKENS,
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=16,
        d_ff=96,
        num_layers=LAYERS,
        num_heads=4,
    ),
    "bart": _tiny(
        "BartForConditionalGeneration",
        "BartConfig",
        **_SEQ2SEQ_TOKENS,
        vocab_size=VOCAB,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=LAYERS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=256,
        forced_eos_token_id=None,
    ),
    "gpt_oss": _tiny(
        "GptOssForCausalLM",
        "GptOssConfig",
        **_GATED,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "handwritten": lambda: _seeded(Handwritten),
}
"""Name to a builder of a seeded tiny model in eval mode (float32, width 64, vocabulary 128)."""


def inputs_for(name: str, model: nn.Module, *, batch: int = 2, length: int = 12) -> dict[str, Any]:
    """Example keyword arguments for one forward without a cache of ``TINY[name]()``.

    Token models get ``input_ids: [B, S]`` and ``use_cache=False``, encoder-decoder models also
    ``decoder_input_ids: [B, S - 3]``, image models ``pixel_values: [B, 3, H, W]``.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> Tensor:
        return torch.randint(3, VOCAB, (batch, count), generator=generator).to(device)

    if name == "handwritten":
        return {"ids": tokens(length)}
    config: Any = model.config
    if hasattr(config, "image_size"):
        size = config.image_size
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator).to(device)}
    if config.is_encoder_decoder:
        return {"input_ids": tokens(length), "decoder_input_ids": tokens(length - 3), "use_cache": False}
    return {"input_ids": tokens(length)} | ({"use_cache": False} if hasattr(config, "use_cache") else {})


class _Recorder:
    """A Dynamo backend: keeps a copy of every graph it is handed and runs the graph eagerly."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list[Tensor], **_: Any) -> Callable[..., Any]:
        # HF's generate passes mode="reduce-overhead" to whatever backend the model was compiled with.
        kept = torch.fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph), type(graph_module).__name__)
        kept.meta.update(graph_module.meta)
        self.graphs.append(kept)
        return graph_module.forward


@contextmanager
def _fresh_dynamo() -> Iterator[_Recorder]:
    torch._dynamo.reset()
    try:
        yield _Recorder()
    finally:
        torch._dynamo.reset()


def capture(
    model: Callable[..., Any], *args: Any, dynamic: bool | None = None, grad: bool = False, **kwargs: Any
) -> list[torch.fx.GraphModule]:
    """The torch-level graphs Dynamo makes of ``model(*args, **kwargs)``, in the order they were compiled.

    Dynamo is reset before and after. The graphs are copies, safe to rewrite; their weights are placeholders or shared
    with ``model``. ``dynamic`` is that of ``torch.compile``; ``grad=False`` runs under ``torch.no_grad()``.
    """
    with _fresh_dynamo() as recorder, torch.set_grad_enabled(grad):
        torch.compile(model, backend=recorder, dynamic=dynamic)(*args, **kwargs)
    return recorder.graphs


def capture_generate(
    model: Any, ids: Tensor, cache: Literal["static", "dynamic"] = "static", new_tokens: int = 4, **kwargs: Any
) -> list[torch.fx.GraphModule]:
    """The graphs of a greedy Hugging Face ``generate`` from ``ids: [B, S]``: the prompt first, then decode.

    The model is compiled in place while it generates (``torch.compile(model).generate`` would never reach the backend)
    and is left as it was. A dynamic cache recompiles with symbolic lengths, so later graphs may take ``SymInt`` inputs.
    """
    compiled_before = model._compiled_call_impl
    with _fresh_dynamo() as recorder, torch.no_grad():
        model.compile(backend=recorder)
        try:
            model.generate(
                ids,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                cache_implementation="static" if cache == "static" else None,
                **kwargs,
            )
        finally:
            model._compiled_call_impl = compiled_before
    return recorder.graphs
