"""An adapted transformers model is still a transformers model: generate, save_pretrained, checkpointing, autocast, ties."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import rankfold as rf


def llama(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(params=[llama, gpt2], ids=["llama", "gpt2"])
def model(request):
    return request.param()


IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def shake(adaptation, std=0.3):
    for k, p in enumerate(adaptation.parameters()):
        p.data.normal_(std=std, generator=torch.Generator().manual_seed(k))


@pytest.mark.parametrize("method", ["lora", "dora", "magnitude+hra"])
def test_generate_uses_the_adapter_and_the_cache(model, method):
    adaptation = rf.adapt(model, method, rank=4)
    shake(adaptation)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, use_cache=False, **options), cached)
    adaptation.fold()
    assert torch.equal(model.generate(IDS, **options), cached)
    adaptation.unfold()
    with adaptation.disabled():
        plain = model.generate(IDS, **options)
    adaptation.remove()
    assert torch.equal(model.generate(IDS, **options), plain)


def test_save_pretrained_holds_the_base_and_folded_the_folded(model, tmp_path):
    before = model(IDS).logits
    adaptation = rf.adapt(model, "lora", rank=4)
    shake(adaptation)
    changed = model(IDS).logits
    model.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(again(IDS).logits, before)
    adaptation.fold()
    model.save_pretrained(tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    torch.testing.assert_close(folded(IDS).logits, changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, reentrant):
    adaptation = rf.adapt(model, "dropout+dora", rank=4, p=0.2)
    shake(adaptation, 0.1)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients():
        torch.manual_seed(3)
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        return torch.autograd.grad(loss, adaptation.parameters()) if not reentrant else _backward(loss, adaptation)

    plain = gradients()
    # the second name is that of transformers before 5.2x
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for a, b in zip(gradients(), plain):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def _backward(loss, adaptation):
    for p in adaptation.parameters():
        p.grad = None
    loss.backward()
    return [p.grad.clone() for p in adaptation.parameters()]


def test_autocast_runs_and_stays_near(model):
    adaptation = rf.adapt(model, "dora", rank=4)
    shake(adaptation, 0.1)
    exact = model(IDS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(IDS).logits
        rough.float().square().mean().backward()
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adaptation.parameters())


def test_tied_heads_stay_tied_and_one_of_them_can_be_adapted():
    model = llama(tie_word_embeddings=True)
    adaptation = rf.adapt(model, "lora", rank=4, targets="lm_head")
    shake(adaptation)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert adaptation.sites[0].tied == "model.embed_tokens"
    live = model(IDS).logits
    with pytest.warns(UserWarning, match="shared its weight with model.embed_tokens"):
        adaptation.fold()
    torch.testing.assert_close(model(IDS).logits, live, rtol=1e-4, atol=1e-4)
    adaptation.unfold()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_deep_copy_generates_on_its_own(model):
    adaptation = rf.adapt(model, "lora", rank=4)
    shake(adaptation)
    twin = copy.deepcopy(model)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, **options)
    rf.adaptation(model).remove()
    assert torch.equal(twin.generate(IDS, **options), expected)


def test_new_tokens_can_be_added_to_the_vocabulary(model):
    adaptation = rf.adapt(model, "lora", rank=4)
    shake(adaptation)
    before = model(IDS).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert torch.allclose(model(IDS).logits[..., :64], before, atol=1e-6)
