"""Hazards of the adapter for VAR: what it computes itself, against a stand-in of upstream's
classes. tests/integration runs upstream's own.
"""

import pytest
import torch

import kvruntime
from policies import ScaleKV
from tests.look_alikes.var import VAR
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

        def observer(scale, layer, row, q, keys, values):
            seen.append((q.dtype, keys.dtype))

        with kvruntime.attach(var, "full", 1.0, observer=observer) as attached:
            ours = var.autoregressive_infer_cfg()
    assert set(seen) == {(dtype, dtype)}
    assert attached.stats.page_bytes == attached._caches.latest.plan(2).page_bytes
    error = (ours - own).abs()
    assert float(error.max()) < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert float(error.mean()) < (0.005 if dtype == torch.bfloat16 else 0.001)


@pytest.mark.parametrize("policy", ["full", ScaleKV(grid=1)])
def test_h13_keys_in_float32_beside_values_in_bfloat16(var, policy):
    """As autocast leaves them on a GPU, where it normalises in float32."""
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(3, 2, side * side, 2, 16, generator=generator) for side in (1, 2, 3)]
    drawn = []
    for cast in (lambda part: part, lambda part: part.bfloat16()):
        with kvruntime.attach(var, policy, 1.0) as attached:
            drawn.append(
                [
                    attached.attend(layer, cast(q), cast(k), v.bfloat16())
                    for q, k, v in steps
                    for layer in range(2)
                ]
            )
    for ours, theirs in zip(*drawn, strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)


def test_h13_autocast_stays_outside_of_the_runtime(var):
    """What a policy scores in float32 it scores in float32 under autocast too."""
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(3, 2, side * side, 2, 16, generator=generator) for side in (1, 2, 3)]
    drawn = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            with kvruntime.attach(var, ScaleKV(grid=1), 2) as attached:
                drawn.append(
                    [attached.attend(i, *step.bfloat16()) for step in steps for i in range(2)]
                )
    for ours, theirs in zip(*drawn, strict=True):
        assert torch.equal(ours, theirs)
