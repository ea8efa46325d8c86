"""The models that are timed: a small Llama, and MiniLM's shape, both with random weights (time does not depend on them)."""

from __future__ import annotations

import torch
from torch import nn


def llama(dtype: torch.dtype = torch.float32, layers: int = 4, hidden: int = 512, mlp: int = 1408, vocab: int = 4096) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=8,
        max_position_embeddings=4096, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train()


def minilm(dtype: torch.dtype = torch.float32, layers: int = 6) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4096, hidden_size=384, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=2048,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).to(dtype).train()


def embeddings(model: nn.Module, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """An input that asks for its gradient, so that the floor runs a whole backward pass."""
    torch.manual_seed(1)
    return torch.randn(1, tokens, model.config.hidden_size, dtype=dtype, requires_grad=True)


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The scalar of a training step: next-token cross-entropy for a language model, a mean square otherwise."""
    if hasattr(model, "lm_head") or "CausalLM" in type(getattr(model, "base_model", model)).__name__:
        labels = torch.arange(x.shape[1]).remainder(4096)[None]
        return model(inputs_embeds=x, labels=labels).loss
    return model(inputs_embeds=x).last_hidden_state.float().square().mean()


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits or hidden states: what competitors are compared by."""
    out = model(inputs_embeds=x)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state
