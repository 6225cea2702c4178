"""Mixture of depths on a small Llama: decorate, compile, train a few steps, then decode causally."""

import time

import torch

import fxopt
from fxopt.passes.mixture_of_depths import MixtureOfDepths
from fxopt.passes.mod_counters import watching
from fxopt.passes.mod_reference import auxiliary_loss


def step_time(model, ids, rounds):
    """Median seconds of a forward and backward."""
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[2:])[rounds // 2]


def main(layers=4, width=256, length=512, capacity=0.125, steps=20, rounds=5, dense_backend="inductor"):
    from fxopt.bench.models import llama

    ids = torch.randint(0, 1000, (1, length))
    dense = llama(layers, width, heads=4, kv_heads=2, vocab_size=1000).train()
    dense.compile(backend=dense_backend)
    model = llama(layers, width, heads=4, kv_heads=2, vocab_size=1000).train()
    MixtureOfDepths(capacity=capacity)(model)
    fxopt.compile(model)
    gain = step_time(dense, ids, rounds) / step_time(model, ids, rounds)
    print(f"forward and backward, dense over routed: {gain:.2f}")
    print(fxopt.report(model).summary())

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(0, 1000, (4, 64))
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss + 0.1 * auxiliary_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    with torch.no_grad(), watching(model) as routes:
        model.forward(input_ids=ids, use_cache=False)
        for path, taken in routes().items():
            print(f"{path}: {taken.float().mean():.0%} of the tokens pass the predictor")
    print("generated:", model.generate(ids[:, :8], max_new_tokens=8, do_sample=False)[0, 8:].tolist())


if __name__ == "__main__":
    main()
