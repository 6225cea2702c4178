"""Layer skipping on an unmodified Hugging Face model: three ways to say it, and how to ask what happened."""

import torch

import fxopt


def main():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=6,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 256, (1, 16))
    settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "disable_compile": True}

    # 1. By call: in place, the same object; generate() reaches it.
    skip = fxopt.LayerSkip(speedup=1.5)
    print(f"layers that run: {skip.kept(6)}")
    fxopt.compile(model, skip)
    compiled = model.generate(ids, **settings)

    # The meaning, in eager PyTorch: the model with those layers deleted.
    assert torch.equal(compiled, fxopt.reference(model, skip).generate(ids, **settings))
    print(fxopt.report(model).summary())

    # 2. By path: only the attention of layer 3.
    fxopt.compile(model, {"model": fxopt.LayerSkip(skip=(3,), part="attention")})
    model.generate(ids, **settings)
    print(fxopt.report(model).why("layer_skip", "model.layers.3"))

    # 3. As a decoration, which travels with the model through deepcopy, pickle and save_pretrained.
    fxopt.LayerSkip(skip=(1, 4), phase="decode")(model)
    fxopt.compile(model)
    model.generate(ids, **settings)
    print(fxopt.report(model).summary())


if __name__ == "__main__":
    with torch.no_grad():
        main()
