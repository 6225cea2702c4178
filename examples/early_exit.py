"""Early exit on a tiny random model: what the report says, how deep the steps went, and that it equals its reference.

python examples/early_exit.py
"""

from __future__ import annotations

import torch

import fxopt
from fxopt.passes.counters import DepthCounter, counters
from fxopt.passes.early_exit import EarlyExit
from fxopt.testing import TINY


def tiny() -> torch.nn.Module:
    """A seeded random Llama whose choices are clear enough to exit on."""
    model = TINY["llama"]()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 12)
    return model


def main() -> None:
    torch.set_num_threads(1)
    setting = EarlyExit(layers=(1, 2), confidence="margin", threshold=0.2, rows="each")
    model = fxopt.compile(tiny(), setting)
    ids = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    with torch.no_grad():
        tokens = model.generate(ids, **options)
        wanted = fxopt.reference(tiny(), setting).generate(ids, **options)
    print(fxopt.report(model).summary())
    for remark in fxopt.report(model).remarks:
        if remark.technique == "early_exit":
            print(f"  {remark.status} {remark.path}: {remark.message}")
    for counter in counters(DepthCounter):
        print(f"graph {counter.graph}: rows by layers that ran {counter.histogram}, mean {counter.mean_depth:.2f}")
    print("equals the reference:", torch.equal(tokens, wanted))


if __name__ == "__main__":
    main()
