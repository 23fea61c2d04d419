"""The base of every component's settings.

Each component declares its own settings beside its code as a `Settings` subclass (a frozen,
strict pydantic model: unknown keys, wrong types and values out of range are refused); `config`
composes them into a recipe. The docstring under a field is its documentation.
"""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Immutable, strictly validated settings of one component."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
