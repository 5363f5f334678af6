"""How a section of the parameters is declared, and how plain values become one."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_core.errors import ConfigError


class Section(BaseModel):
    """A part of the parameters: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ConfigT = TypeVar("ConfigT", bound=Section)


def parse(kind: type[ConfigT], values: Any, where: str = "params.yaml") -> ConfigT:
    """Builds a section from plain values.

    Raises ConfigError with one line a fault: file, key, value and rule.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(where, fault) for fault in error.errors())) from None


def _explain(where: str, fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "(whole)"
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown parameter {key} = {fault['input']!r}; no such key is defined"
    if fault["type"] == "missing":
        return f"{where}: parameter {key} is missing; it must be given"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{where}: {key}: {message}"
    return f"{where}: {key} = {fault['input']!r}: {message}"
