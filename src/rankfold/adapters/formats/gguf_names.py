"""What llama.cpp calls the weights of a model of transformers, and in which order it stores their rows.

A weight of ours is one of llama.cpp, or two: experts keep gate and up in one stack, which llama.cpp stores apart. Both then have
the same first factor and their own rows of the second. Models of the llama architecture hold q and k with the rows of a rotary
pair beside each other. GPT-2 stores its linear layers transposed; both a LoRA here and llama.cpp speak of the map [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from rankfold.errors import CompositionError, nearest

from ..adapter import Entry
from .rotary import Heads, pairs_of_halves

__all__ = ["ARCHITECTURES", "Naming", "places"]

Rows = Callable[[Tensor], Tensor]
"""[..., rows, r] -> [..., rows', r]: what one weight takes of the second factor, in its own order."""


@dataclass(frozen=True)
class Naming:
    """The names of one architecture.

    Args:
        architecture: as llama.cpp calls it.
        modules: of a block, by their path in it.
        stacks: of experts: the names that share one stack.
        block: pattern of a block's modules: its number, and the path in it.
        ends: modules outside the blocks.
        paired: q and k are stored with rotary pairs beside each other.
        interleaved: gate and up are every other row of their stack, instead of its two halves.
    """

    architecture: str
    modules: Mapping[str, str]
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    block: str = r"model\.layers\.(\d+)\.(.+)"
    ends: Mapping[str, str] = field(default_factory=lambda: {"model.embed_tokens": "token_embd", "lm_head": "output"})
    paired: bool = False
    interleaved: bool = False


ATTENTION = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
}  # fmt: skip
DENSE = {**ATTENTION, "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
FUSED = {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
SHARED = {
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
GPT2 = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
EXPERTS = {"mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "mlp.experts.down_proj": ("ffn_down_exps",)}

ARCHITECTURES = {
    "llama": Naming("llama", DENSE, paired=True),
    "mistral": Naming("llama", DENSE, paired=True),
    "mixtral": Naming("llama", ATTENTION, EXPERTS, paired=True),
    "qwen2": Naming("qwen2", DENSE),
    "qwen3": Naming("qwen3", DENSE),
    "qwen2_moe": Naming("qwen2moe", {**DENSE, **SHARED}, EXPERTS),
    "qwen3_moe": Naming("qwen3moe", DENSE, EXPERTS),
    "gpt_oss": Naming("gpt-oss", ATTENTION, EXPERTS, interleaved=True),
    "gemma": Naming("gemma", DENSE),
    "gemma2": Naming("gemma2", DENSE),
    "gemma3_text": Naming("gemma3", DENSE),
    "phi3": Naming("phi3", FUSED),
    "gpt2": Naming(
        "gpt2", GPT2, block=r"transformer\.h\.(\d+)\.(.+)", ends={"transformer.wte": "token_embd", "lm_head": "output"}
    ),
}
"""By `config.model_type` of transformers."""
POSITIONS = "transformer.wpe"


def places(e: Entry, heads: Heads, tied: bool) -> dict[str, Rows]:
    """{name in llama.cpp: what it takes of the rows of B} for the weight that an entry changes.

    Args:
        heads: of the base's attention, with a model_type of `ARCHITECTURES`.
        tied: whether the output head is the embedding: llama.cpp then has no such weight.

    Raises:
        CompositionError: something that llama.cpp has no name for, or applies no LoRA to; a magnitude or gain.

    >>> import torch
    >>> e = Entry("model.layers.0.mlp.experts.gate_up_proj", torch.ones(8, 6, 1), torch.ones(8, 1, 4), kind="experts")
    >>> {name: list(rows(e.B).shape) for name, rows in places(e, Heads("mixtral", 2, 2), False).items()}
    {'blk.0.ffn_gate_exps.weight': [8, 3, 1], 'blk.0.ffn_up_exps.weight': [8, 3, 1]}
    """
    naming = ARCHITECTURES[heads.model_type]
    if not e.additive:
        raise CompositionError(f"gguf: {e.key}: rescales rows, which llama.cpp does not; export --to folded")
    if e.name == POSITIONS:
        raise CompositionError(f"gguf: {e.key}: llama.cpp applies no LoRA to positions; leave it out, or export --to folded")
    if e.name in naming.ends:
        if tied:
            raise CompositionError(
                f"gguf: {e.key}: embedding and output head are one weight in this model, and llama.cpp has no place for a change "
                "of one of them. Leave it out (targets), or export --to folded"
            )
        return {f"{naming.ends[e.name]}.weight": _all}
    match = re.fullmatch(naming.block, e.name)
    module = match[2] if match else e.name
    stack = e.kind in ("experts", "experts-transposed")
    names = naming.stacks.get(module, ()) if stack else tuple(n for m, n in naming.modules.items() if m == module)
    if match is None or not names or (not stack and e.kind not in ("linear", "conv1d")):
        known = [*naming.modules, *naming.stacks, *naming.ends]
        raise CompositionError(
            f"gguf: {e.key}: llama.cpp has no name for it ({e.kind}) in a model of type {heads.model_type}; "
            f"nearest: {', '.join(nearest(module, known))}"
        )
    taken = _shares(e, len(names), naming.interleaved)
    if naming.paired and names[0] in ("attn_q", "attn_k"):
        count = _heads(e, heads)
        taken = [lambda B: pairs_of_halves(B, count)]
    return {f"blk.{match[1]}.{name}.weight": rows for name, rows in zip(names, taken, strict=True)}


def _all(B: Tensor) -> Tensor:
    return B


def _shares(e: Entry, count: int, interleaved: bool) -> list[Rows]:
    """The rows of a stack that each of its `count` weights takes."""
    if count == 1:
        return [_all]
    size, left = divmod(e.shape[0], count)
    if left:
        raise CompositionError(f"gguf: {e.key}: {e.shape[0]} rows do not split into gate and up")
    cuts = [slice(k, None, count) if interleaved else slice(k * size, (k + 1) * size) for k in range(count)]
    return [lambda B, cut=cut: B[..., cut, :] for cut in cuts]  # type: ignore[misc]


def _heads(e: Entry, heads: Heads) -> int:
    count = heads.keys if e.name.endswith("k_proj") else heads.queries
    if e.shape[0] % (2 * count):
        raise CompositionError(f"gguf: {e.key}: {e.shape[0]} rows are not {count} heads of an even size")
    return count
