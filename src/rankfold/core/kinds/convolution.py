"""nn.Conv1d, Conv2d and Conv3d: W [out, in, *kernel] as the map [out, in·kernel] of a patch; groups are a stack of such maps.

LoRA on it is a convolution to rank r followed by one of kernel 1: the change is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.linalg import like

from ..site import Site
from .arithmetic import Arithmetic
from .kind import Keep, Kind
from .linear import own_forward

if TYPE_CHECKING:
    from ..host import Host
    from ..planner import Program
    from ..store import Slot

__all__ = ["Convolution", "TransposedConvolution"]

CLASSES: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Convolution(Kind):
    """W [out, in/G, *kernel] with G groups is the map [out, in·kernel] if G is 1, else G maps [out/G, in/G·kernel]."""

    name = "convolution"
    automatic = False
    flat = False

    def makes(self, module: nn.Module) -> bool:
        return isinstance(module, CLASSES)

    def sites(self, path: str, module: nn.Module) -> list[Site]:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter):
            return []
        groups: Any = module.groups
        out, in_ = int(weight.shape[0]), int(weight[0].numel())
        if groups == 1:
            return [Site(path, (out, in_), self.name)]
        return [Site(path, (out // groups, in_), self.name, batch=int(groups))]

    def view(self, stored: Tensor, site: Site) -> Tensor:
        return stored.flatten(1) if site.batch is None else stored.reshape(site.batch, -1, stored[0].numel())

    def store(self, W: Tensor, stored: Tensor, site: Site) -> Tensor:
        # channels-last stays so; by strides, since `stored` may be cut over processes
        whole = torch.empty_strided(stored.shape, stored.stride(), dtype=stored.dtype, device=W.device)
        return whole.copy_(W.reshape(stored.shape))

    def refusal(self, module: nn.Module, site: Site) -> str | None:
        if site.rows is not None:
            return "rows of a convolution can't be adapted alone; choose the whole of it"
        library: Any = next(c for c in CLASSES if isinstance(module, c))
        kind: Any = getattr(type(module), "_native", type(module))
        if kind._conv_forward is not library._conv_forward:
            return f"its class {kind.__name__} has a forward of its own"
        return own_forward(module, library)

    def forward(
        self, host: Host, module: nn.Module, native: Any, groups: list[list[Slot]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        from .products import run

        x, how, single = called(module, args, kwargs)
        bias: Any = module.bias
        y = run(host.program(groups[0], module.training), how, x, bias, host.store.plan, host.store.memory)
        return y.squeeze(0) if single else y

    def explain(self, program: Program, tokens: int, memory: str, x: Tensor | None) -> dict[str, Any]:
        from .products import explain

        return explain(program, x)

    def inputs(
        self, module: nn.Module, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], keep: Keep
    ) -> Tensor | list[Tensor]:
        x, how, _ = called(module, args, kwargs)
        patches = how.tokens(x.detach())
        if site.batch is None:
            return patches.reshape(-1, patches.shape[-1])
        return [own.reshape(-1, own.shape[-1]) for own in patches]


class TransposedConvolution(Convolution):
    """nn.ConvTranspose1d, 2d, 3d: known, so that whoever names one is told that it can't be adapted."""

    name = "transposed convolution"

    def makes(self, module: nn.Module) -> bool:
        return isinstance(module, TRANSPOSED)

    def sites(self, path: str, module: nn.Module) -> list[Site]:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter):
            return []
        return [Site(path, (int(weight.shape[0]), int(weight[0].numel())), self.name)]

    def refusal(self, module: nn.Module, site: Site) -> str | None:
        return f"{type(module).__name__} is a transposed convolution, which rankfold does not adapt"


def called(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Convolving, bool]:
    """(x [N, C, *space] with what the product can't pad, the product, whether the batch was left out) of a call."""
    x: Tensor = args[0] if args else kwargs["input"]
    single = x.ndim == len(module.kernel_size) + 1
    x, padding = _padded(module, x.unsqueeze(0) if single else x)
    return x, Convolving(module.kernel_size, module.stride, padding, module.dilation, module.groups), single


