"""What FlatGemm would put into one kernel: a dry run on captured graphs, on a CPU, with no weight read.

    python examples/flat_gemm.py            # a tiny Llama, one token for each of four sequences
    python examples/flat_gemm.py gpt_neox 1

On a CUDA or ROCm device ``torch.compile(model, backend="fxopt")`` does it; on a CPU the technique is blocked (FX207).
"""

import sys

import torch

from fxopt.codegen import roofline
from fxopt.codegen.dataflow import model_thresholds
from fxopt.passes.context import PassContext
from fxopt.passes.flat_gemm import origin, plan_groups
from fxopt.passes.linear_groups import linears_of
from fxopt.passes.provenance import number_nodes
from fxopt.passes.record import GraphRecord
from fxopt.testing import TINY, capture, inputs_for


def main(name="llama", batch=4, device="H200"):
    model = TINY[name]()
    print(f"{name}, {batch} rows, decisions for one {device} by the roofline model")
    for graph_module in capture(model, **inputs_for(name, model, batch=batch, length=1)):
        number_nodes(graph_module.graph)
        context = PassContext(graph_module.graph, "flat_gemm", GraphRecord(0, "-", name))
        groups = plan_groups(graph_module.graph, context)
        linears, replaced = len(linears_of(graph_module.graph)), sum(len(group.nodes) for group in groups)
        print(f"{linears} linears in {len(groups)} groups, which replace {replaced} nodes")
        seen = set()
        for group in groups:
            if group.fused in seen:  # layers with the same shapes share a kernel
                continue
            seen.add(group.fused)
            n, k = sum(group.fused.widths), group.fused.depth
            choice = model_thresholds(n, k, "bfloat16", roofline.DEVICES[device]).choose(batch)
            flops, moved = roofline.fused_linear(group.fused, size=2).at(M=batch)
            print(f"  {choice:<7} {group.describe()}")
            print(f"          {origin(group)}: {flops / moved:.1f} FLOP per byte in bfloat16")
        for remark in context.remarks:
            print(f"  left alone: {remark.path} {remark.code} {remark.message}")


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
