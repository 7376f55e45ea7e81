"""P2, P4, P5, P8 with the xformers back end; and pictures of the bundled model drawn through it."""

from itertools import product

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import kvruntime
from kvruntime import BackendUnavailable, CacheOptions, PagedKVCache
from kvruntime.quality import kl_nats
from kvruntime.reference import load_model
from kvruntime.reference.tokenizer import PATCH_SIDES
from policies import CacheGeometry, ScaleSchedule
from tests.generations import Case, cases, check_generation
from tests.support import RandomFold, RandomPolicy, Spy

options = st.fixed_dictionaries(
    {"backend": st.just("xformers"), "paged_queries": st.sampled_from([0, 3, 10**6])}
)


interpreted = cases(("float16",), (16, 32), (8, 16, 32, 64, 128), options)


@pytest.fixture(scope="module")
def unsplit(xformers):
    """No split-K: the interpreter takes minutes to sum the parts. test_kernel.py has them."""
    with pytest.MonkeyPatch.context() as patch:
        for block, groups, bias in product((16, 32, 64), (1, 2, 4, 8), (False, True)):
            patch.setattr(xformers.paged_operator(block, groups, bias, None), "SPLIT_K", 1)
            if not bias:  # a name of its own in functools' cache
                patch.setattr(xformers.paged_operator(block, groups), "SPLIT_K", 1)
        yield


@settings(max_examples=8)
@given(case=interpreted)
def test_a_generation_is_dense_attention_over_the_kept_tokens(unsplit, case):
    cache = case.cache()
    check_generation(case, cache, 1e-2)
    assert cache.facts["backend"] == "xformers"
    said = "asked for; gathered tokens go to triton_splitK, blocks of 64"
    assert cache.facts["backend_reason"] == said


@pytest.mark.full
@settings(max_examples=80)
@given(case=interpreted)
def test_many_generations(unsplit, case):
    check_generation(case, case.cache(), 1e-2)


@pytest.mark.parametrize("paged_queries", [0, 10**6])
@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_weights_in_pages_and_gathered(unsplit, kv_dtype, is_ragged, paged_queries):
    """Folded lanes; ragged ones, empty ones beside others, are read from pages in any case."""
    options = {"backend": "xformers", "kv_dtype": kv_dtype, "paged_queries": paged_queries}
    geometry = CacheGeometry(2, 2, 32, "float16", "float16")
    policy = Spy(RandomFold(4, 1, is_ragged))
    schedule = ScaleSchedule.of([1, 2, 3, 4, 2])
    case = Case(geometry, schedule, policy, 4, 16, 2, 2**28, options)
    cache = case.cache()
    check_generation(case, cache, 1e-2)
    if is_ragged:
        is_empty = cache.plan(1).tokens[:-1] == 0
        assert (is_empty.any(axis=2) & ~is_empty.all(axis=2)).any()


@pytest.mark.parametrize(
    ("num_queries", "start"),
    [(0, 1), (1, 1), *(pytest.param(n, s, marks=pytest.mark.full) for n in (0, 1) for s in (0, 2))],
)
def test_the_hand_over_at_any_scale(unsplit, num_queries, start):
    options = {"backend": "xformers", "kv_dtype": "int4", "kv_start": start}
    geometry = CacheGeometry(2, 2, 32, "float16", "float16")
    policy = Spy(RandomPolicy(0, num_queries, is_ragged=False))
    case = Case(geometry, ScaleSchedule.of([1, 2, 3, 2]), policy, 1, 64, 2, 2**28, options)
    check_generation(case, case.cache(), 1e-2)


CLOSE = 2e-4  # nats: float16 rounds, and what is nearly as good is kept in place of another token
OF_EIGHT = 5e-4  # where eight centroids are all there is, one kept for another changes more


class Enough(Exception):
    """The scales that were wanted are drawn."""


def first_scales(model, labels, count, fed=None):
    """Log-probabilities [1, tokens, 512] of the first scales, and the same with the noise that
    draws codes; the codes of ``fed`` (scale by scale) are followed, else those that are drawn.
    """
    logs, noised = [], []
    generator = torch.Generator().manual_seed(5)

    def sample(scale, logits):
        noise = torch.rand(logits.shape, generator=generator).clamp(1e-20, 1 - 1e-7)
        logs.append(logits.log_softmax(-1))
        noised.append(logits - torch.log(-torch.log(noise)))
        if scale + 1 == count:
            raise Enough
        return noised[-1].argmax(-1) if fed is None else fed[scale]

    with pytest.raises(Enough):
        model.draw(labels, sample, 2.0)
    return logs, noised


