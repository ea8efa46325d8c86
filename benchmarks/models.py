"""The models that are timed: a small Llama, and MiniLM's shape, both with random weights (time does not depend on them)."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["MODELS", "embeddings", "llama", "loss", "minilm", "output", "tiny_llama"]


def llama(layers: int = 4, hidden: int = 512, mlp: int = 1408, vocab: int = 4096, heads: int = 8) -> nn.Module:
    """A Llama with a causal head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=4096, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def minilm() -> nn.Module:
    """The shape of all-MiniLM-L6-v2: 6 layers of 384, without the word embeddings, which nothing here reads."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=2048,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).train()


def tiny_llama() -> nn.Module:
    """For the test suite, and for comparisons of functions, where size does not matter."""
    return llama(layers=2, hidden=48, mlp=80, vocab=96, heads=4)


MODELS = {"llama": llama, "minilm": minilm, "tiny": tiny_llama}


def embeddings(model: nn.Module, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """An input that asks for its gradient, so that the floor runs a whole backward pass."""
    torch.manual_seed(1)
    return torch.randn(1, tokens, model.config.hidden_size, dtype=dtype, requires_grad=True)  # type: ignore[union-attr, arg-type]


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The scalar of a training step: next-token cross-entropy for a language model, the distance to a fixed target otherwise."""
    if hasattr(model, "lm_head"):
        labels = torch.arange(x.shape[1]).remainder(model.config.vocab_size)[None]  # type: ignore[union-attr, arg-type]
        return model(inputs_embeds=x, labels=labels).loss
    hidden = model(inputs_embeds=x).last_hidden_state.float()
    target = torch.arange(hidden.numel()).remainder(7).view_as(hidden) - 3.0  # a norm makes the mean square itself a constant
    return (hidden - target).square().mean()


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits or hidden states: what competitors are compared by."""
    out = model(inputs_embeds=x)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state
