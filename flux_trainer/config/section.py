"""What all sections of the settings are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from flux_trainer.runtime.paths import expand_home

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Degree = Annotated[int, Field(ge=1)]
PathName = Annotated[str, AfterValidator(expand_home)]
"""A file or folder, or a name on the Hugging Face hub; a leading ~ is the home folder."""


class Section(BaseModel):
    """A TOML section: unknown keys are errors, only int -> float is coerced, numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
