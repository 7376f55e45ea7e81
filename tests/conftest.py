"""Shared settings: property tests without deadlines, and small models that are quick to run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from kvruntime.reference.transformer import EmojiVAR

settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci")


@pytest.fixture
def tiny_model() -> EmojiVAR:
    """An untrained bundled model: 3 classes, 2 layers, 2 heads of 16."""
    torch.manual_seed(0)
    model = EmojiVAR(3, width=32, depth=2, num_heads=2).eval()
    return model
