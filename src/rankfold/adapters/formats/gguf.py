"""A LoRA for llama.cpp: one GGUF file (version 3) of factors, named as its converted models name weights.

    "GGUF", version, number of tensors, number of metadata pairs        all little-endian
    metadata: key, type, value                                          general.type = adapter, adapter.type = lora, ...
    tensors: name, number of sizes, sizes innermost first, type, offset
    data, every tensor at a multiple of 32 bytes

For a weight blk.0.attn_q.weight there are blk.0.attn_q.weight.lora_a [r, in] and .lora_b [out, r]; the change is
alpha / r · b a with one alpha for the file. Models of the llama architecture hold q and k with the rows of a rotary pair beside
each other, so there the rows of b are moved. Of token_embd the first factor is stored as [vocab, r].
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rankfold.atomic import atomic_file
from rankfold.errors import CompositionError, OptionError, nearest

from ..adapter import Adapter, Entry
from ..algebra import join_rows
from .rotary import Heads, pairs_of_halves

__all__ = ["ARCHITECTURES", "write_gguf"]

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3",
}  # fmt: skip
"""What llama.cpp calls the architecture of transformers' `config.model_type`."""
PAIRED = "llama"
"""The architecture whose q and k are stored with rotary pairs beside each other."""
MODULES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "lm_head": "output"}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

TYPES = {torch.float32: (0, "<f4"), torch.float16: (1, "<f2"), torch.bfloat16: (30, "<i2")}
"""dtype -> (ggml's number, how its bytes are written)."""
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
ALIGNMENT = 32
UINT32, FLOAT32, STRING = 4, 6, 8


def write_gguf(
    path: str | Path, adapter: Adapter, heads: Heads, tied: bool = False, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Write the file; return ‖Δ' − Δ‖ / ‖Δ‖ by weight.

    Exact where all sites have one alpha = scale · rank. Otherwise the commonest alpha is the file's, and the factor that is
    missing at the other sites goes into b, which rounds.

    Args:
        heads: of the base's attention, with its model_type.
        tied: whether the output head is the embedding: llama.cpp then has no such weight.
        dtype: float32, float16 or bfloat16; None keeps the factors' (float64 becomes float32).

    Raises:
        CompositionError: a model or a module that the format has no name for, a magnitude or gain, an adapted embedding or head
            of a tied model, or no change at all.
        OptionError: another dtype.
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
    architecture = ARCHITECTURES.get(heads.model_type)
    if architecture is None:
        close = ", ".join(nearest(heads.model_type, ARCHITECTURES))
        raise CompositionError(
            f"gguf: no names of llama.cpp are known for a model of type {heads.model_type!r}; nearest: {close}"
        )
    entries = [e for e in join_rows(adapter).entries.values() if e.rank or not e.additive]
    if not entries:
        raise CompositionError("gguf: the adapter changes no weight")
    names = {e.key: _name(e, tied) for e in entries}
    alphas = Counter(e.scale * e.rank for e in entries if e.scale)
    if not alphas:
        raise CompositionError("gguf: every change is scaled by 0; an alpha of 0 means a scale of 1 to llama.cpp")
    alpha = alphas.most_common(1)[0][0]
    alpha = struct.unpack("<f", struct.pack("<f", alpha))[0]  # as the file will hold it
    tensors: list[tuple[str, Tensor]] = []
    errors: dict[str, float] = {}
    for e in entries:
        b, a = _factors(e, alpha, dtype)
        errors[e.key] = _error(e, b, a, alpha)
        if architecture == PAIRED and names[e.key].endswith((".attn_q.weight", ".attn_k.weight")):
            b = pairs_of_halves(b, _heads(e, heads))
        tensors.append((f"{names[e.key]}.lora_a", a.mT if e.kind == "embedding" else a))
        tensors.append((f"{names[e.key]}.lora_b", b))
    common = Counter(t.dtype for _, t in tensors).most_common(1)[0][0]
    metadata: list[tuple[str, int, str | float]] = [
        ("general.architecture", STRING, architecture),
        ("general.type", STRING, "adapter"),
        ("general.file_type", UINT32, FILE_TYPES[common]),
        ("adapter.type", STRING, "lora"),
        ("adapter.lora.alpha", FLOAT32, alpha),
    ]
    atomic_file(Path(path), lambda place: _write(place, metadata, tensors))
    return errors


def _name(e: Entry, tied: bool) -> str:
    if not e.additive:
        raise CompositionError(f"gguf: {e.key}: rescales rows, which llama.cpp does not; export --to folded")
    if e.batch is not None or e.kind not in ("linear", "embedding"):
        raise CompositionError(f"gguf: {e.key}: is {e.kind}; only linear layers and the embedding are written")
    if e.name in ENDS:
        if tied:
            raise CompositionError(
                f"gguf: {e.key}: embedding and output head are one weight in this model, and llama.cpp has no place for a change "
                "of one of them. Leave it out (targets), or export --to folded"
            )
        return f"{ENDS[e.name]}.weight"
    match = LAYER.fullmatch(e.name)
    if match is None or match[2] not in MODULES:
        raise CompositionError(
            f"gguf: {e.key}: llama.cpp has no name for it; nearest: {', '.join(nearest(match[2] if match else e.name, MODULES))}"
        )
    return f"blk.{match[1]}.{MODULES[match[2]]}.weight"


def _heads(e: Entry, heads: Heads) -> int:
    count = heads.keys if e.name.endswith("k_proj") else heads.queries
    if e.shape[0] % (2 * count):
        raise CompositionError(f"gguf: {e.key}: {e.shape[0]} rows are not {count} heads of an even size")
    return count


def _factors(e: Entry, alpha: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """(b, a) with alpha / r · b a = the change."""
    missing = e.scale * e.rank / alpha
    B = e.B if abs(missing - 1.0) < 2**-24 else (e.B.double() * missing).to(torch.promote_types(e.B.dtype, torch.float32))
    return tuple(t.to(dtype or (t.dtype if t.dtype in TYPES else torch.float32)) for t in (B, e.A))  # type: ignore[return-value]


def _error(e: Entry, b: Tensor, a: Tensor, alpha: float) -> float:
    scale = alpha / e.rank
    if scale == e.scale and torch.equal(b, e.B) and torch.equal(a, e.A):
        return 0.0
    before, after = e.scale * e.B.double() @ e.A.double(), scale * b.double() @ a.double()
    size = float(before.norm())
    return float((after - before).norm()) / size if size else 0.0


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padding(size: int) -> bytes:
    return bytes(-size % ALIGNMENT)


def _bytes(t: Tensor) -> bytes:
    t = t.detach().cpu().contiguous()
    array = (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy()
    return array.astype(TYPES[t.dtype][1], copy=False).tobytes()


def _write(place: Path, metadata: Sequence[tuple[str, int, str | float]], tensors: Sequence[tuple[str, Tensor]]) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, kind, value in metadata:
        packed = _text(str(value)) if kind == STRING else struct.pack("<I" if kind == UINT32 else "<f", value)
        head += _text(key) + struct.pack("<I", kind) + packed
    offset = 0
    for name, t in tensors:
        head += (
            _text(name) + struct.pack(f"<I{t.ndim}Q", t.ndim, *reversed(t.shape)) + struct.pack("<IQ", TYPES[t.dtype][0], offset)
        )
        size = t.numel() * t.element_size()
        offset += size + len(_padding(size))
    with open(place, "wb") as file:
        file.write(head + _padding(len(head)))
        for _, t in tensors:
            data = _bytes(t)
            file.write(data + _padding(len(data)))
