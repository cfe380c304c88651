"""Arithmetic of float32 on GPUs."""

import pytest
import torch

from runtime.devices import set_precision


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", True), ("fp16", True)])
def test_tf32_is_allowed_at_every_precision_except_fp32(precision, allowed):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = not allowed
        set_precision(precision)
        assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
    finally:
        for backend, previous in zip(backends, before, strict=True):
            backend.allow_tf32 = previous
