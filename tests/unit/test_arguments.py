"""Arguments that people get wrong: refused with the value, before anything changes."""

import numpy as np
import pytest
import torch

from kvruntime import CacheOptions, PagedKVCache, Pool, ScaleSchedule, WillNeverFit, plan
from kvruntime.calibration import calibrate
from kvruntime.catalogue import find_model
from kvruntime.planning import max_rows, require
from policies import AMSKV, CacheGeometry, Problem, ScaleKV
from tests.unit.test_cache import GEOMETRY, SCHEDULE, draw, make, step

NO_ROWS = [
    ([[0, 1]], "flat list"),
    (torch.tensor([[0], [1]]), "flat list"),
    ([True, False], "mask.nonzero"),
    (torch.tensor([True, False]), "mask.nonzero"),
    (np.array([False, True]), "mask.nonzero"),
    (True, "mask.nonzero"),
    ([0.9], "flat list"),
    ("01", "flat list"),
    (None, "flat list"),
    ([], r"some of 0\.\.1, got \[\]"),
    ([0, 2], r"some of 0\.\.1, got \[0, 2\]"),
    ([-1], r"some of 0\.\.1, got \[-1\]"),
    (3, r"some of 0\.\.1, got 3"),
    (0, r"some of 0\.\.1, got 0"),
    ([0, 0], "distinct"),
]


@pytest.mark.parametrize(("rows", "words"), NO_ROWS)
def test_rows_that_are_none(rows, words):
    cache = make("full")
    wanted = draw(cache.open(2))
    with cache.open(2) as generation:
        with pytest.raises(ValueError, match=words):
            generation.keep_rows(rows)
        assert all(map(torch.equal, draw(generation), wanted))


@pytest.mark.parametrize(
    "rows", [[1], (1,), np.array([1]), torch.tensor([1], dtype=torch.int32), range(1, 2)]
)
def test_rows_of_every_kind(rows):
    with make("full").open(2) as generation:
        for layer in range(2):
            generation.attend(layer, *step(0))
        generation.keep_rows(rows)
        assert generation.rows == 1
    with make("full").open(2) as generation:
        generation.keep_rows(np.int64(1))
        assert generation.rows == 1


@pytest.mark.parametrize("layer", [0.0, False, "0", None])
def test_layers_that_are_none(layer):
    with make("full").open(2) as generation:
        with pytest.raises(ValueError, match="layer must be an int"):
            generation.attend(layer, *step(0))
        assert generation.is_open and draw(generation)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": None}, "a name or an object with name, needs"),
        ({"policy": 5}, "a name or an object"),
        ({"policy": ScaleKV}, "a name or an object"),
        ({"profile": {"layers": 2}}, "a file or a Profile"),
        ({"kv_dtype": ["int4"]}, "not one of int2"),
        ({"workspace": "abc"}, "workspace must be a size"),
        ({"memory": "abc"}, "memory must be a size"),
    ],
)
def test_options_of_the_wrong_kind(options, words):
    with pytest.raises(ValueError, match=words):
        CacheOptions(**options)


def test_numbers_of_numpy():
    chosen = CacheOptions(budget=np.int64(20), page_size=np.int32(4), memory=np.int64(2**30))
    assert (chosen.budget, chosen.page_size, chosen.memory) == (20, 4, 2**30)
    assert all(type(n) is int for n in (chosen.budget, chosen.page_size, chosen.memory))
    assert CacheOptions(budget=np.float32(0.5)).budget == 0.5


@pytest.mark.parametrize(
    "wrong", [{"geometry": (1, 2, 8)}, {"schedule": [1, 2, 3]}, {"pool": "2GiB"}]
)
def test_parts_of_a_cache_of_the_wrong_kind(wrong):
    parts = {"geometry": GEOMETRY, "schedule": SCHEDULE, "pool": None} | wrong
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a"):
        PagedKVCache(parts["geometry"], parts["schedule"], softmax_scale=1.0, pool=parts["pool"])


