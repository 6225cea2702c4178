"""Scores against independent computations, the table, and what bad input is told."""

import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

import fxopt  # noqa: E402
from fxopt import evaluation, scoring  # noqa: E402
from fxopt.decoding import Speed, decode_logits, force  # noqa: E402
from fxopt.evaluation import Row, Table, evaluate, load_model  # noqa: E402
from fxopt.meaning import shared_copy  # noqa: E402
from fxopt.scoring import Divergence, bits_per_byte, exit_scores, windows  # noqa: E402

TEXT = "def add(first, second):\n    return first + second  # ünïcode → ok\n\n" * 12


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<end>", eos_token="<end>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def shortened(model, *gone):
    """The Hugging Face model with these layers deleted."""
    short = transformers.LlamaForCausalLM(model.config).eval()
    short.load_state_dict(model.state_dict())
    short.config = transformers.LlamaConfig(**model.config.to_dict())
    short.model.config = short.config
    for index in sorted(gone, reverse=True):
        del short.model.layers[index]
    for index, layer in enumerate(short.model.layers):
        layer.self_attn.layer_idx = index
    short.config.num_hidden_layers = len(short.model.layers)
    return short


def by_hand(model, tokenizer, text, context):
    """Bits per byte in float64, window by window."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    double = shortened(model).double()
    bits = 0.0
    for start in range(0, len(ids), context):
        chunk = ids[start : start + context]
        with torch.no_grad():
            chances = double(torch.tensor([[0, *chunk[:-1]]])).logits[0].softmax(-1)
        bits -= sum(math.log2(chances[i, token]) for i, token in enumerate(chunk))
    return bits / len(text.encode())


def test_bits_per_byte_is_the_textbook_sum(model, tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) % 45 > 1  # a shorter last window is scored too
    assert bits_per_byte(model, tokenizer, TEXT, context=45) == pytest.approx(
        by_hand(model, tokenizer, TEXT, 45), rel=1e-5
    )


def test_windows_cover_every_token_and_byte(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    cut = windows(tokenizer, TEXT, 50)
    assert torch.cat([w.targets for w in cut]).tolist() == ids
    assert sum(w.size for w in cut) == len(TEXT.encode())
    plain = windows(None, ids, 50, whole=True)
    assert {len(w.targets) for w in plain} == {49}
    assert all(torch.equal(w.inputs[1:], w.targets[:-1]) for w in plain)


def test_an_exit_is_the_model_with_its_last_layers_deleted(model, tokenizer):
    found = bits_per_byte(model, tokenizer, TEXT, context=64, exit_layers=[1, 2, 3])
    for depth, value in found.items():
        short = shortened(model, *range(depth, 3))
        assert value == pytest.approx(bits_per_byte(short, tokenizer, TEXT, context=64), rel=1e-5)
    assert exit_scores(model, tokenizer, TEXT, 64, [3])[0].agreement == 1.0
    with pytest.raises(ValueError, match=r"1\.\.3"):
        exit_scores(model, tokenizer, TEXT, 64, [4])


def test_divergence_of_known_distributions():
    sums = Divergence()
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    sums.add(q.log(), p.log(), torch.tensor([2]), size=2)
    result = sums.result()
    assert result["kl"] == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(0.5)
    assert result["perplexity"] == pytest.approx(2.0)
    assert result["agreement"] == 0.0


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_teacher_forced_decode_gives_the_logits_of_one_forward(model, tokenizer, cache):
    window = windows(tokenizer, TEXT, 40)[1]
    logits = decode_logits(model, window, 25, cache)
    with torch.no_grad():
        expected = model(window.inputs[None]).logits[0, 24:]
    assert logits.shape == expected.shape == (16, 280)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_forcing_goes_on_past_the_end_token(model):
    forced = force(model, torch.tensor([5, 6, 7]), [0, 0, 9, 0, 8])
    assert forced.logits.shape == (5, 280)
    assert len(forced.step_seconds) == 4
    assert forced.prompt_seconds > 0


def test_only_decode_is_compiled_when_the_prompt_is_not(model):
    ran = []

    def backend(gm, inputs):
        def counted(*args):
            ran.append(counted)
            return gm(*args)

        return counted

    way = shared_copy(model)
    way.compile(backend=backend)
    prompt, tokens = torch.tensor([5, 6, 7, 8]), [3, 4, 5, 6, 7]
    found = force(way, prompt, tokens, compile_prompt=False, room=9)
    assert len(ran) == 4  # five tokens: the first comes of the prompt
    assert len(found.step_seconds) == 4
    torch.testing.assert_close(found.logits, force(model, prompt, tokens).logits, atol=1e-5, rtol=1e-5)
    force(way, prompt, tokens[:2], compile_prompt=False, room=9)
    assert len(ran) == 5
    assert len(set(ran)) == 1  # the cache has room for nine both times, so one graph serves
    force(way, prompt, tokens[:2])
    assert len(set(ran)) > 1


def test_speeds_are_compared_round_by_round():
    slow, fast = Speed([10.0, 20.0, 12.0], [1.0, 4.0, 2.0]), Speed([30.0, 1.0, 2.0], [2.0, 4.4, 6.0])
    assert slow.prefill == 12.0
    assert fast.decode == 4.4
    assert fast.over(slow) == 2.0


def test_evaluate_compares_with_the_unmodified_model(model, tokenizer, tmp_path):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    technique = fxopt.LayerSkip(skip=(1,))
    table = evaluate(model, TEXT, technique, tokenizer=tokenizer, context=32, limit=96, speed=False, show=False)
    eager, skipped = table["eager"], table[str(technique)]
    short = shortened(model, 1)
    sums, cut = Divergence(), evaluation._choose(windows(tokenizer, TEXT, 32, whole=True), 96, 0)
    with torch.no_grad():
        for w in cut:
            sums.add(short(w.inputs[None]).logits[0], model(w.inputs[None]).logits[0], w.targets, w.size)
    for key, value in sums.result().items():
        assert getattr(skipped, key) == pytest.approx(value, rel=1e-3, abs=1e-5), key
    assert eager.kl == 0
    assert eager.agreement == 1
    assert eager.exact
    assert not skipped.exact
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    loaded = json.loads(table.to_json(tmp_path / "table.json").read_text())
    assert loaded["rows"][1]["settings"][0]["technique"] == "layer_skip"
    assert str(technique) in str(table)


@pytest.mark.slow
def test_evaluate_measures_speed(model, tokenizer):
    technique = fxopt.LayerSkip(skip=(1,))
    table = evaluate(
        model, TEXT, technique, tokenizer=tokenizer, context=32, limit=32, decode_steps=4, rounds=1, show=False
    )
    assert [row.name for row in table.rows] == ["eager", "inductor", str(technique)]
    assert all(row.decode > 0 and row.prefill > 0 and row.speedup > 0 for row in table.rows)
    assert 1.1 < table.rows[2].ideal < 3 / 2
    assert max(row.speedup for row in table.rows[:2]) == pytest.approx(1)
    ready = table.models[str(technique)]
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(ready(ids).logits, shortened(model, 1)(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_setting_of_decode_is_scored_token_by_token(model, tokenizer):
    technique = fxopt.LayerSkip(skip=(0, 1), phase="decode")
    options = {"tokenizer": tokenizer, "context": 24, "limit": 13, "speed": False, "show": False}
    table = evaluate(model, TEXT, technique, **options)
    assert table.info["score"] == "decode"
    assert table.info["scored_tokens"] == 13
    everywhere = evaluate(model, TEXT, fxopt.LayerSkip(skip=(0, 1)), score="decode", **options)
    # The prompt is read by all layers in one and by one of three in the other.
    assert abs(table.rows[1].kl - everywhere.rows[1].kl) > 1e-4
    assert table.rows[0].bits_per_byte == pytest.approx(everywhere.rows[0].bits_per_byte)


def test_token_ids_need_no_tokenizer(model):
    ids = torch.arange(1, 130) % 280
    table = evaluate(model, ids, context=32, speed=False, show=False)
    assert table["eager"].bits_per_byte is None
    assert table["eager"].perplexity > 1


def test_frontier_and_plot(tmp_path):
    rows = [Row("slow", True, 1.0, decode=10), Row("bad", False, 3.0, decode=9), Row("fast", False, 2.0, decode=30)]
    table = Table(rows, {"scored_tokens": 1, "score": "prompt", "context": 2, "device": "cpu"})
    assert [row.name for row in table.frontier()] == ["slow", "fast"]
    pytest.importorskip("matplotlib")
    assert table.plot(tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["frontier.png"]


def test_unwritable_folder(tmp_path):
    table = Table([], {})
    with pytest.raises(PermissionError, match="folder that you can write to"):
        table.to_json(tmp_path / "missing" / "table.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe\x00\x01", "not UTF-8"), (b"text\x00more", "NUL")],
)
def test_files_that_are_no_text(model, tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        evaluate(model, path, speed=False)


def test_bad_input_is_named(model, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        evaluate(model, "missing.txt", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="fewer than one context"):
        evaluate(model, "short text", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="the text is empty"):
        bits_per_byte(model, tokenizer, " ")
    with pytest.raises(ValueError, match="'auto', 'prompt' and 'decode'"):
        evaluate(model, TEXT, tokenizer=tokenizer, score="both")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)


def test_a_model_that_is_not_causal(tokenizer):
    config = transformers.BertConfig(
        vocab_size=280, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(TypeError, match="not a causal language model"):
        evaluate(transformers.BertForMaskedLM(config), TEXT, tokenizer=tokenizer)
    with pytest.raises(TypeError, match="Linear is not a causal"):
        scoring.require_causal(torch.nn.Linear(2, 2))


def test_weights_of_another_shape(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(ValueError, match="do not fit its config"):
        load_model(tmp_path)
