"""What the original code of Stable Diffusion calls the modules of a U-Net of diffusers, as sd-scripts names those of SDXL.

With L layers per block (2 in SDXL), both code bases build one network from the same parts:

    input_blocks.0.0                  conv_in
    input_blocks.(1 + i(L+1) + j)     .0 is down_blocks.i.resnets.j, .1 down_blocks.i.attentions.j
    input_blocks.((i+1)(L+1)).0.op    down_blocks.i.downsamplers.0.conv
    middle_block.0, .1, .2            mid_block.resnets.0, attentions.0, resnets.1
    output_blocks.(i(L+1) + j)        .0 is up_blocks.i.resnets.j, .1 up_blocks.i.attentions.j; the last of a block holds
                                      up_blocks.i.upsamplers.0 behind these
    time_embed.0, .2; label_emb.0.0, .0.2; out.0, out.2

Inside an attention the names agree; a residual block numbers its layers. Podell et al., "SDXL: Improving Latent Diffusion Models
for High-Resolution Image Synthesis", 2023, arXiv:2307.01952.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["original_names"]

OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
ROOT = re.compile(r"(?:^|\.)(?=(?:down_blocks|mid_block|up_blocks)\.|conv_(?:in|norm_out|out)$|(?:time|add)_embedding\.)")


def original_names(modules: Iterable[str]) -> dict[str, str]:
    """{module: its name in the original code}, for the modules of a U-Net; empty where there is none.

    >>> names = original_names(["down_blocks.0.resnets.1.conv1", "down_blocks.1.attentions.0.proj_in", "unet.conv_out"])
    >>> names["down_blocks.1.attentions.0.proj_in"], names["down_blocks.0.resnets.1.conv1"]
    ('input_blocks.4.1.proj_in', 'input_blocks.2.0.in_layers.2')
    """
    own = [(m, *_parted(m)) for m in modules]
    rests = {(root, rest) for _, root, rest in own}
    found: dict[str, str] = {}
    for root in {root for _, root, _ in own}:
        blocks = [match for r, rest in rests if r == root and (match := BLOCK.fullmatch(rest))]
        layers = max((int(b[4]) + 1 for b in blocks if b[1] == "down" and b[3] == "resnets"), default=None)
        if layers is None:
            continue
        attending = {int(b[2]) for b in blocks if b[1] == "up" and b[3] == "attentions"}
        for module, r, rest in own:
            name = _original(rest, layers, attending) if r == root else None
            if name is not None:
                found[module] = root + name
    return found


def _parted(module: str) -> tuple[str, str]:
    """(what stands before the U-Net's own names, these): ("unet.", "conv_in")."""
    match = ROOT.search(module)
    return ("", module) if match is None else (module[: match.end()], module[match.end() :])


def _original(rest: str, layers: int, attending: set[int]) -> str | None:
    if rest in OUTSIDE:
        return OUTSIDE[rest]
    if (match := MIDDLE.fullmatch(rest)) is not None:
        part, j, inner = match[1], int(match[2]), match[3]
        return f"middle_block.{1 if part == 'attentions' else 2 * j}.{_inner(part, inner)}"
    if (match := BLOCK.fullmatch(rest)) is None:
        return None
    side, i, part, j, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
    first = i * (layers + 1)
    if part == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op" if inner == "conv" else None
    if part == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if i in attending else 1}.{inner}"
    place = f"input_blocks.{1 + first + j}" if side == "down" else f"output_blocks.{first + j}"
    return f"{place}.{0 if part == 'resnets' else 1}.{_inner(part, inner)}"


def _inner(part: str, inner: str) -> str:
    return RESIDUAL.get(inner, inner) if part == "resnets" else inner
