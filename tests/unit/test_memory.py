"""P3: what the runtime allocates is what it planned, measured by the profiler."""

import pytest
import torch

import kvruntime
from benchmarks.memory import peak_allocated_bytes
from kvruntime.reference import load_model
from policies import POLICY_NAMES


@pytest.mark.filterwarnings("ignore")  # the profiler's own
@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float32, "int4"),
        (torch.bfloat16, "int8"),
        (torch.bfloat16, "int2"),
    ],
)
def test_allocated_is_planned(policy, dtype, kv_dtype):
    model = load_model(dtype)
    labels = torch.arange(4)
    with kvruntime.attach(model, policy, 0.10, kv_dtype=kv_dtype) as cache:
        peak = peak_allocated_bytes(lambda: model.generate(labels))
        planned = cache.stats.page_bytes + cache.stats.workspace_bytes
    assert peak <= 1.05 * planned, "allocated more than planned"
    least = 0.85 if kv_dtype or policy == "ams_kv" else 0.94  # a bound where few tokens move
    assert peak >= least * planned, "planned more than is used"
    with kvruntime.attach(model, policy, 0.10, kv_dtype=kv_dtype) as cache:
        model.generate(labels)
        again = peak_allocated_bytes(lambda: model.generate(labels))
        stats = cache.stats
    assert again <= 1.05 * stats.workspace_bytes, "a second generation makes no pool"
