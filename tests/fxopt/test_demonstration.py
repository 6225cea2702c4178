"""``fxopt demo`` from end to end, on a short text."""

from __future__ import annotations

import pytest

from fxopt import demonstration

pytest.importorskip("transformers")


@pytest.mark.slow
def test_demo_writes_scores_times_and_reports(eager_lowering, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demonstration, "CONTEXT", 32)
    monkeypatch.setattr(demonstration, "WRITTEN", 17)
    monkeypatch.setattr(demonstration, "STEPS", 6)
    demonstration.run(shown=8, page=str(tmp_path / "page.html"))
    printed = capsys.readouterr().out
    assert "17 tokens identical to eager PyTorch: yes" in printed
    rows = {line.split()[1]: line for line in printed.splitlines() if line[:2] in ("= ", "~ ")}
    assert rows["eager"].startswith("=")
    assert "100.0%" in rows["fxopt"]
    assert any(name.startswith("LayerSkip(skip=(8,") for name in rows)
    assert any(name.startswith("EarlyExit(layers=(6,)") for name in rows)
    assert "not in this table: sparse_attention" in printed
    assert (tmp_path / "page.html").read_text().startswith("<!")
