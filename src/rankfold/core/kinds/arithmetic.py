"""What a kind says about its products where x Wᵀ is no plain matrix product: convolutions, stacked experts."""

from __future__ import annotations

from torch import Tensor

__all__ = ["Arithmetic"]


class Arithmetic:
    """How one call multiplies its activations x by W: [*batch, out, in], where that is no plain product over the last axis.

    `product` is differentiable; the gradients have names of their own because custom functions ask for them one by one. A factor
    without a batch serves every map of a stack.
    """

    @property
    def after(self) -> Arithmetic:
        """The product of a result with [*batch, out, r]."""
        return self

    def product(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y: x by W, in the dtype of x."""
        raise NotImplementedError

    def input_gradient(self, g: Tensor, W: Tensor, x: Tensor) -> Tensor:
        """∂/∂x for g = ∂/∂y. Of x only the shape is read."""
        raise NotImplementedError

    def weight_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """∂/∂W: [*batch, out, in]."""
        raise NotImplementedError

    def rows(self, v: Tensor, y: Tensor) -> Tensor:
        """v: [*batch, out] or [out], shaped to multiply y."""
        raise NotImplementedError

    def row_sums(self, y: Tensor) -> Tensor:
        """Σ of y over all but its rows, [*batch, out], in at least float32."""
        raise NotImplementedError

    def tokens(self, x: Tensor) -> Tensor:
        """The rows [*batch, tokens.., in] that W multiplies, each written out."""
        raise NotImplementedError

    def joined(self, y: Tensor) -> Tensor:
        """What `tokens` took apart, for a result [*batch, tokens.., out]."""
        raise NotImplementedError

    def shaped_bias(self, bias: Tensor) -> Tensor:
        """The module's bias as [*batch, out]."""
        return bias
