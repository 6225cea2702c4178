"""The operators of sparse attention on a GPU: what they launch agrees with their PyTorch bodies, in the interpreter."""

from __future__ import annotations

from typing import Any

import interpreted_lowering as cases
import pytest
import torch

from fxopt.codegen import lowering_sparse
from fxopt.codegen.kernels import Unsupported


@pytest.mark.parametrize("method", [pytest.param("pages", marks=pytest.mark.slow), "features", "8 bits", "4 bits"])
def test_a_conversation(interpreted: Any, method: str) -> None:
    interpreted(cases.case_conversation, method=method)


def test_heads_with_settings_of_their_own(interpreted: Any) -> None:
    interpreted(cases.case_heads)


def test_top_p(interpreted: Any) -> None:
    interpreted(cases.case_tau)


def test_windows(interpreted: Any) -> None:
    interpreted(cases.case_windows)


def test_what_has_no_kernel() -> None:
    def tensors(heads: int = 8, kv_heads: int = 2, width: int = 64, dtype: torch.dtype = torch.float16) -> list[Any]:
        shapes = ((heads, 1), (kv_heads, 9), (kv_heads, 9))
        return [torch.empty(1, number, tokens, width, dtype=dtype) for number, tokens in shapes]

    lowering_sparse.check(*tensors(), block=16)
    lowering_sparse.check(*tensors(heads=2), block=1, dense_heads=(0,))
    for given, options, word in (
        (tensors(dtype=torch.float64), {}, "float64"),
        (tensors(width=512), {"block": 16}, "head_dim is 512"),
        (tensors(), {"block": 12}, "gather is 12"),
        (tensors(heads=128, kv_heads=64), {"dense_heads": (1,)}, "64 KV heads"),
        (tensors(heads=300, kv_heads=1), {}, "300 query heads"),
    ):
        with pytest.raises(Unsupported, match=word):
            lowering_sparse.check(*given, **options)


def test_lists_are_cut_into_about_thirty_programs() -> None:
    sizes = [lowering_sparse.list_split(positions) for positions in (1, 512, 2048, 2049, 8192, 1 << 20)]
    assert sizes == [64, 64, 64, 128, 256, 512]


def test_every_operator_has_a_kernel() -> None:
    for name in (
        "update_page_bounds", "update_features", "page_scores", "feature_scores", "choose", "gathered_attention",
    ):  # fmt: skip
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fxopt::{name}", "CUDA"), name
