"""Transform-coded pages: records number by number, calibration, files, and where it is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import kvruntime
from kvruntime import CacheGeometry, CacheOptions, PagedKVCache, ScaleSchedule
from kvruntime.calibration import calibrate_coding
from kvruntime.coding import Coding, load_coding
from kvruntime.planning import make_plan
from kvruntime.quality import kl_nats
from kvruntime.reference import FOLDER, load_model
from kvruntime.reference.transformer import SelfAttention
from kvruntime.storage.coding import _STEPS, BITS, OCTILES, digits
from kvruntime.storage.layout import CODED, CODED_BITS, CodedFormat
from policies import Full
from tests.codecs import coded, coding_of, lend_scratch, transforms_of

GEOMETRY = CacheGeometry(2, 3, 32, "float32", "float32")
SCHEDULE = ScaleSchedule.of([1, 2, 3, 4])


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("bits", CODED_BITS)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_patterns_fill_a_record(part, bits, head_dim):
    pattern = BITS[part][bits]
    assert len(pattern) == OCTILES and sum(pattern) == OCTILES * bits
    assert sorted(pattern, reverse=True) == list(pattern)
    runs = digits(pattern, head_dim)
    assert runs[0].first_byte == 0
    assert [run.first_byte for run in runs[1:]] == [run.last_byte for run in runs[:-1]]
    assert runs[-1].last_byte == CodedFormat(bits).num_bytes(head_dim) == head_dim * bits // 8
    held = [0] * head_dim
    for run in runs:
        for place in range(run.start, run.end):
            assert held[place] == run.shift, "digits of a coordinate follow each other"
            held[place] += run.width
    assert held == [each for each in pattern for _ in range(head_dim // OCTILES)]


def test_steps_are_the_best_for_normal_numbers_or_a_bit_wider():
    numbers = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double()

    def error(step, bits):
        most = 2**bits - 1
        code = (numbers / step + most / 2).round().clamp(0, most)
        return float(((code - most / 2) * step - numbers).square().mean())

    for bits, step in _STEPS.items():
        if bits:
            best = min(error(step * factor, bits) for factor in (0.7, 0.8, 0.87, 0.93, 1.1, 1.2))
            assert error(step, bits) < (1.01 if bits == 2 else 1.35) * best


@given(
    seed=st.integers(0, 999),
    bits=st.sampled_from(CODED_BITS),
    lengths=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_records_hold_what_the_text_says(seed, bits, lengths, spread, dtype):
    """Heads of any lengths; what lies beyond the outermost steps saturates."""
    records, count = CodedFormat(bits), sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    tokens = (torch.randn(2, 2, count, 32, generator=generator) * spread).to(dtype)
    coding, ends = coding_of(GEOMETRY, seed), [sum(lengths[: h + 1]) for h in range(3)]
    held = torch.full_like(tokens, torch.nan)
    for part, transform in enumerate(coding.layer(1, torch.device("cpu"))):
        scratch = lend_scratch(tokens[part], tuple(lengths))
        out = torch.full((2, count, records.words(32)), -1, dtype=torch.int32)
        transform.encode(tokens[part], tuple(lengths), records, out, scratch)
        for region in scratch.values():
            region.view(torch.uint8).fill_(0xFF)
        transform.decode(out, tuple(lengths), records, held[part], scratch)
        again = transform.encode(held[part].float(), tuple(lengths), records, out.clone(), scratch)
        if dtype is torch.float32:
            assert torch.equal(again, out), "what was coded once stays as it is"
    for head, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        of_head = slice(end - length, end)
        for row in range(2):
            mine = tokens[:, row, of_head]
            wanted, slack = coded(
                mine, records, transforms_of(coding, 1, head), torch.zeros_like(mine)
            )
            bounds = slack + torch.finfo(dtype).eps * (wanted.abs() + slack)
            assert ((held[:, row, of_head].double() - wanted).abs() <= bounds).all()


def test_more_bits_are_less_error():
    geometry = CacheGeometry(1, 1, 128, "float32", "float32")
    coding, tokens = coding_of(geometry), torch.randn(1, 400, 128)
    for transform in coding.layer(0, torch.device("cpu")):
        tokens = torch.randn(1, 400, 128) @ transform.inverse[0].t() + transform.mean[0]
        errors = []
        for bits in CODED_BITS:
            records = CodedFormat(bits)
            scratch, held = lend_scratch(tokens, (400,)), torch.empty_like(tokens)
            out = torch.empty(1, 400, records.words(128), dtype=torch.int32)
            transform.encode(tokens, (400,), records, out, scratch)
            transform.decode(out, (400,), records, held, scratch)
            errors.append(float((held - tokens).square().mean()))
        assert sorted(errors) == errors and errors[0] < 1e-3 * float(tokens.square().mean())


def test_pages_become_coarser_step_by_step():
    """The exact first scales, then whatever fits: ever fewer bits, in ever more tokens a page."""
    schedule = ScaleSchedule.of([1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
    geometry = CacheGeometry(8, 6, 32, "bfloat16", "bfloat16")
    plan = make_plan(geometry, schedule, Full(), CacheOptions("full", 1.0, kv_dtype="coded3"), 2)
    made = [(each.records.bits if each.records else 16, each.page_size) for each in plan.formats]
    assert made == [(16, 3), (8, 6), (6, 8), (4, 12), (3, 16)]
    assert plan.bytes_per_page == 2 * 16 * 12
    assert plan.stage[:, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 3, 4, 4]
    assert plan.page_format == {"kv_dtype": "coded3", "kv_groups": None, "kv_start": 5}


def test_coded_pages_beat_quantised_ones_of_the_same_bytes():
    """On the bundled model: a record of 3 bits a number takes 12 bytes, one of int2 12 too."""
    model, labels = load_model(), torch.tensor([1, 9, 17, 21])
    codes, _ = model.generate_codes(labels, 77)
    wanted, found = model.teacher_forced(labels, codes), {}
    for kv_dtype in ("int2", "coded3"):
        with kvruntime.attach(model, "full", 1.0, kv_dtype=kv_dtype, kv_start=3) as cache:
            found[kv_dtype] = kl_nats(model.teacher_forced(labels, codes), wanted)
        assert cache.stats.kv_dtype == kv_dtype
    assert found["coded3"] < 0.2 * found["int2"]


def captured(model, draw, monkeypatch):
    """q, k, v of every step, [layer][scale], from the model's own cache."""
    steps = {id(block.attention): [] for block in model.blocks}
    project = SelfAttention.project

    def record(self, x):
        out = project(self, x)
        steps[id(self)].append([part.double() for part in out])
        return out

    with monkeypatch.context() as patch:
        patch.setattr(SelfAttention, "project", record)
        draw()
    return list(steps.values())


