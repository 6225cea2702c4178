"""SparseAttention: its setting, and decoding against its plain PyTorch reference."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.passes.sparse_attention import SparseAttention
from fxopt.passes.technique import SettingError
from fxopt.testing import TINY


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"window": 0}, {"window": True}, {"budget": 0}, {"budget": 1.5}, {"budget": True}, {"budget": 4},
        {"window": 8, "budget": 16}, {"window": 8, "sinks": -1}, {"method": "pages", "budget": 32},
        {"method": "double_sparsity", "budget": 12},
        {"method": "double_sparsity", "budget": 64, "channels": ((0, 0),)}, {"method": "sink_windw", "window": 8},
        {"window": 8, "tau": 0.9}, {"window": 8, "select": len}, {"window": 8, "layers": ()}, {"window": 8, "bits": 8},
        {"method": "pages", "budget": 96, "tau": 0.0}, {"method": "pages", "budget": 96, "tau": 1.5},
        {"method": "double_sparsity", "budget": 96, "bits": 2}, {"window": 8, "heads": ()},
        {"window": 8, "heads": (0, 0)}, {"window": 8, "heads": {0: 1.5}}, {"window": 8, "heads": ((0, 8), 1)},
        {"method": "pages", "budget": 96, "heads": {0: 32}}, {"window": 8, "heads": "all"},
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_meant(fields):
    with pytest.raises(SettingError):
        SparseAttention(**fields)


def generated(model, cache, tokens=8):
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    ids[0, :3] = mask[0, :3] = 0
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            cache_implementation="static" if cache == "static" else None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_decoding_equals_the_reference(cache, eager_lowering):
    setting = SparseAttention(window=4, sinks=2)
    model = TINY["llama"]()
    dense = generated(model, cache)
    meant = generated(fxopt.reference(model, setting), cache)
    fxopt.compile(model, setting)
    torch.testing.assert_close(generated(model, cache), meant, rtol=1e-4, atol=1e-4)
    assert (dense - meant).abs().max() > 1e-2
    assert fxopt.report(model).graphs[-1].count("sparse_attention") == 3


def test_a_window_over_everything_is_dense(eager_lowering):
    model = TINY["llama"]()
    dense = generated(model, "static")
    fxopt.compile(model, SparseAttention(window=64))
    torch.testing.assert_close(generated(model, "static"), dense, rtol=1e-4, atol=1e-4)
