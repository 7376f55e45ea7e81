"""The models we know: their cache geometry and schedules, so that a plan needs no weights.

Sources: VAR models/__init__.py and demo_zero_shot_edit.ipynb; Infinity tools/run_infinity.py and
infinity/utils/dynamic_resolution.py (both FoundationVision).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from policies import CacheGeometry, Profile, ScaleSchedule, load_profile


@dataclass(frozen=True, slots=True)
class Model:
    """A model as the planner sees it. Guidance runs ``rows_per_picture`` rows for each picture.

    weights_bytes: of the model and its tokenizer, in the formats they draw in.
    text_encoder_bytes: of what turns prompts into features, in float16. running_bytes: what layers
    compute while one picture is drawn, measured or published; 0: not known.
    """

    name: str
    geometry: CacheGeometry
    schedule: ScaleSchedule
    rows_per_picture: int = 2
    profile: Path | None = None  # of statistics that we ship
    weights_bytes: int = 0
    text_encoder_bytes: int = 0
    running_bytes: int = 0

    def load_profile(self) -> Profile | None:
        """The statistics that we ship for it, if any."""
        return None if self.profile is None else load_profile(self.profile)

    def with_dtypes(self, key: str | None, value: str | None) -> Model:
        """The same model with other number formats for K and V."""
        geometry = self.geometry
        geometry = replace(
            geometry, key_dtype=key or geometry.key_dtype, value_dtype=value or geometry.value_dtype
        )
        return replace(self, geometry=geometry)


VAR_256 = ScaleSchedule.of((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
VAR_512 = ScaleSchedule.of((1, 2, 3, 4, 6, 9, 13, 18, 24, 32))

RESOLUTIONS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}  # number of scales used
_TALL = {  # height / width: (h, w) of thirteen scales; the inverse ratios swap the sides
    "1.000": "1,1 2,2 4,4 6,6 8,8 12,12 16,16 20,20 24,24 32,32 40,40 48,48 64,64",
    "1.250": "1,1 2,2 3,3 5,4 10,8 15,12 20,16 25,20 30,24 35,28 45,36 55,44 70,56",
    "1.333": "1,1 2,2 4,3 8,6 12,9 16,12 20,15 24,18 28,21 36,27 48,36 60,45 72,54",
    "1.500": "1,1 2,2 3,2 6,4 9,6 15,10 21,14 27,18 33,22 39,26 48,32 63,42 78,52",
    "1.750": "1,1 2,2 3,3 7,4 11,6 14,8 21,12 28,16 35,20 42,24 56,32 70,40 84,48",
    "2.000": "1,1 2,2 4,2 6,3 10,5 16,8 22,11 30,15 38,19 46,23 60,30 74,37 90,45",
    "2.500": "1,1 2,2 5,2 10,4 15,6 20,8 25,10 30,12 40,16 50,20 65,26 80,32 100,40",
    "3.000": "1,1 2,2 6,2 9,3 15,5 21,7 27,9 36,12 45,15 54,18 72,24 90,30 111,37",
}


def _infinity_sizes() -> dict[str, tuple[tuple[int, int], ...]]:
    sizes: dict[str, tuple[tuple[int, int], ...]] = {}
    for ratio, text in _TALL.items():
        pairs = [tuple(map(int, pair.split(","))) for pair in text.split()]
        sizes[ratio] = tuple((h, w) for h, w in pairs)
        if ratio != "1.000":
            sizes[f"{1 / float(ratio):.3f}"] = tuple((w, h) for h, w in pairs)
    return sizes


INFINITY_SIZES = _infinity_sizes()
ASPECT_RATIOS = tuple(INFINITY_SIZES)


def infinity_schedule(resolution: str = "1M", aspect: str = "1.000") -> ScaleSchedule:
    """Infinity's schedule for a resolution (0.06M, 0.25M, 0.60M, 1M) and an aspect ratio height /
    width.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution {resolution!r} is not one of {', '.join(RESOLUTIONS)}")
    if aspect not in INFINITY_SIZES:
        raise ValueError(f"aspect ratio {aspect!r} is not one of {', '.join(ASPECT_RATIOS)}")
    return ScaleSchedule(INFINITY_SIZES[aspect][: RESOLUTIONS[resolution]])


