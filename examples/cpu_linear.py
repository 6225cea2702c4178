"""Linears of few rows on a CPU: a decode step of several rows at once, with the library's products and without.

python examples/cpu_linear.py
"""

import time

import torch

import fxopt


def decode_step(model, batch, filled=64):
    """A function that does one decode step of `batch` rows on a static cache of which a part is in use."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=2 * filled)
    ids = torch.arange(batch * filled).view(batch, filled) % model.config.vocab_size
    with torch.compiler.set_stance("force_eager"):
        model(ids, past_key_values=cache)

    def step():
        logits = model(ids[:, -1:], past_key_values=cache).logits
        for layer in cache.layers:
            layer.cumulative_length.fill_(filled)  # back to where it was
        return logits

    return step


def main(width=768, layers=4, batches=(1, 4), rounds=15):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32000, hidden_size=width, intermediate_size=8 * width // 3 // 32 * 32,
                         num_hidden_layers=layers, num_attention_heads=width // 64,
                         num_key_value_heads=width // 128)  # fmt: skip
    models = {"library": LlamaForCausalLM(config).eval(), "cpu_linear": LlamaForCausalLM(config).eval()}
    models["cpu_linear"].load_state_dict(models["library"].state_dict())
    fxopt.compile(models["library"], disable=("cpu_linear",))
    fxopt.compile(models["cpu_linear"])
    for batch in batches:
        steps = {name: decode_step(model, batch) for name, model in models.items()}
        torch.testing.assert_close(steps["cpu_linear"](), steps["library"](), atol=1e-4, rtol=1e-4)
        times = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - began)
        medians = [f"{name} {sorted(own)[rounds // 2] * 1e3:6.2f} ms" for name, own in times.items()]
        print(f"{batch} rows: {', '.join(medians)}")
    print(fxopt.report(models["cpu_linear"]).why("cpu_linear", "model.layers.0.mlp.gate_proj"))


if __name__ == "__main__":
    with torch.no_grad():
        main()