@pytest.mark.parametrize(
    ("scales", "policy", "options"),
    [
        pytest.param(4, "full", {"paged_queries": 8}, marks=pytest.mark.full),
        pytest.param(
            4,
            "centroid",
            {"budget": 8, "page_size": 64, "kv_dtype": "int4", "kv_start": 1},
            marks=pytest.mark.full,
        ),
        pytest.param(6, "full", {"page_size": 128}, marks=pytest.mark.full),
        pytest.param(7, "scalekv", {"page_size": 32}, marks=pytest.mark.full),
        pytest.param(7, "centroid", {"page_size": 64}, marks=pytest.mark.full),
        pytest.param(
            7,
            "scalekv",
            {"page_size": 64, "kv_dtype": "int4", "kv_groups": 2},
            marks=pytest.mark.full,
        ),
        pytest.param(7, "full", {"paged_queries": 16}, marks=pytest.mark.full),
    ],
)
def test_the_bundled_model_draws_the_same_through_the_kernel(unsplit, scales, policy, options):
    model, labels = load_model(torch.float16), torch.arange(1)
    codes, drawn = None, {}
    for backend in ("sdpa", "xformers"):
        with kvruntime.attach(model, policy, backend=backend, **options) as cache:
            drawn[backend] = first_scales(model, labels, scales, codes)
            stats, made = cache.stats, cache.plan(1)
            assert stats.backend_reason.startswith("asked for") and stats.live_pages == 0
        codes = codes or [part.argmax(-1) for part in drawn["sdpa"][1]]
    most = options.get("paged_queries", 256)
    held = [made.format_after(scale, 0).records for scale in range(-1, scales - 1)]
    gathered = sum(
        side * side > most or scale == 0 or (records is not None and records.bits == 8)
        for scale, (side, records) in enumerate(zip(PATCH_SIDES[:scales], held, strict=True))
    )
    assert stats.gather_steps == 8 * gathered, "8 layers; nothing is cached at the first scale"
    assert stats.page_steps == 8 * (scales - gathered)
    flips = 0
    for ours, theirs, ours_noised, own in zip(
        drawn["xformers"][0], drawn["sdpa"][0], drawn["xformers"][1], codes, strict=True
    ):
        assert kl_nats([ours], [theirs]) < (OF_EIGHT if options.get("budget") == 8 else CLOSE)
        best = ours_noised.topk(2, dim=-1)
        differs = best.indices[..., 0] != own
        assert (best.values[..., 0] - best.values[..., 1])[differs].lt(0.1).all(), "no tie"
        flips += int(differs.sum())
    print(f"\n{policy} {options}: {flips} codes are drawn otherwise")
    assert flips <= 1


def test_float32_weights_may_become_float16_by_autocast(xformers, tiny_model):
    with kvruntime.attach(tiny_model, "full", 1.0, backend="xformers") as cache:
        with pytest.raises(BackendUnavailable, match=r"dtype=torch\.float32"):
            tiny_model.generate(torch.arange(1))
        assert cache.stats.live_pages == 0


def make_cache(head_dim=32, dtype="float16"):
    geometry = CacheGeometry(1, 1, head_dim, dtype, dtype)
    options = CacheOptions("full", 1, backend="xformers")
    return PagedKVCache(geometry, ScaleSchedule.of([1, 2]), options, softmax_scale=1.0)


def test_what_cannot_run_says_why(xformers, monkeypatch):
    def refused(head_dim, dtype):
        with pytest.raises(BackendUnavailable) as caught:
            make_cache(head_dim, dtype)
        return "; ".join(caught.value.reasons)

    assert "Embed dim 96 not supported" in refused(96, "float16")
    assert "dtype=torch.float32 (supported" in refused(32, "float32")
    assert "bf16 is only supported on A100+" in refused(32, "bfloat16")
    with monkeypatch.context() as newer:  # triton 3.9 has no block pointers
        xformers._broken.cache_clear()
        newer.delattr(tl, "make_block_ptr")
        said = refused(32, "float16")
        assert "its kernels fail with triton 3.7.1 (InterpreterError: AttributeError" in said
        assert "make_block_ptr" in said and "tested with xformers 0.0.35 and triton 3.7.1" in said
    xformers._broken.cache_clear()
    make_cache()
    monkeypatch.setattr(xformers.paged_operator(16, 1), "SUPPORTED_DEVICES", {"cuda"})
    assert "device=cpu (supported: {'cuda'})" in refused(32, "float16")
