"""Layers that keep a running state (convolution, recurrence) beside or instead of keys and values, MLA, and ALiBi."""

from __future__ import annotations

import warnings

import pytest
import torch

import fxopt
from fxopt import EarlyExit, LayerSkip, MixtureOfDepths, SettingError

transformers = pytest.importorskip("transformers")

TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = TOKENS | {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
GATED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
           "shared_expert_intermediate_size": 48}  # fmt: skip
MODELS = {
    # One state of four dimensions and no keys and values.
    "mamba2": ("Mamba2", TOKENS | {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 8, "num_heads": 8,
                                   "head_dim": 16, "n_groups": 2, "chunk_size": 16}),
    "qwen3_next": ("Qwen3Next", GATED | EXPERTS | {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}),
    # A convolution's state of three dimensions.
    "lfm2": ("Lfm2", SIZES | {"num_key_value_heads": 2, "intermediate_size": 96,
                              "layer_types": ["conv", "full_attention", "full_attention"]}),
    # Both in one layer.
    "falcon_h1": ("FalconH1", GATED | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                                       "mamba_n_groups": 1, "mamba_chunk_size": 16}),
    # Keys of 24 channels, values of 16.
    "deepseek_v3": ("DeepseekV3", SIZES | {
        "num_key_value_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}),
    "bloom": ("Bloom", TOKENS | {"hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "mpt": ("Mpt", TOKENS | {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128}),
    "falcon_alibi": ("Falcon", SIZES | {"alibi": True}),
}  # fmt: skip
IDS = torch.tensor([[0, 0, 9, 41, 7, 100], [5, 17, 33, 99, 42, 8]])
MASK = (IDS != 0).long()


def built(name):
    prefix, settings = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def generated(model, cache):
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "disable_compile": True}
    if cache == "static":
        settings["cache_implementation"] = "static"
    with torch.no_grad():
        return model.generate(IDS, attention_mask=MASK, **settings)


def statuses(model, technique):
    return {(r.status, r.code) for r in fxopt.report(model).remarks if r.technique == technique}


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["mamba2", "falcon_h1"])
def test_the_state_of_a_skipped_layer_can_be_written_by_the_next_step(eager_lowering, name, cache):
    model, technique = built(name), LayerSkip(skip=(1,))
    expected = generated(fxopt.reference(model, technique), cache)
    fxopt.compile(model, technique, strict=True)
    assert torch.equal(generated(model, cache), expected)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "lfm2"])
def test_a_running_state_is_no_cache_of_keys_to_skip_in_decode(eager_lowering, name, cache):
    model, technique = built(name), LayerSkip(skip=(0,), phase="decode")
    expected = generated(model, cache)
    assert torch.equal(generated(fxopt.reference(model, technique), cache), expected)
    fxopt.compile(model, technique)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(generated(model, cache), expected)
    assert statuses(model, "layer_skip") == {("blocked", "FX503"), ("blocked", "FX208")}
    assert len([w for w in caught if "running state" in str(w.message)]) == 1


def test_an_attention_that_is_summed_with_a_recurrence_is_taken_out_alone_or_not_at_all(eager_lowering):
    """transformers 5.17 adds the two in an order that shows which is which, 5.23 does not."""
    model, technique = built("falcon_h1"), LayerSkip(skip=(0,), part="attention")
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whole = model(IDS, attention_mask=MASK).logits
        alone = fxopt.reference(model, technique)(IDS, attention_mask=MASK).logits
        fxopt.compile(model, technique)
        found = model(IDS, attention_mask=MASK).logits
    taken = ("applied", "") in statuses(model, "layer_skip")
    torch.testing.assert_close(found, alone if taken else whole)
    told = [w for w in caught if "mamba" in str(w.message) and "added together with its attention" in str(w.message)]
    assert len(told) == (not taken)
    assert taken or ("blocked", "FX113") in statuses(model, "layer_skip")


@pytest.mark.parametrize("skip", [(0,), (1,)])
def test_layers_of_stages_are_counted_in_each_stage(eager_lowering, skip):
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    torch.manual_seed(0)
    model = transformers.SwinForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    technique = LayerSkip(skip=skip)
    with torch.no_grad():
        whole = model(pixels).logits
        expected = fxopt.reference(model, technique)(pixels).logits
        fxopt.compile(model, technique, strict=True)
        torch.testing.assert_close(model(pixels).logits, expected)
    assert not torch.allclose(whole, expected)
    assert fxopt.report(model).count("layer_skip", "applied") == 2


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_keys_and_values_of_different_width_are_skipped_in_decode(eager_lowering, cache):
    model, technique = built("deepseek_v3"), LayerSkip(skip=(1,), phase="decode")
    expected = generated(fxopt.reference(model, technique), cache)
    fxopt.compile(model, technique)
    assert torch.equal(generated(model, cache), expected)
    assert ("applied", "") in statuses(model, "layer_skip")


@pytest.mark.parametrize("name", [
    "lfm2", *(pytest.param(name, marks=pytest.mark.branches_write) for name in ("mamba2", "qwen3_next")),
])  # fmt: skip
def test_an_exit_fills_running_states_as_the_reference_does(eager_lowering, name):
    model, technique = built(name), EarlyExit(layers=(1,), confidence="max", threshold=0.0)
    expected = generated(fxopt.reference(model, technique), "dynamic")
    fxopt.compile(model, technique, strict=True)
    assert torch.equal(generated(model, "dynamic"), expected)


@pytest.mark.filterwarnings("ignore:mixture of depths. the predictor")
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_attention_behind_a_convolution_is_routed(eager_lowering, cache):
    model, technique = built("lfm2"), MixtureOfDepths(capacity=0.5, layers=(1, 2))
    expected = generated(technique(built("lfm2")), cache)
    fxopt.compile(model, technique, strict=True)
    assert torch.equal(generated(model, cache), expected)


@pytest.mark.filterwarnings("ignore:mixture of depths. the predictor")
@pytest.mark.parametrize("case", ["bloom alibi", "mpt position_bias", "falcon_alibi alibi"])
def test_position_biases_without_rows_are_refused_by_name(case):
    name, argument = case.split()
    model = MixtureOfDepths(capacity=0.5)(built(name))
    with pytest.raises(SettingError, match=rf"the argument {argument} of this layer is a tensor \["):
        model(IDS, attention_mask=MASK)
