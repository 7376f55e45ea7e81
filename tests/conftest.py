"""Shared settings: property tests without deadlines, and small models that are quick to run."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import Phase, settings

from kvruntime.reference.transformer import EmojiVAR

quick = (Phase.explicit, Phase.reuse, Phase.generate)  # a mutant need not be shrunk to be seen
phases = quick if "MUTANT_UNDER_TEST" in os.environ else tuple(Phase)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True, phases=phases)
settings.load_profile("ci")


@pytest.fixture
def tiny_model() -> EmojiVAR:
    """An untrained bundled model: 3 classes, 2 layers, 2 heads of 16."""
    torch.manual_seed(0)
    model = EmojiVAR(3, width=32, depth=2, num_heads=2).eval()
    return model
