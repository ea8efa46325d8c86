"""Operators, their rewriting rules, decompositions, sketches, spectra and counter-based random numbers.

Tensors in, tensors out; knows nothing of models. Operators are imported from here, numerics from their own modules.
"""

from .lowrank import Deviation, LowRank
from .magnitude import Magnitude
from .operator import Dense, Identity, Operator, Product, Scaled, Sum, at_least_float32, like
from .orthogonal import Cayley, Householder
from .rules import concatenate, contains, deviation, difference, gate_components, khatri_rao, simplify
from .structured import BlockDiagonal, Blockwise, Diagonal, Elementwise, Hadamard, Kronecker, Sparse, TensorRing, tiled_identity

__all__ = [
    "BlockDiagonal",
    "Blockwise",
    "Cayley",
    "Dense",
    "Deviation",
    "Diagonal",
    "Elementwise",
    "Hadamard",
    "Householder",
    "Identity",
    "Kronecker",
    "LowRank",
    "Magnitude",
    "Operator",
    "Product",
    "Scaled",
    "Sparse",
    "Sum",
    "TensorRing",
    "at_least_float32",
    "concatenate",
    "contains",
    "deviation",
    "difference",
    "gate_components",
    "khatri_rao",
    "like",
    "simplify",
    "tiled_identity",
]
