"""What every benchmark writes, checked before it is written. docs/policies.md names the fields."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from pydantic import Field

from benchmarks.schemas_many import Capacity, Fleet, Process, Soak, Stress
from benchmarks.strict import Spread, Strict

Results = TypeVar("Results")


class Environment(Strict):
    machine: str
    processor: str
    torch_threads: int
    gomp_spincount: str | None
    device: str
    versions: dict[str, str | None]


class Report(Strict, Generic[Results]):
    """options: the others that the benchmark was called with."""

    version: int = Field(ge=1, le=1)
    benchmark: str
    repeats: int = Field(ge=1)
    options: dict[str, Any]
    environment: Environment
    results: Results


class Allocator(Strict):
    pages: int
    pair_ms: float
    per_page_pair_ms: float
    speedup_vs_per_page: float
    speedup_spread: Spread
    call_pages: int
    ns_per_page_by_pool_size: dict[str, float]


class Attention(Strict):
    """Ratios are of ours to torch.cat + SDPA, speed-ups the other way; shares are of a
    generation's time: selection and compaction of scalekv, selection and folding of centroid,
    turning records back at the int4 run that spends most in it, and in its worst step.
    """

    geometry: str
    dtype: str
    rows: int
    budget_tokens: int
    own_seconds: Spread
    pair_speedup: float
    full_ratio: Spread
    scalekv_speedup: Spread
    selection_share: Spread
    centroid_speedup: Spread
    fold_share: Spread
    full_int4_ratio: Spread
    scalekv_int4_speedup: Spread
    selection_int4_share: Spread
    centroid_int4_speedup: Spread
    fold_int4_share: Spread
    dequantize_share: Spread
    dequantize_worst_step_share: Spread


class Interval(Strict):
    """A mean over pictures, and its 95 % interval."""

    mean: float | None
    low: float | None
    high: float | None


class FrontierPoint(Strict):
    """bytes_share: pages held at the peak over the bfloat16 bytes of the whole history. kl in
    nats; psnr_db over the pictures that differ from the own cache's; paired_db: how much closer
    they are than those of the base, kl_ratio: KL over its KL. attention_error: root mean square
    over that of attention to the whole history.
    """

    policy: str
    kv_dtype: str | None
    share: str
    bytes_share: float
    tokens: int
    page_size: int
    kv_start: int | None
    seconds_per_picture: float
    attention_error: float
    identical_pictures: int
    psnr_db: Interval
    ssim: Interval
    kl: Interval
    paired_db: Interval | None
    kl_ratio: float | None


class Refused(Strict):
    """A share that a policy cannot work with, in its own words."""

    policy: str
    kv_dtype: str | None
    share: str
    refused: str


class Frontier(Strict):
    """base: the published policy with the least KL, exact at 10 % of the bytes."""

    pictures: int
    base: str | None
    points: list[FrontierPoint]
    refused: list[Refused]


class Generate(Strict):
    """full_ratio: time over the own cache's; the others' over full's."""

    pictures: int
    dtype: str
    own_seconds: Spread
    full_ratio: float
    full_ratio_spread: Spread
    scalekv_ratio: float
    scalekv_ratio_spread: Spread
    centroid_ratio: float
    centroid_ratio_spread: Spread
    allocated_over_plan: dict[str, float]


class Infinity(Strict):
    """times_faster_than_own: own cache's time over it, round by round; "released" is the authors'
    ScaleKV. held_of_history: page bytes of what the model's own cache holds before the last scale.
    planned_bytes: pages and workspace. baseline_bytes: the own cache after all scales.
    peak_allocated_bytes: what torch held at most beyond the weights, of everything.
    """

    model: str
    layers: int
    pictures: int
    device: str
    dtype: str
    resolution: str
    seconds: dict[str, Spread]
    times_faster_than_own: dict[str, Spread]
    scalekv_times_faster_than_released: Spread | None
    held_of_history: dict[str, float]
    planned_bytes: dict[str, int]
    baseline_bytes: int
    peak_allocated_bytes: dict[str, int | None]
    planned_is_peak: bool


class Memory(Strict):
    policy: str
    dtype: str
    kv_dtype: str | None
    chunks: int
    ragged: bool
    page_bytes: int
    workspace_bytes: int
    planned_bytes: int
    measured_bytes: int
    ratio: float


class CorrectnessCase(Strict):
    backend: str
    path: str
    dtype: str
    head_dim: int
    page_size: int
    kv_dtype: str | None
    kv_groups: int | None
    before_start: bool
    weighted: bool
    queries: int
    error: float
    bound: float


class Crossing(Strict):
    kv_dtype: str | None
    cached_tokens: int
    queries: int
    paged_seconds: Spread
    gathered_seconds: Spread


class TileCase(Strict):
    """The paged kernel in one tile; is_the_rule: the one that the runtime takes."""

    kv_dtype: str | None
    queries: int
    tile_queries: int
    warps: int
    is_the_rule: bool
    seconds: Spread


class Gpu(Strict):
    """attention and generate: own_seconds, and a record for each policy and format."""

    device: str
    correctness: list[CorrectnessCase]
    all_correct: bool
    bandwidth: dict[str, float]
    crossover: list[Crossing]
    tiles: list[TileCase]
    attention: dict[str, Any]
    generate: dict[str, Any]


REPORTS: dict[str, type[Report[Any]]] = {
    "allocator": Report[Allocator],
    "attention": Report[list[Attention]],
    "capacity": Report[Capacity],
    "fleet": Report[Fleet],
    "frontier": Report[Frontier],
    "generate": Report[Generate],
    "gpu": Report[Gpu],
    "infinity": Report[Infinity],
    "memory": Report[list[Memory]],
    "process": Report[Process],
    "soak": Report[Soak],
    "stress": Report[Stress],
}
