"""P3: what the runtime allocates is what it planned, measured by the profiler."""

import pytest
import torch

import kvruntime
from benchmarks.memory import peak_allocated_bytes
from kvruntime.reference import load_model
from policies import POLICY_NAMES


@pytest.mark.filterwarnings("ignore")  # the profiler's own
@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocated_is_planned(policy, dtype):
    model = load_model(dtype)
    labels = torch.arange(4)
    with kvruntime.attach(model, policy, 0.10) as cache:
        peak = peak_allocated_bytes(lambda: model.generate(labels))
        planned = cache.stats.page_bytes + cache.stats.workspace_bytes
    assert peak <= 1.05 * planned, "allocated more than planned"
    assert peak >= (0.85 if policy == "ams_kv" else 0.95) * planned, "planned more than is used"
    with kvruntime.attach(model, policy, 0.10) as cache:
        model.generate(labels)
        again = peak_allocated_bytes(lambda: model.generate(labels))
        stats = cache.stats
    assert again <= 1.05 * stats.workspace_bytes, "a second generation makes no pool"