def test_scales_that_are_lists():
    with pytest.raises(ValueError, match=r"a tuple of 2 or 3 positive integers, got \[1, 1\]"):
        ScaleSchedule(([1, 1], [2, 2]))
    assert ScaleSchedule.of([[1, 1], [2, 2]]).sizes == ((1, 1), (2, 2))


@pytest.mark.parametrize("layer", [-1, 2])
def test_roles_of_layers_that_are_not_there(layer):
    problem = Problem(CacheGeometry(2, 2, 8), SCHEDULE, 20)
    roles = frozenset({layer})
    with pytest.raises(ValueError, match="is not one of the 2 layers"):
        ScaleKV((roles,) * len(SCHEDULE)).allocate(problem)
    with pytest.raises(ValueError, match="is not one of the 2 layers"):
        AMSKV(demanding=roles).allocate(problem)


def test_a_processor_with_a_number():
    cache = PagedKVCache(
        GEOMETRY, SCHEDULE, CacheOptions("full"), softmax_scale=1.0, device="cpu:0"
    )
    with cache.open(2) as generation:
        assert draw(generation)
    assert Pool(num_pages=1, page_bytes=64, device="cpu:0").device == torch.device("cpu")


@pytest.mark.parametrize("wrong", [{"pictures": 0}, {"pictures": True}, {"name": None}])
def test_calibration_refuses_before_it_draws(tiny_model, wrong):
    def never():
        pytest.fail("drawn")

    with pytest.raises(ValueError, match=next(iter(wrong))):
        calibrate(tiny_model, never, **{"pictures": 1, "name": "tiny"} | wrong)


def test_bytes_reserved_for_others():
    for wrong in ("20GiB", -1, True):
        with pytest.raises(ValueError, match="reserved must be a number of bytes"):
            plan("emoji64", memory="1GiB", reserved=wrong)


def test_the_advice_for_budgets_of_a_generation():
    """Fewer rows get more tokens each: their own plans tell how many fit, not this one's."""
    known = find_model("emoji64")
    options = CacheOptions("centroid", "4MiB", memory="5MiB", kv_dtype="int4")
    cache = PagedKVCache(known.geometry, known.schedule, options, softmax_scale=1.0)
    fits = max(rows for rows in range(1, 9) if cache.plan(rows).total_bytes <= 5 * 2**20)
    assert 1 < fits < 8
    cache.open(fits).close()
    with pytest.raises(WillNeverFit, match=f"{fits} of 8 rows would fit"):
        cache.open(8)
    with pytest.raises(WillNeverFit, match=f"{fits} of 8 rows would fit"):
        plan("emoji64", 4, "centroid", "4MiB", kv_dtype="int4", memory="5MiB")


def test_rows_that_no_budget_of_a_generation_serves():
    made = plan("emoji64", 1, "full")

    def up_to_five(rows):
        if rows > 5:
            raise WillNeverFit(2, 1, "too many")
        return made.for_rows(rows)

    assert max_rows(made, 2**50, plan_for=up_to_five) == 5
    eight = made.for_rows(8)
    with pytest.raises(WillNeverFit, match="5 of 8 rows would fit"):
        require(eight, eight.total_bytes - 1, plan_for=up_to_five)
    with pytest.raises(WillNeverFit, match="7 of 8 rows would fit"):
        require(eight, eight.total_bytes - 1)


def test_a_row_more_may_need_less():
    """Where rows go through a step in smaller chunks, the most that fit lie behind some that do
    not.
    """
    made = plan("emoji64", 1, "centroid", 0.1, workspace="4MiB")
    needs = [made.for_rows(rows).total_bytes for rows in range(1, 49)]
    dips = [rows for rows in range(1, 48) if needs[rows] < needs[rows - 1]]
    assert dips
    for rows in dips:
        most = max(n + 1 for n, need in enumerate(needs) if need <= needs[rows])
        assert max_rows(made, needs[rows]) == most > rows
        with pytest.raises(WillNeverFit) as caught:
            require(made.for_rows(rows), needs[rows])
        fits = max((n + 1 for n in range(rows - 1) if needs[n] <= needs[rows]), default=0)
        assert f"{fits} of {rows} rows" in str(caught.value)