_LAYERS_HEADS_DIM = {
    "var-d16": (16, 16, 64),
    "var-d20": (20, 20, 64),
    "var-d24": (24, 24, 64),
    "var-d30": (30, 30, 64),
    "var-d36": (36, 36, 64),
    "infinity-125m": (12, 8, 96),
    "infinity-2b": (32, 16, 128),
    "infinity-8b": (40, 28, 128),
    "emoji64": (8, 6, 32),
}
_PARAMETERS = {  # of the model and of its tokenizer, counted in their authors' code
    "var-d16": (310_283_520, 108_948_355),
    "var-d20": (600_917_136, 108_948_355),
    "var-d24": (1_033_399_360, 108_948_355),
    "var-d30": (2_010_020_356, 108_948_355),
    "var-d36": (2_353_893_904, 108_948_355),
    "infinity-125m": (125_148_800, 109_970_579),
    "infinity-2b": (2_204_564_032, 110_118_051),
    "infinity-8b": (8_375_791_824, 81_624_209),
    "emoji64": (4_098_032, 925_267),
}
_TEXT_PARAMETERS = 1_223_527_424  # of the encoder of flan-t5-xl, by its published sizes
_RUNNING = {  # with a last scale of 64 x 64
    "infinity-2b": 800_000_000,  # docs/embedding.md, on a GPU; without the decoder
    "infinity-8b": 2_650_000_000,  # ScaleKV, table 3, batches of 8 and 16
}
MODEL_NAMES = tuple(_LAYERS_HEADS_DIM)


def find_model(name: str, resolution: str | None = None, aspect: str | None = None) -> Model:
    """A model of the catalogue; resolution and aspect ratio (Infinity only) default to 1M and
    1:1.
    """
    key = name.lower()
    if key not in _LAYERS_HEADS_DIM:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODEL_NAMES)}")
    if key.startswith("infinity"):
        schedule = infinity_schedule(resolution or "1M", aspect or "1.000")
    elif resolution or aspect:
        raise ValueError(f"{key} has one schedule: resolution and aspect ratio are for Infinity")
    else:
        schedule = VAR_512 if key == "var-d36" else VAR_256
    layers, heads, head_dim = _LAYERS_HEADS_DIM[key]
    dtype = "float32" if key == "emoji64" else "bfloat16"
    profile = Path(__file__).parent / "reference" / "profile.json" if key == "emoji64" else None
    geometry = CacheGeometry(layers, heads, head_dim, dtype, dtype)
    parameters, tokenizer = _PARAMETERS[key]
    each = 2 if key.startswith("infinity") else 4  # VAR's are float32 under autocast
    return Model(
        key,
        geometry,
        schedule,
        profile=profile,
        weights_bytes=each * parameters + 4 * tokenizer,
        text_encoder_bytes=2 * _TEXT_PARAMETERS if key.startswith("infinity") else 0,
        running_bytes=_RUNNING.get(key, 0) * schedule.tokens[-1] // 4096,
    )


def profile_names() -> tuple[str, ...]:
    """The models whose statistics are shipped."""
    return tuple(name for name in MODEL_NAMES if find_model(name).profile)


def recognise(geometry: CacheGeometry, schedule: ScaleSchedule) -> Model | None:
    """The catalogue's model of this shape that draws in this schedule, whatever its number format;
    None if there is none.
    """
    shape = (geometry.layers, geometry.heads, geometry.head_dim)
    for name, known in _LAYERS_HEADS_DIM.items():
        if known != shape:
            continue
        if not name.startswith("infinity"):
            model = find_model(name)
            if model.schedule == schedule:
                return model
            continue
        for resolution, scales in RESOLUTIONS.items():
            for aspect, sizes in INFINITY_SIZES.items():
                if sizes[:scales] == schedule.sizes:
                    return find_model(name, resolution, aspect)
    return None
