"""Rows of a batch that exit at different depths: alone, together, permuted, padded, and over several conversations."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import StaticCache

import fxopt
from fxopt.passes.early_exit import EarlyExit
from fxopt.testing import TINY

IDS = torch.randint(3, 128, (3, 6), generator=torch.Generator().manual_seed(5))
EACH = EarlyExit(layers=(1, 2), confidence="margin", threshold=0.1, rows="each")


def sharp():
    model = TINY["llama"]()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 12)
    return model


@pytest.fixture
def compiled(eager_lowering):
    with torch._dynamo.config.patch(recompile_limit=64):
        yield fxopt.compile(sharp(), EACH, strict=True)


@torch.no_grad()
def write(model, ids, tokens=8, mask=None):
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        cache_implementation="static", disable_compile=True, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def test_alone_in_a_batch_and_permuted(compiled):
    tokens, logits = write(compiled, IDS)
    reference = fxopt.reference(sharp(), EACH)
    write(reference, IDS)
    depths = reference.exit_state.depths
    assert any(len(set(rows)) > 1 for rows in depths), "rows are meant to part"
    order = torch.tensor([2, 0, 1])
    assert torch.equal(write(compiled, IDS[order])[0], tokens[order])
    for row in range(3):
        alone, alone_logits = write(compiled, IDS[row : row + 1])
        assert torch.equal(alone, tokens[row : row + 1])
        torch.testing.assert_close(alone_logits, logits[row : row + 1], atol=1e-5, rtol=1e-5)


def test_padding_changes_no_row(compiled):
    tokens, logits = write(compiled, IDS)
    padded = torch.cat((torch.zeros(3, 2, dtype=torch.int64), IDS), 1)
    padded[0] = torch.cat((IDS[0].flip(0)[:2], IDS[0]))  # a longer neighbour
    mask = (padded != 0).long()
    got, got_logits = write(compiled, padded, mask=mask)
    assert torch.equal(got[1:], tokens[1:])
    torch.testing.assert_close(got_logits[1:], logits[1:], atol=1e-5, rtol=1e-5)


def test_an_exited_row_keeps_the_logits_of_its_exit(compiled):
    """The later layers, whatever their weights, do not reach the logits of a row that has left."""
    _, logits = write(compiled, IDS, tokens=1)
    reference = fxopt.reference(sharp(), EACH)
    write(reference, IDS, tokens=1)
    (depths,) = reference.exit_state.depths
    gone = [row for row, depth in enumerate(depths) if depth < 3]
    assert gone and len(gone) < 3
    other = sharp()
    for parameter in other.model.layers[2].mlp.parameters():
        parameter.data.mul_(3)
    changed = fxopt.compile(other, EACH, strict=True)
    moved = (write(changed, IDS, tokens=1)[1] - logits).abs().amax((1, 2))
    assert [row for row in range(3) if moved[row] == 0] == gone


@torch.no_grad()
def test_two_conversations_reset_and_a_step_taken_back(compiled):
    ids = [IDS, IDS.flip(1)]
    apart = [write(compiled, some, 6)[0] for some in ids]
    caches = [StaticCache(config=compiled.config, max_cache_len=16) for _ in ids]

    def start(number):
        return compiled(ids[number], past_key_values=caches[number]).logits[:, -1:].argmax(-1)

    def step(number, token):
        return compiled(token, past_key_values=caches[number]).logits[:, -1:].argmax(-1)

    tokens = [[start(0)], [start(1)]]
    for turn in range(5):
        for number in (0, 1):
            if turn == 2:  # a step that is taken back: the counter is set back, the row is written again
                kept = copy.deepcopy([layer.cumulative_length for layer in caches[number].layers])
                step(number, torch.full((3, 1), 7))
                for layer, length in zip(caches[number].layers, kept, strict=True):
                    layer.cumulative_length.copy_(length)
            tokens[number].append(step(number, tokens[number][-1]))
    for number in (0, 1):
        assert torch.equal(torch.cat(tokens[number], 1), apart[number])
    caches[0].reset()
    again = [start(0)]
    for _ in range(5):
        again.append(step(0, again[-1]))
    assert torch.equal(torch.cat(again, 1), apart[0])


@torch.no_grad()
def test_a_growing_cache_is_cropped(compiled):
    out = compiled(IDS, use_cache=True)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    wanted = compiled(token, past_key_values=copy.deepcopy(cache), use_cache=True).logits
    compiled(torch.full((3, 1), 7), past_key_values=cache, use_cache=True)
    cache.crop(-1)
    assert cache.get_seq_length() == 6
    torch.testing.assert_close(compiled(token, past_key_values=cache, use_cache=True).logits, wanted)


def test_together_with_mixture_of_depths_is_refused():
    model = fxopt.compile(sharp(), EACH, fxopt.MixtureOfDepths(capacity=0.5), strict=True)
    with pytest.raises(Exception, match="mixture of depths keeps fewer cache rows"), torch.no_grad():
        model(IDS, use_cache=False)
