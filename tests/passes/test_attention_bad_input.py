"""Input that nobody wants: the result of the model as it is, or an error; never a wrong number.

Every case runs the rewritten graph of a decode step on a static cache and compares it with the function itself.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fxopt
from fxopt import SettingError

B, H, HKV, S, D = 2, 4, 2, 24, 16


class Step(torch.nn.Module):
    """Writes one key and value at `at` and attends to the cache, as Hugging Face writes it for a compiler."""

    def __init__(self, heads: int = H, kv_heads: int = HKV, form: str = "sdpa") -> None:
        super().__init__()
        self.heads, self.kv_heads, self.form = heads, kv_heads, form

    def forward(self, q, keys, values, new, at, mask):
        keys.index_copy_(2, at, new)
        values.index_copy_(2, at, new)
        group, length = self.heads // self.kv_heads, keys.shape[2]
        shape, repeated = (B, self.kv_heads, group, length, D), (B, self.heads, length, D)
        if group > 1:
            keys, values = (x[:, :, None].expand(shape).reshape(repeated) for x in (keys, values))
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        scores = (q @ keys.transpose(-1, -2)) * D**-0.5
        scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ values


def inputs(heads=H, kv_heads=HKV, filled=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, keys, values, new = (
        torch.randn(B, h, s, D, generator=generator).to(dtype)
        for h, s in ((heads, 1), (kv_heads, S), (kv_heads, S), (kv_heads, 1))
    )
    mask = (torch.arange(S) < filled).expand(B, 1, 1, S).clone()
    return {"q": q, "keys": keys, "values": values, "new": new, "at": torch.tensor([filled - 1]), "mask": mask}


def both(given, *, packed=1, bounded=1, tolerance=None, **shape):
    """The function's own result and that of the rewritten graph; the caches must be equal afterwards too."""
    module = Step(**shape)
    own = {n: _copied(t) for n, t in given.items()}
    with torch.no_grad():
        expected = module(**own)
        compiled = fxopt.compile(Step(**shape))
        theirs = {n: _copied(t) for n, t in given.items()}
        got = compiled(**theirs)
    report = fxopt.report(compiled)
    assert (report.count("gqa_packing"), report.count("cache_extent")) == (packed, bounded), report.summary()
    torch.testing.assert_close(got, expected, equal_nan=True, **(tolerance or {}))
    assert torch.equal(own["keys"].nan_to_num(7.0), theirs["keys"].nan_to_num(7.0))
    return got


def _copied(tensor):
    """A clone with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


FORMS = pytest.mark.parametrize("form", ["sdpa", "eager"])


@FORMS
@pytest.mark.parametrize("what", ["query", "key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(form, what, number, eager_lowering):
    """A NaN or infinity in a filled position goes where it goes in the model, and into no other row."""
    given = inputs()
    if what == "query":
        given["q"][0, 1, 0, 3] = number
    else:
        given[what + "s"][0, 0, 4, 3] = number
    got = both(given, form=form)
    assert torch.isfinite(got[1]).all()


@FORMS
def test_what_lies_beyond_the_filled_part_is_not_looked_at(form, eager_lowering):
    """The model multiplies a NaN there by zero and gives NaN; not reading it gives what the filled part says."""
    given = inputs()
    clean = both(given, form=form)
    for name in ("keys", "values"):
        given[name][:, :, 9:] = float("nan")
    with torch.no_grad():
        assert torch.equal(fxopt.compile(Step(form=form))(**given), clean)


@FORMS
def test_rows_with_nothing_unmasked(form, eager_lowering):
    given = inputs()
    given["mask"][1] = False
    both(given, form=form)


@FORMS
def test_every_row_masked(form, eager_lowering):
    given = inputs()
    given["mask"][:] = False
    both(given, form=form)


@FORMS
def test_an_empty_cache(form, eager_lowering):
    """Nothing was written before this token: it attends to itself."""
    given = inputs(filled=1)
    got = both(given, form=form)
    torch.testing.assert_close(got, given["new"].repeat_interleave(2, 1))


@FORMS
def test_rows_of_mixed_lengths(form, eager_lowering):
    given = inputs(filled=20)
    given["mask"][0, ..., :17] = False
    given["mask"][1, ..., 11:] = False
    both(given, form=form)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(form, dtype, eager_lowering):
    """At least as close to float64 as the model's own result, up to one rounding, of float64 itself up to a few."""
    given = inputs(dtype=dtype)
    got = both(given, form=form, tolerance={"atol": 2e-2, "rtol": 2e-2}).double()
    exact = Step(form="sdpa")(**{n: t.double() if t.is_floating_point() else t.clone() for n, t in given.items()})
    own = Step(form=form)(**{n: t.clone() for n, t in given.items()}).double()
    roundings = 8 if dtype == torch.float64 else 1
    assert (got - exact).abs().max() <= (own - exact).abs().max() + roundings * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", ["positions first", "channels first", "part of a larger cache", "sparse query"])
