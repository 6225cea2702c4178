"""Pictures of what a dynamic model did: counts of exits, routed tokens, positions read."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt import EarlyExit, MixtureOfDepths, SparseAttention
from fxopt.inspection.behaviour import Picture, counted, pictures
from fxopt.passes.mod_counters import watching
from fxopt.testing import TINY

IDS = torch.arange(1, 25)[None]


@pytest.mark.filterwarnings("ignore:mixture of depths")
def test_routing_map_has_the_tokens_that_were_computed():
    model = MixtureOfDepths(capacity=0.25, every=2)(TINY["handwritten"]())
    (routed, _) = pictures(model, (IDS,))
    assert routed.kind == "map" and routed.rows and len(routed.columns) == 24
    with torch.no_grad(), watching(model) as routes:
        model(IDS)
        expected = [taken[0].double().tolist() for taken in routes().values()]
    assert routed.values == expected and routed.text().count("#") == sum(map(sum, expected)) > 0


def test_density_of_causal_and_of_sparse_attention():
    (dense,) = pictures(TINY["handwritten"](), (IDS,))
    assert len(dense.rows) == 3 and dense.values[0][0] == 1.0 and dense.values[0][-1] == pytest.approx(1 / 24, abs=1e-4)
    assert "52%" in dense.title  # (24 + 1) / (2 * 24)
    model = TINY["llama"]()
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    step = {"input_ids": IDS[:, :1], "past_key_values": cache}
    (sparse,) = pictures(model, step, SparseAttention(sinks=2, window=4))
    assert sparse.values[0] == [1.0] * 2 + [0.0] * 19 + [1.0] * 4 and "24%" in sparse.title


def test_depths_are_counted_in_the_graph_that_ran(eager_lowering, tmp_path):
    model = fxopt.compile(TINY["llama"](), EarlyExit(layers=(1,), threshold=0.0))
    with torch.no_grad():
        model.generate(IDS, max_new_tokens=4, do_sample=False)
    found = counted(fxopt.report(model))
    assert found and found[0].columns[0] == "1 layers"
    assert sum(sum(picture.values[0]) for picture in found) >= 3
    assert '"kind":"histogram"' in fxopt.report(model).to_html(tmp_path / "r.html").read_text()
    other = fxopt.compile(TINY["llama"]())
    with torch.no_grad():
        other(input_ids=IDS, use_cache=False)
    assert counted(fxopt.report(other)) == []


def test_the_page_draws_them(made_up, browser, tmp_path):
    shown = [
        Picture("histogram", "<b>depths</b>", ["rows"], ["1 layers", "3 layers"], [[3.0, 1.0]]),
        Picture("map", "routes", ["layers.1"], ["token 0", "token 1"], [[1.0, 0.0]]),
    ]
    browser.open(made_up(layers=2).to_html(tmp_path / "r.html", pictures=shown))
    assert browser.complaints() == []
    assert "3 (75%)" in browser.js("document.querySelector('.histogram').textContent")
    assert browser.js("[...document.querySelectorAll('.shades i')].map(i => i.title)")[1] == "layers.1, token 1: 0%"
    assert "<b>depths</b>" in browser.js("document.querySelector('#behaviour').textContent")
