"""The call of a layer for C of its tokens: every argument that follows the tokens, cut at the original places."""

from __future__ import annotations

import pytest
import torch

from fxopt import SettingError
from fxopt.passes.regions import Call, Keys, Selection, ascending, padding, rows

B, S, W, D = 2, 7, 6, 4
INDEX = torch.tensor([[0, 3, 5], [1, 2, 6]])
NAMES = ("hidden_states", "attention_mask", "position_ids")


def selection(valid=None):
    return Selection(INDEX, valid, S)


def causal(batch=1, heads=1):
    return torch.ones(S, S, dtype=torch.bool).tril().expand(batch, heads, S, S).clone()


def test_members_come_first_and_ascending_and_fillers_after_them():
    member = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 0, 1, 0]]).bool()
    found = ascending(member, 3)
    assert found.places[0, :2].tolist() == [1, 3] and found.valid.tolist() == [[True, True, False], [True, True, True]]
    assert found.places[1].tolist() == [0, 1, 3]
    assert len({*found.places[0].tolist()}) == 3


def test_rotary_tables_and_positions_are_taken_at_the_original_places():
    x = torch.randn(B, S, W)
    cos, sin = torch.randn(1, S, D), torch.randn(B, S, D)
    ids = torch.arange(S)[None]
    call = Call(NAMES, (x,), {"position_embeddings": (cos, sin), "position_ids": ids, "use_cache": False})
    stream, args, kwargs = call.at(selection())
    assert torch.equal(stream, torch.stack([x[b, INDEX[b]] for b in range(B)])) and args == (stream,)
    assert torch.equal(kwargs["position_ids"], INDEX)
    for table, cut in zip((cos, sin), kwargs["position_embeddings"], strict=True):
        assert torch.equal(cut, torch.stack([table.expand(B, S, D)[b, INDEX[b]] for b in range(B)]))
    assert kwargs["use_cache"] is False


def test_tables_with_a_head_dimension():
    table = torch.randn(1, 1, S, D)
    _, _, kwargs = Call(NAMES, (torch.randn(B, S, W),), {"rotary": table}).at(selection())
    assert torch.equal(kwargs["rotary"][1, 0], table[0, 0, INDEX[1]])


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_is_cut_in_rows_and_columns(additive):
    mask = causal(B, 3)
    mask[1, :, :, 2] = False
    given = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask
    _, args, _ = Call(NAMES, (torch.randn(B, S, W), given), {}).at(selection())
    for b in range(B):
        assert torch.equal(args[1][b], given[b][:, INDEX[b]][:, :, INDEX[b]])


def test_no_selected_token_sees_a_filler():
    valid = torch.tensor([[True, True, False], [True, True, True]])
    _, args, _ = Call(NAMES, (torch.randn(B, S, W), torch.ones_like(causal())), {}).at(selection(valid))
    assert args[1][0, 0].tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert args[1][1].all()


def test_padding_is_what_may_not_see_itself():
    mask = causal(B)
    mask[0, :, :, :2] = False
    expected = torch.ones(B, S, dtype=torch.bool)
    expected[0, :2] = False
    assert torch.equal(padding(mask, S), expected)
    assert torch.equal(padding(torch.where(mask, 0.0, torch.finfo(torch.float32).min), S), expected)
    assert torch.equal(padding(expected.long(), S), expected)
    assert padding(None, S) is None


def test_a_mask_over_cached_rows_of_a_sliding_layer():
    keys = Keys(torch.tensor([[2, 7, 10, 11], [-1, 9, 10, 12]]), start=10, window=4, first=torch.tensor([[2], [2]]))
    mask = torch.ones(B, 1, 3, 6, dtype=torch.bool)  # queries 10 to 12, columns 7 to 12
    mask = mask.tril(3)
    chosen = Selection(torch.tensor([[0, 1], [0, 2]]), None, 3)
    _, args, kwargs = Call(NAMES, (torch.randn(B, 3, W), mask), {}).at(chosen, keys)
    assert args[1][0, 0].tolist() == [[False, True, True, False], [False, True, True, True]]
    assert args[1][1, 0].tolist() == [[False, True, True, False], [False, True, True, True]]
    _, _, kwargs = Call(NAMES, (torch.randn(B, 3, W),), {}).at(chosen, keys)
    assert kwargs["attention_mask"][0, 0].tolist() == [[False, True, True, False], [False, False, True, True]]


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("freqs", torch.randn(S, D), r"freqs .*\[7, 4\]"),
        ("anything", torch.randn(S), "7 tokens"),
        ("attention_mask", torch.ones(S, S), "batch or 1, heads or 1"),
        ("attention_mask", object(), "sdpa"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(argument, value, says):
    call = Call(NAMES, (torch.randn(B, S, W),), {argument: value})
    with pytest.raises(SettingError, match=says):
        call.at(selection())


def test_what_does_not_follow_the_tokens_is_left_alone():
    fixed = torch.randn(5, 3)
    given = {"weights": fixed, "flag": True, "nothing": None}
    _, _, kwargs = Call(NAMES, (torch.randn(B, S, W),), given).at(selection())
    assert kwargs["weights"] is fixed and kwargs["flag"] is True and kwargs["nothing"] is None


def test_the_stream_may_be_given_by_name():
    x = torch.randn(B, S, W)
    _, args, kwargs = Call(NAMES, (), {"hidden_states": x}).at(selection())
    assert args == () and torch.equal(kwargs["hidden_states"], rows(x, INDEX))
    with pytest.raises(SettingError, match="batch, sequence, width"):
        Call(NAMES, (torch.randn(S, W),), {})
