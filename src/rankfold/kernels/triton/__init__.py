"""Triton forms of the hot products, for devices that Triton compiles for; `rankfold.kernels` has the reference of each.

Importing this package needs triton, which builds of torch for such devices bring along. With TRITON_INTERPRET=1, set before
triton is first imported, the same code runs on a CPU: that is how the tests hold it against the reference.
"""
