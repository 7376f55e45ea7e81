"""Presets: which policy, format and budget a model does best with, as tuning found."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, model_validator

from kvruntime.options import CacheOptions
from policies import POLICY_NAMES
from policies.profile import DataFile, load_file


class Trial(BaseModel):
    """One way to cache, tried.

    tokens: that a lane holds at most. page_bytes: at the peak, of the rows that were tried.
    attention_error: root mean square of how far attention is from that over the whole history, over
        that of the latter; None where the policy cannot work with the budget.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str
    kv_dtype: str | None
    tokens: NonNegativeInt
    page_bytes: NonNegativeInt
    attention_error: NonNegativeFloat | None
    refused: str | None = None


def best_first(trials: Iterable[Trial]) -> list[Trial]:
    """Those that worked, by their error."""
    worked = [trial for trial in trials if trial.attention_error is not None]
    return sorted(worked, key=lambda trial: trial.attention_error or 0.0)


class CachePreset(DataFile):
    """What ``attach(preset=...)`` takes: the best of ``trials`` at this budget. budget: a share of
    the bytes of the model's own history, such as "2%".
    """

    version: Literal[1]
    kind: Literal["cache-preset"] = "cache-preset"
    policy: str
    budget: str
    kv_dtype: str | None
    trials: tuple[Trial, ...]

    @model_validator(mode="after")
    def _can_be_asked_for(self) -> CachePreset:
        _ = self.schedule  # raises ValueError for sizes that are no schedule
        if self.policy not in POLICY_NAMES:
            raise ValueError(f"policy {self.policy!r} is not one of {', '.join(POLICY_NAMES)}")
        CacheOptions(**self.options)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Policy, budget and format, by the names of CacheOptions."""
        return {"policy": self.policy, "budget": self.budget, "kv_dtype": self.kv_dtype}

    def save(self, path: Path | str) -> None:
        Path(path).write_text(self.model_dump_json(indent=1) + "\n")


def load_cache_preset(path: Path | str) -> CachePreset:
    """Read and validate a preset. Raises ValueError that names the file and what is wrong with
    it.
    """
    return load_file(Path(path), CachePreset)
