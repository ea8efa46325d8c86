"""Gradient checkpointing and blocks without gradients: nothing is lost without a word, and the user's switches stay theirs."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.checkpoint import checkpoint

import rankfold as rf
from rankfold.core.host import Host
from rankfold.errors import InactiveError
from rankfold.training.activations import recomputing


class Own(nn.Module):
    """A model that checkpoints its first block by its own code; the second one always trains."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.block, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x):
        return {"logits": self.head(self.how(self.block, x))}


def asking(block, x):
    return checkpoint(block, x.detach().requires_grad_(), use_reentrant=True)


def without(block, x):
    with torch.no_grad():
        return block(x)


def twice(block, x):
    """As a model that looks ahead without gradients, in either order."""
    return block(x) + without(block, x) if x.sum() > 0 else without(block, x) + block(x)


HOW = {
    "plain": lambda block, x: block(x),
    "recomputed": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant and asking": asking,
    "also without": twice,
}
LOST = {"reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True), "no_grad": without}
X = torch.ones(2, 6)


def adapted(how, **options):
    torch.manual_seed(0)
    return rf.adapt(Own(how).train(), "lora", rank=2, **options)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("how", LOST.values(), ids=LOST)
def test_u18_a_block_that_lost_its_gradients_is_named(how):
    """Not at the end of a run: by the first backward pass, whatever steps the optimizer."""
    adaptation = adapted(how)
    loss = adaptation.model(X)["logits"].square().mean()
    with pytest.raises(InactiveError, match=r"'default': block\.0 ran without gradients.*exclude=\['block\.0'\]"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_the_law_fails_where_nobody_notes(monkeypatch):
    """The mutant: hosts that only count their calls."""

    def note(self):
        self.calls += 1

    monkeypatch.setattr(Host, "note", note)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_u18_a_block_that_lost_its_gradients_is_named(LOST["reentrant"])


@pytest.mark.parametrize("x", [X, -X])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_block_that_gets_its_gradients_is_not(how, x):
    adaptation = adapted(how)
    for _ in range(2):
        adaptation.model(x)  # a pass without a backward of its own
        adaptation.model(x)["logits"].square().mean().backward()
    assert all(p.grad is not None for p in adaptation.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_what_is_left_out_or_off_or_frozen_needs_no_gradient():
    adaptation = adapted(LOST["reentrant"], targets=["head"])
    adaptation.model(X)["logits"].square().mean().backward()
    adaptation = adapted(LOST["reentrant"])
    for name, parameter in adaptation.tensors().items():
        if "block" in name:
            parameter.requires_grad_(False)
    adaptation.model(X)["logits"].square().mean().backward()
    adaptation = adapted(LOST["reentrant"], name="first")
    rf.adapt(adaptation.model, "lora", rank=2, targets=["head"], name="second")
    adaptation.model(X)["logits"].square().mean().backward()


def test_evaluation_is_no_training_pass():
    adaptation = adapted(LOST["no_grad"])
    adaptation.model.eval()
    adaptation.model(X)["logits"].square().mean().backward()


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return hf.LlamaForCausalLM(config).train()


def switches(model):
    return [
        (name, m.gradient_checkpointing, m.__dict__.get("_gradient_checkpointing_func"))
        for name, m in model.named_modules()
        if hasattr(m, "gradient_checkpointing")
    ]


@pytest.mark.parametrize("own", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=["off", "reentrant", "recomputed"])
def test_recomputing_leaves_the_users_own_checkpointing(llama, own):
    if own is not None:
        llama.activation_checkpointing_enable(own)
    embedding = llama.get_input_embeddings()
    before, hooks = switches(llama), dict(embedding._forward_hooks)
    with recomputing(llama):
        assert llama.is_activation_checkpointing
        run = llama.model.layers[0]._gradient_checkpointing_func
        assert run.keywords["use_reentrant"] is False
    after = switches(llama)
    if own is None:
        assert not any(on for _, on, _ in after)
    else:
        assert after == before
    assert dict(embedding._forward_hooks) == hooks
    llama.disable_input_require_grads()
    assert not embedding._forward_hooks


def test_recomputing_gives_back_after_an_error(llama):
    llama.activation_checkpointing_enable({"use_reentrant": True})
    before = switches(llama)
    with pytest.raises(ZeroDivisionError), recomputing(llama):
        raise ZeroDivisionError
    assert switches(llama) == before
