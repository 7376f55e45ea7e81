"""Hazards of the adapter for VAR: what it computes itself, against a stand-in of upstream's
classes. tests/integration runs upstream's own.
"""

import pytest
import torch

import kvruntime
from tests.hazards.stand_in import VAR
from tests.support import every_attribute


@pytest.fixture(params=[False, True], ids=["plain", "cosine"])
def var(request):
    torch.manual_seed(0)
    return VAR(request.param)


def test_h13_biases_of_queries_and_values_and_the_clamped_gain(var):
    """Swapping the biases of K and V, or not clamping the gain, draws another picture."""
    own = var.autoregressive_infer_cfg()
    before = every_attribute(var)
    with kvruntime.attach(var, "full", 1.0) as attached:
        ours = var.autoregressive_infer_cfg()
    assert attached.stats.rows == 2 and attached.stats.gather_steps == 6
    assert float((ours - own).abs().max()) < 1e-4
    assert every_attribute(var) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_h13_under_autocast_attention_gets_the_number_format_of_v(var, dtype):
    """Normalised K is float32 there and V is not: kept in V's, or no step would run."""
    with torch.autocast("cpu", dtype):
        own = var.autoregressive_infer_cfg()
        seen = []

        def observer(scale, layer, row, q, keys):
            seen.append((q.dtype, keys.dtype))

        with kvruntime.attach(var, "full", 1.0, observer=observer) as attached:
            ours = var.autoregressive_infer_cfg()
    assert set(seen) == {(dtype, dtype)}
    assert attached.stats.page_bytes == attached._cache.plan(2).page_bytes
    error = (ours - own).abs()
    assert float(error.max()) < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert float(error.mean()) < (0.005 if dtype == torch.bfloat16 else 0.001)
