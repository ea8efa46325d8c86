"""A LoRA for llama.cpp: one GGUF file of factors, named as its converted models name weights.

For a weight blk.0.attn_q.weight there are blk.0.attn_q.weight.lora_a [r, in] and .lora_b [out, r], with a leading dimension for
the experts of a stack; the change is alpha / r · b a with one alpha for the file. Of token_embd the first factor is stored as
[vocab, r]. The layout is the one that llama.cpp checks and multiplies when it loads an adapter.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rankfold.errors import CompositionError, OptionError, nearest

from ..adapter import Adapter, Entry
from ..algebra import join_rows
from .gguf_file import TYPES, write_file
from .gguf_names import ARCHITECTURES, places
from .rotary import Heads
from .rounding import cast, relative_error

__all__ = ["ARCHITECTURES", "write_gguf"]


def write_gguf(
    path: str | Path, adapter: Adapter, heads: Heads, tied: bool = False, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Write the file; return ‖Δ' − Δ‖ / ‖Δ‖ by weight.

    Exact where all sites have one alpha = scale · rank that float32 holds. Otherwise the commonest alpha is the file's, and the
    factor that is missing at the other sites goes into b, which rounds.

    Args:
        heads: of the base's attention, with its model_type.
        tied: whether the output head is the embedding: llama.cpp then has no such weight.
        dtype: float32, float16 or bfloat16; None keeps the factors' (float64 becomes float32).

    Raises:
        CompositionError: a model or a module that the format has no name for, a magnitude or gain, an adapted embedding or head
            of a tied model, or no change at all.
        OptionError: another dtype. NumericError: a number that float16 can't hold.
        FileError: the file can't be written.

    >>> import tempfile
    >>> q = Entry("model.layers.0.self_attn.q_proj", torch.ones(4, 1), torch.ones(1, 4), scale=2.0)
    >>> write_gguf(path := Path(tempfile.mkdtemp()) / "lora.gguf", Adapter.of([q]), Heads("llama", 2, 2))
    {'model.layers.0.self_attn.q_proj': 0.0}
    >>> path.read_bytes()[:4]
    b'GGUF'
    """
    if dtype is not None and dtype not in TYPES:
        raise OptionError(f"gguf: dtype {dtype}; use one of {', '.join(str(d) for d in TYPES)}")
    if heads.model_type not in ARCHITECTURES:
        close = ", ".join(nearest(heads.model_type, ARCHITECTURES))
        raise CompositionError(
            f"gguf: no names of llama.cpp are known for a model of type {heads.model_type!r}; nearest: {close}"
        )
    entries = [e for e in join_rows(adapter).entries.values() if e.rank or not e.additive]
    if not entries:
        raise CompositionError("gguf: the adapter changes no weight")
    where = {e.key: places(e, heads, tied) for e in entries}
    alpha = _alpha(entries)
    tensors: list[tuple[str, Tensor]] = []
    errors: dict[str, float] = {}
    for e in entries:
        written = _written(e, alpha, dtype)
        errors[e.key] = relative_error(e, written)
        for name, rows in where[e.key].items():
            tensors.append((f"{name}.lora_a", written.A.mT if e.kind == "embedding" else written.A))
            tensors.append((f"{name}.lora_b", rows(written.B)))
    common = Counter(t.dtype for _, t in tensors).most_common(1)[0][0]
    metadata: dict[str, str | int | float] = {
        "general.architecture": ARCHITECTURES[heads.model_type].architecture,
        "general.type": "adapter",
        "general.file_type": TYPES[common][1],
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    write_file(Path(path), metadata, tensors)
    return errors


def _alpha(entries: list[Entry]) -> float:
    """The commonest, as a float32 of the file holds it."""
    alphas = Counter(e.scale * e.rank for e in entries if e.scale)
    if not alphas:
        raise CompositionError("gguf: every change is scaled by 0; an alpha of 0 means a scale of 1 to llama.cpp")
    return struct.unpack("<f", struct.pack("<f", alphas.most_common(1)[0][0]))[0]


def _written(e: Entry, alpha: float, dtype: torch.dtype | None) -> Entry:
    """The entry with scale alpha / r, in a dtype of the format."""
    missing = e.scale * e.rank / alpha
    B = e.B if abs(missing - 1.0) < 2**-24 else (e.B.double() * missing).to(torch.promote_types(e.B.dtype, torch.float32))
    B, A = (cast(t, dtype or (t.dtype if t.dtype in TYPES else torch.float32), f"gguf: {e.key}") for t in (B, e.A))
    return replace(e, B=B, A=A, scale=alpha / e.rank)
