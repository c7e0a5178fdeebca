"""What the sections of settings share: which keys and numbers any of them takes, and names of parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import core_schema

from gdrt_ds.errors import nearest
from gdrt_ds.registry import part_names

Share = Annotated[float, Field(ge=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]

LARGEST = 2**31 - 1
"""The largest whole number that a setting takes: steps, samples, seeds and seconds stay far below it."""


class Section(BaseModel):
    """A part of the settings. Unknown keys are errors; every assignment is checked again.

    Numbers are finite, unless a field says what infinity means.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `on`, `yes` and `true` as true, which Python would take for 1."""
        kinds = str(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and "bool" not in kinds and ("int" in kinds or "float" in kinds):
            raise ValueError("true and false are no numbers")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _home_is_a_folder(cls, value: Any) -> Any:
        """The shell leaves `~` alone behind `key=`, and nobody expands it in a file."""
        if isinstance(value, dict):  # data.mixture
            return {_expanded(key): part for key, part in value.items()}
        return _expanded(value)

    @field_validator("*")
    @classmethod
    def _whole_numbers_have_an_end(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"a whole number may be at most {LARGEST:,}")
        return value


def _expanded(value: Any) -> Any:
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


@dataclass(frozen=True)
class PartName:
    """Marks a setting that names a part of a room: a file of that folder (gdrt_ds/registry.py).

    Attributes:
        room: the package whose files are allowed; none of them is imported to check a name.
        besides: a word that is allowed besides, e.g. `auto`.
    """

    room: str
    besides: str = ""

    def known(self) -> tuple[str, ...]:
        """All that is allowed."""
        return (*([self.besides] if self.besides else []), *part_names(self.room))

    def check(self, name: str) -> str:
        """Returns the name, or raises ValueError with the nearest one and all that there are."""
        if name in self.known():
            return name
        hint = nearest(name, self.known())
        if hint.startswith("did you mean"):
            hint = f"{hint} One of {', '.join(self.known())}"
        raise ValueError(f"unknown; {hint}")

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self.check, handler(source))
