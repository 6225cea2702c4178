"""Attention that reads the filled part of a static cache: what was done, and a decode step's time by filled length.

python examples/attention.py
"""

import time

import torch

import fxopt


def step_time(model, length, filled, repeats=10):
    """Median seconds of a decode step on a cache of `length` positions of which `filled` are in use."""
    from transformers import StaticCache

    config = model.config
    cache = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, torch.float32, "cpu")
    mask = (torch.arange(length) < filled)[None, None, None]
    token, position, times = torch.tensor([[7]]), torch.tensor([[filled - 1]]), []
    for _ in range(repeats + 2):
        for layer in cache.layers:
            layer.cumulative_length.fill_(filled - 1)
        began = time.perf_counter()
        model(token, attention_mask=mask, position_ids=position, past_key_values=cache)
        times.append(time.perf_counter() - began)
    return sorted(times)[repeats // 2]


def main(length=4096):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
                         num_attention_heads=16, num_key_value_heads=4, head_dim=64,
                         max_position_embeddings=length)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([[5, 17, 3, 99]])
    settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = model.generate(prompt, **settings)
    lengths = (length // 16, length // 4, length)
    eager = [step_time(model, length, filled) for filled in lengths]

    fxopt.compile(model)
    assert torch.equal(model.generate(prompt, **settings), expected)  # token for token
    print(fxopt.report(model).why("cache_extent", "model.layers.0.self_attn"))
    for filled, before in zip(lengths, eager, strict=True):
        after = step_time(model, length, filled)
        print(f"filled {filled:5d} of {length}: eager {before * 1e3:6.2f} ms, fxopt {after * 1e3:6.2f} ms")
    print(fxopt.report(model).summary())


if __name__ == "__main__":
    with torch.no_grad():
        main()
