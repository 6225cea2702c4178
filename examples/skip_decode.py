"""SkipDecode (Del Corro et al., arXiv 2307.02628) as a technique from outside the package.

Every position has one depth, the same for the whole batch, and depths never rise along the sequence; the layers that
remain are the first few and the topmost. Later tokens then never need keys of a layer that an earlier one skipped.
"""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch

import fxopt
from fxopt.passes import depth


@dataclass(frozen=True)
class SkipDecode(fxopt.Technique):
    name: ClassVar[str] = "skip_decode"
    layers_run: int = 8
    warm_up: int = 1

    def rewrite(self, graph, context):
        for stack in context.structure.stacks:
            top = len(stack.layers) - (self.layers_run - self.warm_up)
            for layer in reversed(stack.layers[self.warm_up : top]):
                if depth.phase_of(layer) == "decode":
                    depth.skip_layer(layer, context, keep_rows=False)
                    context.applied(layer.path, f"below the {self.layers_run - self.warm_up} topmost layers")


def generate(model, ids, depths, compiled=True):
    """Greedy tokens, one per entry of `depths` (non-increasing), and the seconds they took."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + len(depths))
    tokens = [model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)]
    started = time.perf_counter()
    for layers_run in depths:
        if compiled:
            fxopt.compile(model, SkipDecode(layers_run=layers_run))  # a depth met before finds its code again
        tokens.append(model(input_ids=tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1), time.perf_counter() - started


@torch.no_grad()
def main(layers=12, width=512, steps=24):
    from fxopt.bench.models import llama

    model = llama(layers, width, heads=8, kv_heads=2, vocab_size=1024)
    ids = torch.randint(0, 1024, (4, 64))
    half = steps // 2
    for name, depths in (("full depth", [layers] * steps), ("SkipDecode", [layers // 2] * half + [layers // 3] * half)):
        generate(model, ids, depths)  # compiles
        print(f"{name:<11} {steps * 4 / generate(model, ids, depths)[1]:8.1f} tokens/s")


if __name__ == "__main__":
    main()
