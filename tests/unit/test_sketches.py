"""Sketches keep the distances of keys that differ in few directions, and most of any others'."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import Candidates, ScaleSchedule, StepSizes
from policies.scoring import block_scratch
from policies.scratch import lend
from policies.sketches import sketch, sketch_scratch, sketch_size
from tests.profiles import problem_of


def sketched(keys, bias=None, kept=1000):
    """Sketches of keys [rows, heads, n, head_dim], in scratch that holds anything at first."""
    rows, heads, count, dim = keys.shape
    sizes = StepSizes(rows, heads, dim, str(keys.dtype).removeprefix("torch."), 0, count, kept)
    scratch = lend([*sketch_scratch(sizes), *block_scratch(sizes)], torch.device("cpu"))
    for part in scratch.values():
        part.fill_(torch.nan if part.is_floating_point() else 77)
    nothing = torch.empty(0, dtype=torch.int64)
    queries = torch.zeros(rows, count, heads, dim)
    schedule = ScaleSchedule.of([1, 1])
    keep = np.full(heads, kept)
    found = sketch(
        Candidates(
            problem_of(schedule), 0, 0, keep, nothing, queries, keys, keys, bias, 1.0, scratch
        )
    )
    assert found.shape == (rows * heads, count, sketch_size(dim, kept))
    assert (found[..., -1] == 1.0).all()
    return found[..., :-1].double()


def distances(points):
    return torch.cdist(points.double(), points.double())


@given(
    rank=st.integers(0, 7),
    head_dim=st.sampled_from([4, 8, 32, 64]),
    count=st.sampled_from([1, 2, 5, 40, 600]),
    offset=st.sampled_from([0.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
@settings(max_examples=100)
def test_few_directions_are_kept_exactly(rank, head_dim, count, offset, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(2, 3, head_dim, head_dim, generator=generator))[0]
    rank = min(rank, head_dim)
    keys = torch.randn(2, 3, count, rank, generator=generator) @ basis[:, :, :rank] + offset
    keys = keys.to(dtype)
    flat = keys.flatten(0, 1)
    tolerance = 0.02 if dtype == torch.float32 else 0.02 * (1 + offset)
    assert torch.allclose(distances(sketched(keys)), distances(flat), atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_for_few_seeds_keys_are_their_own_sketches(dtype):
    keys = torch.randn(2, 3, 300, 32).add(5.0).to(dtype)
    found = sketched(keys, kept=32)
    assert found.shape == (6, 300, 32)
    flat = keys.flatten(0, 1).double()
    assert torch.allclose(distances(found), distances(flat), atol=1e-4)
    assert (found.mean(1).abs() < 0.3).all(), "less a centre of theirs"


def test_equal_keys_have_equal_sketches():
    keys = torch.randn(1, 1, 300, 32)
    keys[0, 0, 200:] = keys[0, 0, 7]
    found = sketched(keys)
    assert (found[0, 200:] == found[0, 7]).all()


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_almost_as_much_of_the_variance_as_the_best_directions(head_dim):
    """Against eigenvectors of all the keys' covariance; variance falls as in trained models."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator))[0]
    scales = torch.arange(1, head_dim + 1) ** -1.0
    keys = (torch.randn(1, 2, 1000, head_dim, generator=generator) * scales) @ basis
    found = sketched(keys)
    total = keys.flatten(0, 1).double().var(dim=1).sum(1)
    for lane, part in enumerate(found.var(dim=1).sum(1) / total):
        spectrum = torch.linalg.eigvalsh(keys[0, lane].double().T.cov()).flip(0)
        best = spectrum[: found.shape[2]].sum() / spectrum.sum()
        assert 0.97 * best <= part <= best + 1e-6


def test_places_without_a_token_do_not_count():
    keys = torch.randn(2, 2, 700, 32)
    bias = torch.zeros(2, 2, 1, 700)
    bias[:, 1, :, 100:400] = -torch.inf
    other = keys.clone()
    other[:, 1, 100:400] = torch.nan
    ours, theirs = sketched(keys, bias), sketched(other, bias)
    there = bias.flatten(0, 1)[:, 0] == 0
    assert (ours[there] == theirs[there]).all()


def test_no_global_random_state_is_touched():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = sketched(torch.ones(1, 1, 3, 24) * torch.arange(3).view(1, 1, 3, 1))
    assert (torch.get_rng_state() == torch_state).all()
    assert (np.random.get_state()[1] == numpy_state).all()
    assert (first == sketched(torch.ones(1, 1, 3, 24) * torch.arange(3).view(1, 1, 3, 1))).all()
