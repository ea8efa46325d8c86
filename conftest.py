"""Before anything imports triton: without a GPU its kernels run by the interpreter, and without triton they are left out."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["src/rankfold/kernels/triton/*"]
