"""``fxopt bench attention --device cuda`` without a GPU: its cases, its peers by operator bodies, its verdicts."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from fxopt.bench import attention, attention_gpu
from fxopt.bench.attention_gpu import FITTED, LARGE, MOST, ONLINE, OWN, SPLITS, Attentions, Case
from fxopt.bench.unfinished import Unfinished
from fxopt.codegen import lowering

SMALL = Case(2, 256, 4)


def launch(query, key, value, mask, extent, sinks, phi, *, scale, soft_cap, split_size):
    """What the kernels compute, by the operator's body; its scratch is torch.empty, as theirs is."""
    scratch = torch.empty_like(query)
    out, counts = lowering.lowered(query, key, value, mask, extent, sinks, phi, scale=scale, soft_cap=soft_cap)
    return scratch.copy_(out), counts


@pytest.fixture
def attentions():
    return Attentions(SMALL, torch.device("cpu"), torch.float32, launch)


def test_cases():
    found = attention_gpu.cases()
    assert {c.batch for c in found} == {1, 8, 64} and {c.group for c in found} == {1, 4, 8}
    assert {c.length for c in found} == {1024, 8192, 32768, 131072}
    assert max(c.bytes for c in found) == MOST and len(found) == 35  # 64 rows of 128k with 32 KV heads are 128 GiB
    assert Case(1, 1024, 1).bytes == 2 * 32 * 1024 * 128 * 2
    assert [c.length for c in attention_gpu.cases(quick=True)] == [1024, 1024]


def test_every_peer_attends(attentions):
    calls = attentions.peers(flex=False)
    assert list(calls)[:3] == [OWN, ONLINE, FITTED] and "sdpa flash, packed" in calls
    expected = attentions.library()
    for name, call in calls.items():
        torch.testing.assert_close(call(), expected, atol=1e-5, rtol=1e-4, msg=name)