def test_calibration_measures_moments(tiny_model, monkeypatch):
    """Means, whitening, and the order of coordinates, against the definitions."""

    def draw():
        return tiny_model.generate(torch.tensor([0, 1]), seed=3)

    coding = calibrate_coding(tiny_model, draw, "tiny")
    for layer, steps in enumerate(captured(tiny_model, draw, monkeypatch)):
        for part in (0, 1):
            seen = [step[part + 1] for step in steps[:-1]]
            weights = torch.cat(
                [part.shape[1] ** -0.5 * torch.ones(part.shape[1]) for part in seen]
            )
            tokens = torch.cat(seen, 1)  # [rows, n, heads, head_dim]
            share = weights.double() / weights.sum() / tokens.shape[0]
            mean = torch.einsum("n,rnhd->hd", share, tokens)
            assert torch.allclose(coding.mean[part, layer].double(), mean, atol=1e-4)
            forward = coding.forward[part, layer].double()
            turned = torch.einsum("hij,rnhj->rnhi", forward, tokens - mean)
            covariance = torch.einsum("n,rnhi,rnhj->hij", share, turned, turned)
            variances = covariance.diagonal(dim1=1, dim2=2)
            # coordinates without variance of their own stay below 1
            assert (variances < 1.01).all() and (variances[:, :8] > 0.99).all()
            off = covariance - torch.diag_embed(variances)
            assert off[:, :8, :8].abs().max() < 0.02
            inverse = forward.inverse()
            metric = torch.eye(forward.shape[1], dtype=torch.float64).expand_as(forward)
            if part == 0:
                queries = [step[0] for step in steps[1:]]
                metric = sum(
                    q.shape[1] ** -0.5 * torch.einsum("rnhi,rnhj->hij", q, q) for q in queries
                )
            counts = torch.einsum("hji,hjk,hki->hi", inverse, metric, inverse)
            assert (counts[:, :-1] >= 0.98 * counts[:, 1:]).all(), "the most important one first"


