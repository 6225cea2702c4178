"""Kernels of sparse attention in Triton's interpreter, against loops and float64 (`interpreted_sparse.py`).

The interpreter computes bfloat16 wrongly, hence float16 and float32; it shows no races and no speed.
"""

from __future__ import annotations

from typing import Any

import interpreted_sparse as cases
import pytest
import torch

from fxopt.codegen.kernels import Unsupported, select_top
from fxopt.codegen.kernels.attention import DecodeAttention, decode_attention
from fxopt.codegen.kernels.attention_variants import source
from fxopt.codegen.kernels.select_scores import Scores
from fxopt.codegen.kernels.select_state import Kept
from fxopt.codegen.kernels.select_top import TopBlocks, choose, chunks_for


@pytest.mark.parametrize(
    ("blocks", "count", "block", "chunks", "kind"),
    [
        (1, 1, 1, 1, "random"),
        (63, 63, 16, 1, "equal"),
        (100, 7, 1, 1, "extreme"),
        (1027, 100, 16, 1, "ties"),
        (1500, 100, 1, 2, "extreme"),
        (2100, 64, 16, 3, "ties"),
        pytest.param(5000, 300, 1, 5, "random", marks=pytest.mark.slow),
        pytest.param(2500, 2500, 1, 2, "equal", marks=pytest.mark.slow),
    ],
)
def test_choose(interpreted: Any, blocks: int, count: int, block: int, chunks: int, kind: str) -> None:
    interpreted(cases.case_choose, blocks=blocks, count=count, block=block, chunks=chunks, kind=kind)


def test_nothing_to_choose(interpreted: Any) -> None:
    interpreted(cases.case_nothing_to_choose)


@pytest.mark.slow
def test_chunks_change_nothing(interpreted: Any) -> None:
    interpreted(cases.case_chunks_change_nothing)


@pytest.mark.parametrize(("width", "dtype"), [(64, "float32"), (80, "float16")])
def test_page_bounds_follow_the_keys(interpreted: Any, width: int, dtype: str) -> None:
    interpreted(cases.case_page_bounds, width=width, dtype=dtype)


@pytest.mark.parametrize("listed", [True, False])
def test_features_follow_the_keys(interpreted: Any, listed: bool) -> None:
    interpreted(cases.case_features, listed=listed)


@pytest.mark.parametrize("bits", [8, 4])
def test_features_in_few_bits(interpreted: Any, bits: int) -> None:
    interpreted(cases.case_coded_features, bits=bits)
    for group in (1, 4):
        interpreted(cases.case_coded_scores, bits=bits, group=group)


@pytest.mark.parametrize(
    ("group", "width", "dtype"), [(1, 64, "float32"), (4, 80, "float16"), (7, 96, "float32"), (8, 128, "float16")]
)
def test_page_scores(interpreted: Any, group: int, width: int, dtype: str) -> None:
    interpreted(cases.case_page_scores, group=group, width=width, dtype=dtype)


@pytest.mark.parametrize(
    ("group", "count", "dtype"), [(1, 8, "float32"), (4, 6, "float16"), (7, 16, "float32"), (8, 64, "float32")]
)
def test_feature_scores(interpreted: Any, group: int, count: int, dtype: str) -> None:
    interpreted(cases.case_feature_scores, group=group, count=count, dtype=dtype)


@pytest.mark.parametrize(
    ("length", "group", "head_dim", "block", "dtype", "softmax"),
    [
        (1, 4, 64, 1, "float32", "online"),
        (63, 1, 64, 1, "float32", "async"),
        (63, 4, 128, 16, "float16", "online"),
        (100, 1, 80, 16, "float32", "online"),
        (100, 7, 96, 16, "float16", "async"),
        (100, 8, 64, 1, "float32", "async"),
        pytest.param(1027, 4, 128, 1, "float16", "online", marks=pytest.mark.slow),
        pytest.param(1027, 8, 64, 16, "float32", "async", marks=pytest.mark.slow),
    ],
)
def test_attention_on_lists(
    interpreted: Any, length: int, group: int, head_dim: int, block: int, dtype: str, softmax: str
) -> None:
    interpreted(
        cases.case_gathered, length=length, group=group, head_dim=head_dim, block=block, dtype=dtype, softmax=softmax
    )


@pytest.mark.parametrize(
    ("block", "mask", "softmax", "group"),
    [(16, "bool", "async", 4), (1, "additive", "online", 4), (1, "bool", "online", 1), (16, "additive", "async", 1)],
)
def test_attention_on_lists_with_everything_else(
    interpreted: Any, block: int, mask: str, softmax: str, group: int
) -> None:
    interpreted(cases.case_gathered_with, block=block, mask=mask, softmax=softmax, group=group)


