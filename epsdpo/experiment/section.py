"""What all sections of a config have in common: strict types, no unknown keys, no later change."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

WORLD = "world"

PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of an experiment. Each field's description ends with its source: [P], [R] or [K]; see `schema`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