def test_a_drawing_that_caches_nothing_is_refused(tiny_model):
    with pytest.raises(ValueError, match="did not run the model's sampler"):
        calibrate_coding(tiny_model, lambda: None, "tiny")
    with pytest.raises(ValueError, match="name must say"):
        calibrate_coding(tiny_model, lambda: None, "")


def test_the_bundled_coding_is_of_the_bundled_model():
    model = load_model()
    assert model.coding.model == "emoji64"
    model.coding.check(CacheGeometry(8, 6, 32, "float32", "float32"))
    assert model.coding.num_bytes == 2 * 8 * 6 * (2 * 32 * 32 + 32) * 4


def test_files(tmp_path):
    made, path = coding_of(GEOMETRY), tmp_path / "a.safetensors"
    made.save(path)
    read = load_coding(path)
    assert torch.equal(read.forward, made.forward) and torch.equal(read.mean, made.mean)
    assert read.model == "none"
    assert CacheOptions("full", 1.0, kv_dtype="coded3", coding=path).coding.model == "none"


def damaged(**changes):
    made = coding_of(GEOMETRY)
    return {"forward": made.forward, "mean": made.mean} | changes


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (damaged(mean=torch.zeros(2, 2, 3, 31)), "a coding is forward"),
        (damaged(mean=torch.zeros(2, 2, 3, 32, dtype=torch.float16)), "float32"),
        (damaged(mean=torch.full((2, 2, 3, 32), math.inf)), "not finite"),
        (damaged(forward=torch.zeros(2, 2, 3, 32, 32)), "cannot be inverted"),
        (damaged(more=torch.zeros(1)), "it holds forward, mean, more"),
        (damaged(forward=torch.zeros(4)), "a coding is forward"),
    ],
)
def test_damaged_files_are_refused(tensors, says, tmp_path):
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata={"kind": "kvruntime coding 1"})
    with pytest.raises(ValueError, match=says) as caught:
        load_coding(path)
    assert str(path) in str(caught.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="its kind is None"):
        load_coding(FOLDER / "emoji64.safetensors")
    path = tmp_path / "text"
    path.write_text("not a tensor")
    with pytest.raises(ValueError, match="text"):
        load_coding(path)
    with pytest.raises(ValueError, match="not a regular file"):
        load_coding(tmp_path)


@pytest.mark.parametrize("kv_dtype", sorted(CODED))
def test_a_coding_is_asked_for(kv_dtype, tiny_model):
    options = CacheOptions("full", 1.0, kv_dtype=kv_dtype)
    with pytest.raises(ValueError, match=rf"{kv_dtype} needs to know the model: give coding="):
        PagedKVCache(GEOMETRY, SCHEDULE, options, softmax_scale=1.0)
    tiny_model.coding = None
    with (
        pytest.raises(ValueError, match="give coding="),
        kvruntime.attach(tiny_model, "full", 1.0, kv_dtype=kv_dtype),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kv_dtype": "coded3", "kv_groups": 2}, "kv_groups 2 goes with int2, int4, int8"),
        ({"kv_dtype": "coded1"}, "is not one of int2, int4, int8, coded2, coded3, coded4"),
        ({"kv_dtype": "coded3", "coding": 3}, "coding must be a file or a Coding, got 3"),
    ],
)
def test_options_that_do_not_go_together(options, says):
    with pytest.raises(ValueError, match=says):
        CacheOptions("full", 1.0, **options)


def test_a_coding_of_another_model_is_refused():
    other = coding_of(CacheGeometry(2, 4, 32, "float32", "float32"))
    options = CacheOptions("full", 1.0, kv_dtype="coded3", coding=other)
    with pytest.raises(ValueError, match=r"\(2, 4, 32\), the model \(2, 3, 32\)"):
        PagedKVCache(GEOMETRY, SCHEDULE, options, softmax_scale=1.0)


def test_head_dimensions_that_cannot_be_coded_are_refused():
    geometry = CacheGeometry(1, 1, 48, "float32", "float32")
    options = CacheOptions("full", 1.0, kv_dtype="coded3", coding=coding_of(geometry))
    with pytest.raises(ValueError, match="a multiple of 32, got 48"):
        PagedKVCache(geometry, SCHEDULE, options, softmax_scale=1.0)


def test_a_coding_says_little_of_itself():
    assert repr(coding_of(GEOMETRY)) == "Coding(model='none')"
    assert isinstance(coding_of(GEOMETRY), Coding)