@pytest.mark.parametrize("softmax", ["async", "online"])
@pytest.mark.parametrize("group", [1, 4])
def test_nothing_listed_is_zero(interpreted: Any, softmax: str, group: int) -> None:
    interpreted(cases.case_nothing_listed, softmax=softmax, group=group)


@pytest.mark.parametrize(
    ("softmax", "group"),
    [("async", 4), pytest.param("online", 4, marks=pytest.mark.slow), pytest.param("async", 1, marks=pytest.mark.slow)],
)
def test_a_short_cache_gives_the_bits_of_dense_attention(interpreted: Any, softmax: str, group: int) -> None:
    interpreted(cases.case_whole_is_dense, softmax=softmax, group=group)


@pytest.mark.parametrize(("softmax", "group", "block"), [("async", 4, 16), ("online", 1, 1), ("async", 1, 16)])
def test_what_is_not_listed_is_not_read(interpreted: Any, softmax: str, group: int, block: int) -> None:
    interpreted(cases.case_gathered_poison, softmax=softmax, group=group, block=block)


@pytest.mark.parametrize(("softmax", "group"), [("async", 4), ("online", 1)])
def test_rows_are_independent_bit_for_bit(interpreted: Any, softmax: str, group: int) -> None:
    interpreted(cases.case_gathered_rows_are_independent, softmax=softmax, group=group)


# -- without the interpreter ----------------------------------------------------------------------------------------


def test_source_holds_only_what_the_variant_needs() -> None:
    plain = source(DecodeAttention(torch.float16, 64, 4, softmax="online", gather=1))
    for word in ("index_at", "whole"):
        assert word in plain
    for word in ("valid", "whole_heads", "// 16"):
        assert word not in plain, word
    rich = source(DecodeAttention(torch.float16, 64, 4, softmax="online", gather=16, counted=True, some_whole=True))
    for word in ("valid", "whole_heads", "// 16"):
        assert word in rich, word
    assert "index" not in source(DecodeAttention(torch.float16, 64, 4))
    limited = select_top.source(TopBlocks(16, True, (0, 1)))
    assert "tl.where(head == 1, limit1, limit)" in limited
    assert "tl.load(extent)" not in select_top.source(TopBlocks())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gather": 3}, "gather is 3"),
        ({"gather": 16, "q_len": 2}, "one query token"),
        ({"gather": 1, "window": 5}, "one query token"),
        ({"counted": True}, "need gather"),
    ],
)
def test_impossible_descriptions(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeAttention(**({"dtype": torch.float16, "head_dim": 64, "group": 4} | fields))


def test_what_no_kernel_takes() -> None:
    for make, word in (
        (lambda: Scores(torch.float64, 64, 4), "float64"),
        (lambda: Scores(torch.float16, 512, 4), "512 channels"),
        (lambda: Scores(torch.float16, 16, 4, bits=2), "2 bits"),
        (lambda: Kept(64, page=12), "pages of 12"),
        (lambda: Kept(300), "300 channels"),
    ):
        with pytest.raises(Unsupported, match=word):
            make()


def test_arguments_that_do_not_fit() -> None:
    desc = DecodeAttention(torch.float32, 64, 2, softmax="online", gather=16)
    q, k, v = cases.tensors(desc, 2, 2, 100)
    index = torch.zeros(2, 2, 3, dtype=torch.int64)
    for message, given in (
        ("index is missing", {}),
        ("valid is given", {"index": index, "valid": index[..., 0]}),
        (r"index is .3, 2, 3.; it needs", {"index": torch.zeros(3, 2, 3)}),
        ("whole_heads is given", {"index": index, "whole_heads": (1,)}),
        ("needs a GPU", {"index": index}),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            decode_attention(desc, q, k, v, scale=1.0, **given)
    with pytest.raises(ValueError, match="allowed are float32"):
        choose(torch.zeros(1, 2, 5), torch.zeros(1, 9), count=1)
    with pytest.raises(ValueError, match="3 limits for 2 KV heads"):
        choose(torch.zeros(1, 2, 5), torch.zeros(1, 5), count=1, limits=(1, 2, 3))
    with pytest.raises(RuntimeError, match="choose_row needs a GPU"):
        choose(torch.zeros(1, 2, 5), torch.zeros(1, 5), count=1)


def test_long_rows_are_cut_where_they_are_few() -> None:
    cpu = torch.device("cpu")  # one processor
    assert chunks_for(8, 1 << 18, cpu) == 1
    assert chunks_for(0, 100, cpu) == 1


def test_chunks_on_a_large_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cuda = torch.device("cuda")
    assert [chunks_for(8, blocks, cuda) for blocks in (2048, 8192, 8193, 1 << 15, 1 << 18)] == [1, 1, 2, 4, 16]
    assert [chunks_for(rows, 1 << 18, cuda) for rows in (1, 8, 32, 64, 132, 500)] == [16, 16, 5, 3, 1, 1]
