"""The page: self-contained, harmless, small, the same each time, and usable in a browser without network."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import pytest

from fxopt.inspection import html
from fxopt.passes.record import Remark
from fxopt.reporting import Report

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_nothing_is_fetched(made_up):
    page = html.page(made_up())
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", page.split("<script>")[0])
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+/|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\(", page)
    assert "default-src 'none'" in page


def test_same_report_same_bytes(made_up, tmp_path):
    first, second = made_up().to_html(tmp_path / "a.html"), made_up().to_html(tmp_path / "b.html")
    assert first.read_bytes() == second.read_bytes()
    read_again = Report.from_json(made_up().to_json(tmp_path / "r.json"))
    assert read_again.to_html(tmp_path / "c.html").read_bytes() == first.read_bytes()


def test_strip_folds_layers_that_nothing_distinguishes(made_up):
    (strip, outside) = data_of(html.page(made_up()))["graphs"][0]["strips"]
    assert (strip["path"], strip["count"], strip["differ"]) == ("model.layers", 32, [3, 7])
    assert [run["label"] for run in strip["runs"]] == ["0-2", "3", "4-6", "7", "8-31"]
    assert strip["runs"][1]["cells"] == {"async_softmax": [["missed", "FX102", 1]]}
    assert strip["runs"][3]["cells"] == {"layer_skip": [["applied", "", 1]]}
    assert outside["runs"][0]["cells"] == {"flat_gemm": [["blocked", "FX303", 1]]}


def test_data_gives_the_node_tables_back(made_up):
    report = made_up(layers=9)
    data = data_of(html.page(report))
    stage = data["graphs"][0]["stages"][2]
    order = [first + i for first, count in stage["order"] for i in range(count)]
    assert order == [row.id for row in report.graphs[0].rows(2)]
    assert [data["strings"][row[1]] for row in stage["added"]] == [row.name for row in report.graphs[0].stages[2].added]


def test_size_of_a_32_layer_model_and_trimming(made_up):
    report = made_up(layers=32, graphs=4, wide=8)  # 32 layers of 65 nodes: what a Llama has
    assert report.graphs[0].nodes_before > 2000
    page = html.page(report)
    assert len(page.encode()) < 3_000_000 and data_of(page)["leftOut"] == []
    small = html.page(report, limit=300_000)
    data = data_of(small)
    assert len(small.encode()) < 300_000
    assert data["leftOut"][0] == "the Python code of stages" and data["graphs"][0]["remarks"]


@pytest.mark.parametrize("text", [HOSTILE, "<!--", "]]>", "\u2028\u0000\x1b[31m", "a" * 5000])
def test_hostile_names_stay_data(made_up, text):
    report = hostile(made_up(layers=2), text)
    page = html.page(report)
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<img" not in page
    assert data_of(page)["graphs"][0]["error"] == text


def hostile(report: Report, text: str) -> Report:
    graph = report.graphs[0]
    graph.error = graph.model = graph.compile_id = text
    graph.remarks.append(Remark("layer_skip", "missed", text, text, "FX101", text))
    first = graph.stages[0]
    first.added = [dataclasses.replace(r, name=text, args=text, module=text, source=text) for r in first.added]
    graph.kernels[0] = dataclasses.replace(graph.kernels[0], name=text, source=text, resources={text: text})
    return Report([graph], {text: text})


def test_empty_and_failed_reports_have_a_page(made_up):
    assert "nothing has been compiled yet" in html.page(Report([]))
    report = made_up(layers=2)
    report.graphs[0].stages.clear()
    report.graphs[0].error = "RuntimeError: no"
    assert "RuntimeError: no" in html.page(report)


def test_without_jinja2_the_error_names_the_extra(made_up, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"fxopt\[inspect\]"):
        made_up(layers=1).to_html(tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


# -- in a browser ---------------------------------------------------------------------------------------------------


def test_opens_offline_within_two_seconds(made_up, browser, tmp_path):
    path = made_up(layers=32, wide=8).to_html(tmp_path / "r.html")
    browser.call("Performance.enable", timeDomain="threadTicks")  # processor time: the machine may be busy
    before = browser.metric("TaskDuration")
    browser.open(path)
    assert browser.metric("TaskDuration") - before < 2
    browser.call("Performance.disable")
    assert all(url.startswith(("file://", "about:")) for url in browser.requests())
    assert browser.complaints() == []
    assert browser.js("document.querySelectorAll('.strip .cell.applied').length") == 4
    assert "×32, 2 differ: 3, 7" in browser.js("document.querySelector('figcaption').textContent")


def test_search_finds_a_node_and_enter_opens_it(made_up, browser, tmp_path):
    browser.open(made_up().to_html(tmp_path / "r.html"))
    browser.press("/")
    assert browser.js("document.activeElement.id") == "search"
    browser.type("scaled_dot_product_attention_12")
    browser.wait("document.querySelectorAll('#hits a').length > 1")
    browser.press("Enter")
    browser.wait("!document.getElementById('card').hidden")
    card = browser.js("document.getElementById('card').textContent")
    assert "removed by async_softmax" in card and "model.layers.12.self_attn" in card and "packed_" in card


def test_node_to_module_to_line_to_kernel_and_back(made_up, browser, tmp_path):
    report = made_up()
    packed = report.graphs[0].stages[2].added[0].id
    browser.open(report.to_html(tmp_path / "r.html"), f"g0.n{packed}")
    assert "Descends from" in browser.js("document.getElementById('card').textContent")
    browser.js("[...document.querySelectorAll('#card a')].find(a => a.textContent === 'self_attn').click()")
    browser.wait("document.querySelector('#card h3').textContent === 'model.layers.0.self_attn'")
    assert browser.js("[...document.querySelectorAll('#card a')].some(a => a.textContent === 'attention_decode_ab12')")
    browser.js("[...document.querySelectorAll('#card .file a')].find(a => a.textContent === '193').click()")
    browser.wait("document.querySelector('#card h3').textContent.includes('modeling_llama.py:193')")
    browser.js("history.back()")
    browser.wait("document.querySelector('#card h3').textContent === 'model.layers.0.self_attn'")
    browser.js("[...document.querySelectorAll('#card a')].find(a => a.textContent === 'attention_decode_ab12').click()")
    browser.wait("location.hash === '#g0.k0'")
    assert "32768" in browser.js("document.getElementById('g0.k0').textContent")


def test_pass_expands_to_a_side_by_side_difference(made_up, browser, tmp_path):
    browser.open(made_up().to_html(tmp_path / "r.html"))
    assert browser.js("document.querySelectorAll('.diff').length") == 0
    browser.js("document.querySelector('details.pass summary').click()")
    browser.wait("document.querySelectorAll('.diff .line.removed').length === 8")
    assert browser.js("document.querySelectorAll('.diff .line.changed').length") == 2
    assert "1 pass changed nothing" in browser.js("document.querySelector('.passes').textContent")
    browser.js("document.querySelector('.gap').click()")
    browser.wait("document.querySelectorAll('.diff .line.same').length > 50")


def test_the_same_change_in_other_layers_is_folded(made_up, browser, tmp_path):
    browser.open(made_up().to_html(tmp_path / "r.html"), "g0.s2")
    browser.wait("document.querySelectorAll('.diff .line.replaced').length === 1")
    gap = "[...document.querySelectorAll('.gap')].find(b => b.textContent.startsWith('the same change'))"
    text = browser.js(f"{gap}.textContent")
    places = "model.layers.1.self_attn, model.layers.2.self_attn, ..., model.layers.31.self_attn"
    assert text == f"the same change 29 more times: {places}"
    browser.js(f"{gap}.click()")
    browser.wait("document.querySelectorAll('.diff .line.replaced').length === 30")
    modules = browser.js("[...document.querySelectorAll('.diff .where')].map(w => w.textContent)")
    numbers = [int(m.split(".")[2]) for m in modules if m.endswith("self_attn")]
    assert numbers == sorted(numbers) and numbers[-1] == 31


def test_deep_link_opens_a_folded_pass(made_up, browser, tmp_path):
    path = made_up().to_html(tmp_path / "r.html")
    browser.open(path, "g0.s2")
    browser.wait("document.getElementById('g0.s2').open && document.querySelectorAll('#g0\\\\.s2 .line').length > 2")
    browser.open(path, "g0.s3")
    assert browser.js("document.getElementById('g0.s3').closest('details').open")


def test_module_tree_folds_alike_layers(made_up, browser, tmp_path):
    browser.open(made_up().to_html(tmp_path / "r.html"), "g0.tree")
    browser.js("[...document.querySelectorAll('.tree details')].forEach(d => d.fillNow())")
    browser.js("[...document.querySelectorAll('.tree details')].forEach(d => d.fillNow())")
    assert "×24 alike: 8-31" in browser.js("document.querySelector('.tree').textContent")


def test_a_notebook_shows_the_page_in_a_frame(made_up, browser, tmp_path):
    shown = hostile(made_up(layers=2), HOSTILE)._repr_html_()
    assert "<script" not in shown.split("srcdoc=")[0] and len(shown) < 600_000
    path = tmp_path / "notebook.html"
    path.write_text(f"<body data-ready='true'>{shown}</body>", encoding="utf-8")
    browser.open(path)
    browser.js("document.querySelector('details').open = true")
    inside = "document.querySelector('iframe').contentDocument"
    browser.wait(f"{inside} && {inside}.body && {inside}.body.dataset.ready === 'true'")
    assert browser.js("document.images.length") == 0 and browser.js("document.scripts.length") == 0
    assert browser.js(f"{inside}.querySelectorAll('.strip').length") > 0


def test_hostile_report_in_the_browser(made_up, browser, tmp_path):
    path = hostile(made_up(layers=2), HOSTILE).to_html(tmp_path / "r.html")
    browser.open(path, "g0.m:" + "x")
    for fragment in ("g0.n1", "g0.s1", "g0.k0", "g0.tree", "g0.m:%3Cimg%20src=x%20onerror=1%3E"):
        browser.js(f"location.hash = {json.dumps(fragment)}")
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert "owned" not in browser.js("document.title").split("</script>")[0]
    assert browser.js("document.images.length") == 0
    assert browser.js("document.querySelectorAll('script').length") == 2


def test_dark_and_print_styles(made_up, browser, tmp_path):
    browser.open(made_up(layers=4).to_html(tmp_path / "r.html"))
    colour = "getComputedStyle(document.body).backgroundColor"
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    light = browser.js(colour)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.js(colour) != light
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.js("getComputedStyle(document.querySelector('.search')).display") == "none"
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