def test_caches_of_other_layouts(layout, eager_lowering):
    given = inputs()
    for name in ("keys", "values"):
        cache = given[name]
        if layout == "positions first":
            given[name] = cache.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "channels first":
            given[name] = cache.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
        elif layout == "part of a larger cache":
            larger = torch.full((B, HKV, 2 * S, 2 * D), 3.0)
            given[name] = larger[:, :, ::2, :D].copy_(cache)
    if layout == "sparse query":
        given["q"] = torch.zeros(B, 1, H, 2 * D).transpose(1, 2)[..., ::2].copy_(given["q"])
    both(given)


@pytest.mark.parametrize(("heads", "kv_heads", "packed"), [(4, 4, 0), (6, 1, 1), (6, 3, 1), (7, 7, 0)])
def test_numbers_of_heads(heads, kv_heads, packed, eager_lowering):
    both(inputs(heads, kv_heads), heads=heads, kv_heads=kv_heads, packed=packed)


@FORMS
def test_an_attention_that_reads_the_result_of_another(form, eager_lowering):
    """The first rewrite replaces what the second was found to read; both caches are written again in between."""

    class Chain(Step):
        def forward(self, q, keys, values, new, at, mask):
            return super().forward(super().forward(q, keys, values, new, at, mask), values, keys, new, at, mask)

    expected = Chain(form=form)(**{n: _copied(t) for n, t in inputs().items()})
    model = fxopt.compile(Chain(form=form), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs()), expected)
    report = fxopt.report(model)
    assert (report.count("gqa_packing"), report.count("cache_extent")) == (2, 2), report.summary()


def test_heads_that_do_not_divide_are_the_librarys_error(eager_lowering):
    q, k = torch.randn(1, 4, 1, D), torch.randn(1, 3, S, D)

    class Wrong(torch.nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    with pytest.raises(RuntimeError), torch.no_grad():
        fxopt.compile(Wrong())(q, k)


def test_dtypes_that_are_mixed_stay_with_the_model(eager_lowering):
    """Scores in float64 from a float32 cache: nothing is packed, and the remark says so."""

    class Mixed(torch.nn.Module):
        def forward(self, q, k, v):
            weights = torch.softmax(q @ k.transpose(-1, -2), -1)
            return weights.to(v.dtype) @ v

    q, k = torch.randn(1, 4, 2, D), torch.randn(1, 4, S, D)
    v = torch.randn(1, 4, S, D, dtype=torch.float64)
    model = fxopt.compile(Mixed())
    with torch.no_grad():
        torch.testing.assert_close(model(q, k, v), Mixed()(q, k, v))
    assert fxopt.report(model).count("gqa_packing") == 0
    assert "FX201" in [r.code for r in fxopt.report(model).remarks if r.technique == "gqa_packing"]


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    pytest.importorskip("safetensors")
    technique = fxopt.AsyncSoftmax(ranges=((-1.0, 4.0), (0.0, 3.0)))
    made = fxopt.Recipe(paths={"attend": technique}, data={"x": torch.ones(3)}, fingerprint="", notes={})
    return made.save(tmp_path / "recipe.safetensors")


def test_a_truncated_recipe(recipe):
    whole = recipe.read_bytes()
    for kept in (0, 4, len(whole) // 2, len(whole) - 1):
        recipe.write_bytes(whole[:kept])
        with pytest.raises(SettingError, match="no fxopt recipe"):
            fxopt.Recipe.load(recipe)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'\\"schema_version\\": 1', b'\\"schema_version\\": 9', "schema"),
        (b'\\"technique\\": \\"async_softmax\\"', b'\\"technique\\": \\"async_softmix\\"', "async_softmix"),
        (b'\\"deterministic\\": true', b'\\"deterministic\\": 1234', "allowed are True"),
        (b'\\"phi\\": \\"auto\\"', b'\\"phi\\": \\"otto\\"', "phi is"),
        (b'\\"ranges\\"', b'\\"stages\\"', "unknown fields"),
    ],
)
def test_a_recipe_that_was_tampered_with(recipe, old, new, words):
    whole = recipe.read_bytes()
    assert old in whole and len(old) == len(new)
    recipe.write_bytes(whole.replace(old, new))
    with pytest.raises(SettingError, match=words):
        fxopt.Recipe.load(recipe)


def test_a_recipe_of_another_shape(tmp_path):
    pytest.importorskip("safetensors")
    small, large = Step(), Step()
    small.attend, large.attend = torch.nn.Linear(4, 4), torch.nn.Linear(8, 8)
    from fxopt.recipe import fingerprint

    foreign = fxopt.Recipe(paths={"attend": fxopt.AsyncSoftmax()}, fingerprint=fingerprint(small))
    foreign = fxopt.Recipe.load(foreign.save(tmp_path / "r.safetensors"))
    fxopt.compile(small, foreign)
    with pytest.raises(SettingError, match="another model"):
        fxopt.compile(large, foreign)
