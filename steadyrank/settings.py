"""The base of every config class: frozen, nothing unknown accepted, a sentence under each field."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen group of settings. Unknown keys are refused; the string under a field gives meaning, unit and range."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        populate_by_name=True,
    )
