"""What these tests run on: a CUDA device, or where ADAPTERLAB_TEST_DEVICE says, to try the tests themselves."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("ADAPTERLAB_TEST_DEVICE", "cuda")


@pytest.fixture
def card() -> str:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return DEVICE
