"""What all sections of a config have in common: strict types, no unknown keys, no later change."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

WORLD = "world"
TEMPLATE_DATE = "2024-07-26"  # what Llama 3's own templates write where there is no clock

PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]


def _as_text(value: Any) -> Any:
    return value.isoformat() if type(value) is date else value  # YAML reads 2024-07-26 as a date


def _a_day(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError(f"{value!r} is no day. Write one as {TEMPLATE_DATE}") from None


Day = Annotated[str, BeforeValidator(_as_text), AfterValidator(_a_day)]


class Section(BaseModel):
    """A part of an experiment. Each field's description ends with its source: [P], [R] or [K]; see `schema`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