def test_what_a_device_cannot_run_is_left_out(attentions, monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(Attentions, "library", refused)
    assert list(attentions.peers(flex=False)) == [OWN, ONLINE, FITTED]


def test_measured_goes_through_every_peer_and_split(attentions):
    asked = []

    def clock(trial):
        trial.call()
        asked.append(trial)
        return [1.0, 2.0, 3.0]

    found = attention_gpu.measured(attentions, clock, flex=False)
    assert set(found["times"]) == set(attentions.peers(flex=False)) and set(found["splits"]) == set(SPLITS)
    assert len(asked) == len(found["times"]) + len(SPLITS)
    assert (found["recomputed"], found["rows"]) == (0, 2 * 32)


def test_scratch_that_is_read_before_it_is_written_shows(attentions):
    def forgetful(query, *arguments, **options):
        out, counts = launch(query, *arguments, **options)
        scratch = torch.empty_like(out)
        return torch.where(torch.arange(32)[:, None, None] == 7, scratch, out), counts  # one head is never written

    attentions._launch = forgetful
    with pytest.raises(AssertionError, match="differs from sdpa"):
        attention_gpu.measured(attentions, lambda trial: pytest.fail("a wrong result was timed"), flex=False)
    before = torch.are_deterministic_algorithms_enabled()
    with attention_gpu.poisoned():
        assert torch.empty(8).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def found(own, **others):
    times = {OWN: own, ONLINE: own, FITTED: own, **others}
    splits = {size: own * (1 + abs(size - 256) / 1024) for size in SPLITS}
    return {"times": {p: [t] * 3 for p, t in times.items()}, "splits": splits, "recomputed": 1, "rows": 64,
            "fitted": 512}  # fmt: skip


def test_the_figures_that_the_goals_name():
    large, small = Case(8, 32768, 4), Case(1, 1024, 8)
    assert large.bytes >= LARGE > small.bytes
    bound = large.bytes / 4e12
    done = {
        large: found(bound / 0.8, flex_attention=bound / 0.8 * 1.5, **{"sdpa flash": bound, "sdpa cudnn": bound * 2}),
        small: found(1e-5, **{"sdpa flash": 2e-5, ONLINE: 1.25e-5, FITTED: 0.5e-5}),
    }
    said = "\n".join(attention_gpu.summary(done, 4e12))
    assert "from 256 MiB on: 80% in the median, least 80% at batch 8, 32k, group 4 (goal 85%)" in said
    assert "1.500x FlexAttention in the geometric mean of 1 (goal 1.1)" in said
    assert "at worst 0.800x at batch 8, 32k, group 4 (goal 0.97)" in said
    assert "async against online softmax: time 0.894" in said and "0.800 at batch 1, 1k, group 8" in said
    assert "deterministic=True, fixed splits against fitted ones: time 1.414" in said
    assert "to 2.000 at batch 1, 1k, group 8" in said and "rows recomputed: 2 of 128" in said
    assert "over that of 256: 64:1.19 128:1.12 256:1.00 512:1.25 1024:1.75 2048:2.75; fitted 512" in said
    rows = attention_gpu.rows_of(large, done[large], 4e12)
    assert rows[0].peer == OWN and rows[0].ratio == 1 and rows[0].note == "80%"
    assert rows[-1].median == statistics.median(done[large]["times"]["sdpa cudnn"])


def test_a_second_call_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    asked, clock = [], [0.0]

    def measured(attentions, _):
        asked.append(attentions.name)
        clock[0] += 400  # two cases are more than a call may take
        return found(1e-3, **{"sdpa flash": 1e-3})

    monkeypatch.setattr(attention_gpu, "measured", measured)
    monkeypatch.setattr(attention_gpu, "Attentions", lambda case, place: case)
    monkeypatch.setattr(attention_gpu, "cases", lambda quick: [Case(1, 1024, g) for g in (1, 4, 8)])
    monkeypatch.setattr(attention_gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(attention_gpu, "read_bandwidth", lambda *_: 4e12)
    monkeypatch.setattr(attention_gpu, "environment", lambda _: {"device": "NVIDIA H200", "date": "2026-11-26"})
    monkeypatch.setattr(attention_gpu.measuring, "cold_clock", lambda *_: None)
    monkeypatch.setattr(attention_gpu.roofline, "current_device", lambda _: attention_gpu.roofline.DEVICES["H200"])
    for name, value in (("is_available", True), ("current_device", 0), ("mem_get_info", (1 << 40, 1 << 40))):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    first = attention_gpu.run()
    assert asked == ["batch 1, 1k, group 1", "batch 1, 1k, group 4"]
    assert "not measured yet, the same command goes on: batch 1, 1k, group 8" in first.remarks[-1]
    second = attention_gpu.run()
    assert asked[2:] == ["batch 1, 1k, group 8"] and len(second.rows) == 3 * 4
    assert not any("not measured" in remark for remark in second.remarks)
    attention_gpu.run()
    assert len(asked) == 5, "what was finished is measured again when asked again"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_suite_goes_there():
    with pytest.raises(ValueError, match="fxopt bench attention --device cuda needs a GPU"):
        attention.run(device="cuda")


def test_unfinished_measurements_belong_to_what_they_depend_on(tmp_path):
    about = {"device": "NVIDIA H200", "torch": "2.13", "date": "2026-11-26", "sizes": (1, 2)}
    kept = Unfinished("x", about, tmp_path)
    kept.keep("one", {"t": [1.0]})
    again = Unfinished("x", {**about, "date": "2026-11-27"}, tmp_path)
    assert "one" in again and again.cases == {"one": {"t": [1.0]}}
    assert "one" not in Unfinished("x", {**about, "torch": "2.15"}, tmp_path)
    kept.path.write_text(json.dumps(kept.cases)[:-3])
    assert "one" not in Unfinished("x", about, tmp_path)
    kept.done()
    kept.done()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    Unfinished("x", about, tmp_path / "file").keep("one", 1)  # nowhere to write: nothing is kept, nothing fails