def _padded(module: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(x, padding that is left for the product): modes other than zeros, and "same" of an even kernel, are written out."""
    sides: Sequence[int] = module._reversed_padding_repeated_twice
    even = all(a == b for a, b in zip(sides[::2], sides[1::2]))
    if module.padding_mode == "zeros" and even:
        return x, tuple(sides[::2])[::-1]
    if module.padding_mode == "zeros":
        return F.pad(x, list(sides)), (0,) * len(module.kernel_size)
    return F.pad(x, list(sides), mode=module.padding_mode), (0,) * len(module.kernel_size)


@dataclass(frozen=True)
class Convolving(Arithmetic):
    """x: [N, C, *space] by W: [out, C·kernel], or by one map for each group."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def after(self) -> Convolving:
        one, zero = (1,) * len(self.kernel), (0,) * len(self.kernel)
        return Convolving(one, one, zero, one, self.groups)

    def _stored(self, W: Tensor) -> Tensor:
        """[out, C/groups, *kernel] of a map, or of a stack of maps; one map for all groups is repeated."""
        if self.groups > 1:
            W = W.expand(self.groups, *W.shape[-2:]).reshape(-1, W.shape[-1])
        return W.reshape(W.shape[0], -1, *self.kernel)

    def product(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        bias = None if bias is None else like(bias, x)
        return convolve(x, self._stored(W), bias, self.stride, self.padding, self.dilation, self.groups)

    def _backward(self, g: Tensor, x: Tensor, W: Tensor, wanted: list[bool]) -> Any:
        none = [0] * len(self.kernel)
        return torch.ops.aten.convolution_backward(
            g, x, W, None, self.stride, self.padding, self.dilation, False, none, self.groups, wanted
        )

    def input_gradient(self, g: Tensor, W: Tensor, x: Tensor) -> Tensor:
        return self._backward(g, x, self._stored(W), [True, False, False])[0]

    def weight_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        out, in_ = g.shape[1], x.shape[1] // self.groups
        W = g.new_empty(1).expand(out, in_, *self.kernel)
        G = self._backward(g, x, W, [False, True, False])[1]
        return G.flatten(1) if self.groups == 1 else G.reshape(self.groups, out // self.groups, -1)

    def rows(self, v: Tensor, y: Tensor) -> Tensor:
        v = v.expand(self.groups, v.shape[-1]).reshape(-1) if self.groups > 1 else v
        return v.view(1, -1, *(1,) * len(self.kernel))

    def row_sums(self, y: Tensor) -> Tensor:
        dtype = y.dtype if y.dtype in (torch.float32, torch.float64) else torch.float32
        total = y.sum((0, *range(2, y.ndim)), dtype=dtype)
        return total if self.groups == 1 else total.view(self.groups, -1)

    def shaped_bias(self, bias: Tensor) -> Tensor:
        return bias if self.groups == 1 else bias.view(self.groups, -1)

    def tokens(self, x: Tensor) -> Tensor:
        """[N, *space, C·kernel], or [groups, N, *space, C/groups·kernel]."""
        dims = len(self.kernel)
        if any(self.padding):
            x = F.pad(x, [p for side in reversed(self.padding) for p in (side, side)])
        for d, (size, step, apart) in enumerate(zip(self.kernel, self.stride, self.dilation)):
            x = x.unfold(2 + d, (size - 1) * apart + 1, step)[..., ::apart]  # [N, C, *space, *kernel so far]
        x = x.movedim(1, 1 + dims)  # [N, *space, C, *kernel]
        if self.groups == 1:
            return x.flatten(1 + dims)
        return x.unflatten(1 + dims, (self.groups, -1)).movedim(1 + dims, 0).flatten(2 + dims)

    def joined(self, y: Tensor) -> Tensor:
        dims = len(self.kernel)
        y = y if self.groups == 1 else y.movedim(0, 1 + dims).flatten(1 + dims)
        return y.movedim(-1, 1)
