"""Reports without surprises."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """No field more, none less."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Spread(Strict):
    median: float
    min: float
    max: float
