"""What all sections of a recipe have in common."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys are errors, and an empty text unsets an optional setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_unset(cls, values: Any) -> Any:
        """TOML cannot write None, and ``--set key=`` must be able to take back what a recipe sets."""
        if not isinstance(values, dict):
            return values
        optional = {n for n, field in cls.model_fields.items() if field.default is None and not field.is_required()}
        return {name: value for name, value in values.items() if not (value == "" and name in optional)}


def _finite(value: Any) -> Any:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(inner)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return value


FreeSettings = Annotated[dict[str, Any], AfterValidator(_finite)]
"""Settings of any names, which others check; their numbers must be finite, as everywhere in a recipe."""
