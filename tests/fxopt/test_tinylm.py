"""The shipped model, its text and its needle task; and the training, in its smallest form."""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from fxopt import scoring, tinylm  # noqa: E402
from fxopt.tinylm import corpus, metrics, needle  # noqa: E402
from fxopt.tinylm.haystack import SINK, Batch, haystack, spread  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_tinylm.py"


@pytest.fixture(scope="module")
def shipped():
    return tinylm.load()


@pytest.fixture(scope="module")
def card():
    return json.loads(tinylm.METRICS.read_text())


def test_loads_in_the_usual_way(shipped):
    model = transformers.AutoModelForCausalLM.from_pretrained(tinylm.FOLDER)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tinylm.FOLDER)
    config = model.config
    assert config.num_hidden_layers == 12
    assert config.num_attention_heads == 4 * config.num_key_value_heads
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 6e6
    assert tokenizer.decode(tokenizer("def f(x):\n    return x")["input_ids"]) == "def f(x):\n    return x"
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), shipped[0].parameters(), strict=True))


def test_what_ships_is_small_and_16_bit():
    files = [p for p in tinylm.FOLDER.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 16e6
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(tinylm.FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_the_card_keeps_its_promises(card):
    assert card["bits_per_byte"] < card["xz_bits_per_byte"]
    assert card["bits_per_byte_4096"] < card["bits_per_byte"]
    depth = {e["depth"]: e for e in card["exits"]}
    assert depth[6]["bits_per_byte"] < 1.25 * depth[12]["bits_per_byte"]
    assert depth[3]["agreement"] >= 0.6
    bits = [depth[n]["bits_per_byte"] for n in range(1, 13)]
    assert all(deep < shallow + 0.001 for shallow, deep in itertools.pairwise(bits))
    found = {(n["context"], n["needles"]): n["found"] for n in card["needles"]}
    assert found[4096, 1] > 0.9
    assert hashlib.sha256(tinylm.HELDOUT.read_bytes()).hexdigest() == card["heldout_sha256"]


def test_the_weights_reproduce_the_card(shipped, card):
    text = tinylm.HELDOUT.read_bytes()[: metrics.QUICK_BYTES].decode("utf-8", "ignore")
    assert scoring.bits_per_byte(*shipped, text) == pytest.approx(card["bits_per_byte_slice"], abs=1e-3)


def test_deeper_is_better(shipped):
    exits = scoring.exit_scores(*shipped, tinylm.heldout()[:20_000], 512)
    for shallow, deep in itertools.pairwise(exits):
        assert deep.bits_per_byte < shallow.bits_per_byte + 0.02
    assert exits[5].bits_per_byte < 1.25 * exits[-1].bits_per_byte
    assert exits[2].agreement >= 0.6
    assert exits[0].agreement < exits[5].agreement < 1


def test_a_needle_far_back_is_found(shipped):
    """Prompts of 4,096 tokens whose needle stands more than 2,000 tokens back (not those of the card)."""
    task = needle.needle_task(shipped[1], tinylm.heldout()[:40_000], 4096, 12, seed=5)
    far = [question for question in task if question.depth < 0.5][:2]
    assert len(far) == 2
    assert metrics.needle_accuracy(shipped[0], far) == 1.0


def test_training_and_heldout_files_are_apart():
    listing = json.loads((tinylm.FOLDER / "data.json").read_text())
    assert not set(listing["train"]) & set(listing["heldout"])
    assert not set(listing["train"].values()) & set(listing["heldout"].values())
    assert all(corpus.is_heldout(name) for name in listing["heldout"])
    assert not any(corpus.is_heldout(name) for name in listing["train"])
    assert 250_000 < len(tinylm.heldout().encode()) < 350_000


def test_a_needle_prompt_is_exact_and_repeatable(shipped):
    tokenizer = shipped[1]
    first, again = (list(needle.needle_task(tokenizer, tinylm.heldout()[:60_000], 1024, 3, seed=7)) for _ in range(2))
    assert first == again
    assert len({n.input_ids for n in first}) == 3
    for question in first:
        assert len(question.input_ids) + len(question.answer_ids) == 1024
        prompt = tokenizer.decode(question.input_ids)
        assert prompt.count(f"\nKEY {question.key} {question.value}\n") == 1
        assert prompt.endswith(f"\nKEY {question.key}")
        assert tokenizer.decode(question.answer_ids) == f" {question.value}"
    with pytest.raises(ValueError, match="use at least"):
        needle.make_needle(tokenizer, first[0].input_ids, 9, 0)
    with pytest.raises(ValueError, match="longer text"):
        needle.make_needle(tokenizer, first[0].input_ids, 4096, 0)


def test_planted_sequences_repeat_something(shipped):
    filler = list(range(1000, 2000))
    for seed in range(20):
        ids = needle.planted(shipped[1], filler, 400, random.Random(seed))
        assert len(ids) == 400
        pieces = {tuple(ids[i : i + 4]) for i in range(397)}
        assert len(pieces) < 397


def test_missing_or_misshapen_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*train_tinylm"):
        tinylm.load(folder=tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tinylm.FOLDER / name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(ValueError, match="shapes"):
        tinylm.load(folder=tmp_path)


def test_a_python_without_its_tests(tmp_path):
    (tmp_path / "os.py").write_text("x = 1\n")
    with pytest.raises(FileNotFoundError, match="no test tree"):
        corpus.stdlib_files(tmp_path)


# --- the training, in its smallest form ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training():
    spec = importlib.util.spec_from_file_location("train_tinylm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_corpus(monkeypatch):
    """A corpus of a few files, so that the test reads no 30 MB."""
    texts = {f"file{i}.py": f"def function_{i}(argument):\n    return argument + {i}\n\n" * 40 for i in range(12)}
    held = {"held.py": "def held(argument):\n    return argument\n" * 60}
    monkeypatch.setattr(corpus, "read_corpus", lambda: (texts, held))


def test_an_interrupted_training_goes_on_to_the_same_weights(training, small_corpus, tmp_path):
    run = {"compiled": False, "steps": 10}
    whole = training.train(training.QUICK, tmp_path / "whole", **run)
    training.train(training.QUICK, tmp_path / "parts", **run, stop_after=4)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    resumed = training.train(training.QUICK, tmp_path / "parts", **run, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    history = json.loads((tmp_path / "parts" / "curve.json").read_text())
    assert [row[0] for row in history] == list(range(1, 11))
    assert history[-1][5] < history[0][5]
    assert not list(tmp_path.rglob("*.part"))
    model, _ = tinylm.load(folder=tmp_path / "parts")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, resumed.eval()(ids).logits, atol=2e-2, rtol=2e-2)
    other = training.QUICK.__class__(**{**training.asdict(training.QUICK), "seed": 1})
    with pytest.raises(ValueError, match="another recipe"):
        training.train(other, tmp_path / "parts", **run, resume=True)


def test_the_training_forward_is_the_hugging_face_model(training):
    model = training.build(training.QUICK)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.5 if p.dim() == 1 else 0.0, 0.2)
    ids = torch.randint(0, 384, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batch = Batch(ids, ids, torch.ones(2, 30), torch.arange(30))
        last, early = training.Trunk(model, training.QUICK, compiled=False)(batch, 4, set(), 2)
        expected = model.model(ids, output_hidden_states=True)
        torch.testing.assert_close(last, expected.last_hidden_state, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(early, model.model.norm(expected.hidden_states[2]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("alone", [0.0, 1.0])
def test_tails_behind_windows_see_what_the_mask_says(training, shipped, windows, alone):
    """Each tail against the Hugging Face model on the text and this tail, under a mask written out place by place."""
    length, tails, tail = 96 // windows, 4, 8
    ids = [i % 384 for i in needle.ids_of(shipped[1], tinylm.heldout()[:2000])]
    texts = [ids[i * 60 : i * 60 + length + 1] for i in range(windows)]
    starts = [i * 200 for i in range(windows)]
    batch = haystack(shipped[1], texts, starts, tails, tail, 32.0, alone, random.Random(1))
    again = haystack(shipped[1], texts, starts, tails, tail, 32.0, alone, random.Random(1))
    assert torch.equal(batch.inputs, again.inputs)
    assert torch.equal(batch.mask, again.mask)
    assert batch.length == length
    row, extent = batch.inputs[0].tolist(), windows * length
    recipe = dataclasses.replace(training.QUICK, vocab=4096)
    model = training.build(recipe)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.5 if p.dim() == 1 else 0.0, 0.2)
    with torch.no_grad():
        found = training.Trunk(model, recipe, compiled=False)(batch, 4, set(), 2)[0][0]
    asked = []
    for j in range(tails):
        here = slice(extent + j * tail, extent + (j + 1) * tail)
        answer = batch.weights[0, here].nonzero().flatten().tolist()
        assert len(answer) == 1
        assert batch.weights[0, here][answer[0]] == 32
        written = shipped[1].decode([*row[here][: answer[0] + 1], int(batch.targets[0, here][answer[0]])])
        line = needle.ids_of(shipped[1], "\nKEY" + written.rsplit("\nKEY", 1)[1] + "\n")
        asked.append(next(i for i in range(extent) if row[i : i + len(line)] == line))
        hidden = set()
        if alone:
            others = [i for i in range(extent) if row[i : i + 2] == line[:2] and i != asked[-1]]
            hidden = {i + k for i in others for k in range(len(line))}
        hidden |= {w * length + k for w in range(1, windows) for k in range(SINK)}
        allowed = torch.zeros(extent + tail, extent + tail, dtype=torch.bool)
        for a in range(extent + tail):
            for b in range(a + 1):
                allowed[a, b] = a // length == b // length if a < extent else b not in hidden
        with torch.no_grad():
            expected = model.model(
                torch.tensor([row[:extent] + row[here]]), attention_mask=allowed[None, None],
                position_ids=torch.tensor([[*(s + i for s in starts for i in range(length)),
                                            *range(starts[-1] + length, starts[-1] + length + tail)]]),
            ).last_hidden_state[0]  # fmt: skip
        torch.testing.assert_close(found[here], expected[extent:], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found[:extent], expected[:extent], atol=1e-3, rtol=1e-3)
    assert len(set(asked)) == tails
    scored = batch.weights[0, :extent]
    lines = {i + k for i in asked for k in range(len(line))}
    assert scored.tolist() == [0.0 if i + 1 in lines else 1.0 for i in range(extent)]


def test_windows_are_spread_over_the_far_and_the_near_half():
    for seed in range(20):
        chosen = spread(4, 8, random.Random(seed))
        assert len(set(chosen)) == 4
        assert chosen[-1] == 7
        assert sum(slot < 4 for slot in chosen) == 2
    assert spread(1, 1, random.Random(0)) == [0]
    assert spread(8, 8, random.Random(0)) == list(range(8))
    with pytest.raises(ValueError, match="9 windows"):
        spread(9, 8, random.Random(0))


def test_a_haystack_that_cannot_be_asked(shipped):
    with pytest.raises(ValueError, match="multiple of the windows"):
        haystack(shipped[1], [[5] * 65] * 3, [0, 64, 128], 4, 16, 1.0, 0.5, random.Random(0))
    with pytest.raises(ValueError, match="a tail only 2"):
        haystack(shipped[1], [[5] * 65], [0], 2, 2, 1.0, 0.5, random.Random(0))


def test_the_head_loss_has_the_gradients_of_autograd(training):
    torch.manual_seed(0)
    last, early = (torch.randn(1100, 8, requires_grad=True) for _ in range(2))
    head, targets = torch.randn(50, 8, requires_grad=True), torch.randint(0, 50, (1100,))
    scored = (torch.rand(1100) < 0.8).float()
    training.HeadLoss.apply(last, early, head, targets, scored, 512, 0.3)[0].backward()
    found = [t.grad.clone() for t in (last, early, head)]
    for t in (last, early, head):
        t.grad = None
    logits, exit_logits = last @ head.T, (early @ head.T)[:512]

    def cross_entropy(scores, goal, counts):
        each = torch.nn.functional.cross_entropy(scores, goal, reduction="none")
        return (each * counts).sum() / counts.sum()

    hard = cross_entropy(exit_logits, targets[:512], scored[:512])
    soft = cross_entropy(exit_logits, logits[:512].detach().softmax(-1), scored[:512])
    (cross_entropy(logits, targets, scored) + 0.3 * (hard + soft) / 2).backward()
    for mine, t in zip(found, (last, early, head), strict=True):
        torch.testing.assert_close(mine, t.grad, atol=1e-6, rtol=1e-4)


def test_a_folder_that_cannot_be_written(training, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="--out"):
        training.check_writable(tmp_path / "file")


def test_a_start_that_is_no_model_or_of_another_shape(training, small_corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no tokenizer\.json; give --start"):
        training.train(training.QUICK, tmp_path / "out", steps=1, start=tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(tinylm.FOLDER / name, tmp_path)
    with pytest.raises(ValueError, match="not of the shape"):
        training.train(training.QUICK, tmp_path / "out", steps=1, start=tmp_path)
