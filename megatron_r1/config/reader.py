"""Values out of a parsed config.json, each checked for its kind and refused by its name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_r1.errors import ConfigError

_MOST = {
    "num_hidden_layers": 10_000, "num_nextn_predict_layers": 100, "n_routed_experts": 100_000, "num_experts": 100_000,
}  # fmt: skip


class Reader:
    """`raw` with what transformers takes for absent fields (`defaults`); `source` names the file in messages."""

    def __init__(self, raw: Mapping[str, Any], source: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.raw, self.source = {**(defaults or {}), **raw}, source

    def value(self, field: str) -> Any:
        if self.raw.get(field) is None:
            raise ConfigError(f"{self.source}: field {field} is missing; copy it from the model's own config.json")
        return self.raw[field]

    def integer(self, field: str) -> int:
        value = self.value(field)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{self.source}: {field} is {short(value)}; it must be a positive integer")
        most = _MOST.get(field, 2**31 - 1)
        if value > most:
            raise ConfigError(f"{self.source}: {field} is {short(value)}; it must be a positive integer up to {most}")
        return value

    def optional_integer(self, field: str) -> int | None:
        """A positive integer; None if the field is absent or null."""
        return None if self.raw.get(field) is None else self.integer(field)

    def count(self, field: str, *, nullable: bool = True) -> int:
        """An integer that may be 0. Absent or null is 0, or refused where it is not `nullable`."""
        value = self.raw.get(field) if nullable else self.value(field)
        if value is None or (type(value) is int and value == 0):
            return 0
        if type(value) is int and value < 0:
            self.refuse(f"{field} is {short(value)}; it must be 0 or a positive integer")
        return self.integer(field)

    def number(self, field: str) -> float:
        """A number that transformers' classes declare as a float: they raise on an integer."""
        value = self.value(field)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            self.refuse(f"{field} is {value}; transformers takes no integer there: write {float(value)}")
        return self.finite(field, value)

    def finite(self, field: str, value: Any) -> float:
        """`value`, which `field` holds, as a float."""
        number = math.nan
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                number = float(value)
        if not math.isfinite(number):
            raise ConfigError(f"{self.source}: {field} is {short(value)}; it must be a number")
        return number

    def boolean(self, field: str) -> bool:
        value = self.raw.get(field)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.source}: {field} is {short(value)}; it must be true or false")
        return value

    def refuse(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.source}: {message}")


def short(value: object) -> str:
    """For messages: an integer may have more digits than Python will print."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
