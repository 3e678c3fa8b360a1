"""Full fp32 precision of matrix products."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

__all__ = ["full_fp32"]

_TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Disable TF32, which keeps 10 of fp32's 23 mantissa bits, inside this context.

    Torch convolves in TF32 by default. Transformer Engine multiplies in TF32 whatever torch's flags
    are (`transformer_engine/common/gemm/cublaslt_gemm.cu`), so the environment variable is set too;
    NVIDIA's libraries read it when they are first used.
    """
    import torch

    before = os.environ.get(_TF32_OVERRIDE)
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    os.environ[_TF32_OVERRIDE] = "0"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
        if before is None:
            del os.environ[_TF32_OVERRIDE]
        else:
            os.environ[_TF32_OVERRIDE] = before
