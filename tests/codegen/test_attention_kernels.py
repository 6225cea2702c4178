"""Decode attention in Triton's interpreter, against float64.

The cases, in `interpreted_attention.py`, run in one child process. The interpreter computes bfloat16 wrongly, hence
float16 and float32; it shows no races and no speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import interpreted_attention as cases
import pytest
import torch

from fxopt.codegen.kernels.attention import DecodeAttention, decode_attention, empty_partials
from fxopt.codegen.kernels.attention_variants import kernel_names, source

Run = Callable[..., None]


@pytest.mark.parametrize("length", [1, 63, 100, 1027])
@pytest.mark.parametrize(
    ("group", "softmax"), [(1, "async"), (4, "async"), (7, "async"), (8, "async"), (1, "online"), (7, "online")]
)
def test_lengths_and_groups(interpreted: Run, length: int, group: int, softmax: str) -> None:
    interpreted(cases.case_shapes, length=length, group=group, head_dim=64, dtype="float32", softmax=softmax)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("group", "softmax"), [(1, "async"), (4, "async"), (4, "online")])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(interpreted: Run, head_dim: int, group: int, dtype: str, softmax: str) -> None:
    interpreted(cases.case_shapes, length=100, group=group, head_dim=head_dim, dtype=dtype, softmax=softmax)


@pytest.mark.parametrize("softmax", ["async", "online"])
@pytest.mark.parametrize("name", cases.VARIANTS)
def test_variants(interpreted: Run, name: str, softmax: str) -> None:
    interpreted(cases.case_variant, name=name, softmax=softmax, shared=False)


@pytest.mark.parametrize("name", ["bool", "bool, one row", "additive", "everything"])
def test_masks_shared_by_the_rows(interpreted: Run, name: str) -> None:
    interpreted(cases.case_variant, name=name, softmax="async", shared=True)


def test_any_strides(interpreted: Run) -> None:
    interpreted(cases.case_strides)


@pytest.mark.parametrize(
    ("dtype", "group", "phi", "recomputed"),
    [
        ("float16", 2, -16.8, True),  # exp(6.5 + 16.8) is far above 65504
        ("float16", 2, -5.15, True),
        ("float16", 2, 0.0, False),
        ("float16", 2, 6.5, False),
        ("float16", 2, 26.5, True),  # every probability underflows
        ("float16", 1, -16.8, False),  # one row: probabilities stay float32
        ("float32", 2, -16.8, False),
        ("float32", 2, 6.5, False),
        ("float32", 2, 56.5, False),
        ("float32", 2, 86.5, True),
        ("float32", 2, -75.0, True),
        ("float32", 1, 86.5, True),
        ("float32", 1, -75.0, True),
    ],
)
def test_phi_over_the_range(interpreted: Run, dtype: str, group: int, phi: float, recomputed: bool) -> None:
    interpreted(cases.case_phi, dtype=dtype, group=group, phi=phi, recomputed=recomputed)


@pytest.mark.parametrize(
    ("scores", "recomputed"),
    [
        ([500.0, 499.0, -500.0], 2),
        ([-500.0, -501.0], 2),
        ([0.0, -500.0], 0),  # one low element is harmless
        ([float("inf"), 0.0], 2),
        ([float("-inf"), 0.0], 0),
    ],
)
def test_extreme_scores(interpreted: Run, scores: list[float], recomputed: int) -> None:
    interpreted(cases.case_extreme_scores, scores=scores, recomputed=recomputed)


@pytest.mark.parametrize("softmax", ["async", "online"])
def test_overflowing_rows_are_recomputed(interpreted: Run, softmax: str) -> None:
    interpreted(cases.case_overflowing_rows, softmax=softmax)


def test_overflowing_numerators_are_recomputed(interpreted: Run) -> None:
    interpreted(cases.case_huge_values)


@pytest.mark.parametrize("softmax", ["async", "online"])
@pytest.mark.parametrize("kind", ["bool", "inf", "finite"])
def test_rows_with_nothing_visible(interpreted: Run, softmax: str, kind: str) -> None:
    interpreted(cases.case_nothing_visible, softmax=softmax, kind=kind)


@pytest.mark.parametrize("softmax", ["async", "online"])
@pytest.mark.parametrize("group", [1, 2])
def test_empty_rows_and_empty_cache(interpreted: Run, softmax: str, group: int) -> None:
    interpreted(cases.case_empty, softmax=softmax, group=group)


@pytest.mark.parametrize("softmax", ["async", "online"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_nan_scores_stay_nan(interpreted: Run, softmax: str, everywhere: bool) -> None:
    interpreted(cases.case_nan_score, softmax=softmax, everywhere=everywhere)


@pytest.mark.parametrize("softmax", ["async", "online"])
@pytest.mark.parametrize("group", [1, 2])
def test_poisoned_cache_and_scratch(interpreted: Run, softmax: str, group: int) -> None:
    interpreted(cases.case_poison, softmax=softmax, group=group)


@pytest.mark.parametrize("softmax", ["async", "online"])
@pytest.mark.parametrize(("dtype", "group"), [("float32", 1), ("float32", 3), ("float16", 3)])
def test_rows_are_independent_bit_for_bit(interpreted: Run, softmax: str, dtype: str, group: int) -> None:
    interpreted(cases.case_independence, softmax=softmax, dtype=dtype, group=group)


@pytest.mark.parametrize("group", [1, 4])
def test_masked_tail_changes_no_bit(interpreted: Run, group: int) -> None:
    interpreted(cases.case_masked_tail, group=group)


def test_partials_of_a_prefix_do_not_depend_on_the_length(interpreted: Run) -> None:
    interpreted(cases.case_prefix_partials)


def test_phi_per_row(interpreted: Run) -> None:
    interpreted(cases.case_phi_per_row)


def test_counter_adds_up_on_the_device(interpreted: Run) -> None:
    interpreted(cases.case_counter)


def test_source_holds_only_what_the_variant_needs() -> None:
    plain = DecodeAttention(torch.float16, 64, 4)
    text = source(plain)
    compile(text, "plain", "exec")
    for word in ("mask_at", "slope", "sinks", "tanh", "extent", "position = ", "program_id(2)"):
        assert word not in text, word
    rich = source(replace(plain, mask="bool", alibi=True, has_sinks=True, soft_cap=30.0, has_extent=True))
    for word in ("mask_at", "slope", "sinks", "tanh", "extent", "position = "):
        assert word in rich, word
    assert "program_id(2)" in source(replace(plain, group=71))
    online = source(replace(plain, softmax="online"))
    assert "unified" not in online
    for desc, written in ((plain, text), (replace(plain, softmax="online"), online)):
        assert [line[4:].partition("(")[0] for line in written.splitlines() if line.startswith("def ")] == list(
            kernel_names(desc)
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": torch.float64}, "float16, bfloat16 or float32"),
        ({"head_dim": 8}, "head_dim is 8"),
        ({"head_dim": 512}, "head_dim is 512"),
        ({"q_len": 17}, "q_len is 17"),
        ({"group": 0}, "group is 0"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0"),
        ({"window": 0}, "window is 0"),
        ({"mask": "causal"}, "mask is 'causal'"),
        ({"softmax": "lazy"}, "softmax is 'lazy'"),
        ({"split_size": 100}, "split_size is 100"),
        ({"mask_shared": True}, "mask_shared needs a mask"),
    ],
)
def test_impossible_descriptions(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeAttention(**({"dtype": torch.float16, "head_dim": 64, "group": 4} | fields))


def test_arguments_that_do_not_fit_the_description() -> None:
    desc = DecodeAttention(torch.float32, 64, 2)
    q, k, v = cases.tensors(desc, 2, 2, 10)
    phi = torch.zeros(2)
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("phi is missing", (q, k, v), {}),
        ("phi is .3,.; it needs .2,. or", (q, k, v), {"phi": torch.zeros(3)}),
        ("q is", (q[:, :3], k, v), {"phi": phi}),
        ("q is", (q, k[:, :1], v[:, :1]), {"phi": phi}),
        ("B, Hkv and S in common", (q, k, v[:, :, :9]), {"phi": phi}),
        ("B, Hkv and S in common", (q[:1], k, v), {"phi": phi}),
        ("cast them first", (q, k.half(), v), {"phi": phi}),
        ("extent is given", (q, k, v), {"phi": phi, "extent": torch.zeros(2, dtype=torch.int32)}),
        ("four dimensions", (q[0], k, v), {"phi": phi}),
        ("it needs int64", (q, k, v), {"phi": phi, "counter": torch.zeros(1)}),
        ("move them together", (q, k, v.to("meta")), {"phi": phi}),
        ("use empty_partials", (q, k, v), {"phi": phi, "partials": empty_partials(desc, 2, 2, 300, q.device)}),
    ]
    for message, positional, keywords in wrong:
        with pytest.raises(ValueError, match=message):
            decode_attention(desc, *positional, scale=1.0, **keywords)
    masked = replace(desc, mask="bool")
    with pytest.raises(ValueError, match="the description says 'bool'"):
        decode_attention(masked, q, k, v, scale=1.0, phi=phi, mask=torch.zeros(2, 1, 1, 10))
    with pytest.raises(ValueError, match="must broadcast to"):
        decode_attention(masked, q, k, v, scale=1.0, phi=phi, mask=torch.ones(2, 1, 1, 9, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="needs a GPU"):
        decode_attention(desc, q, k, v, scale=1.0, phi=phi)
