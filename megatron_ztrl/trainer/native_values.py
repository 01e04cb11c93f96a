"""Native options as Megatron's dataclasses want them. YAML can only name an enum's member, or a dtype."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import torch


def native_values(section: str, upstream: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with names replaced by what they name.

    Megatron compares an option with members of its enum, or with dtypes, and takes a string for none of them: such
    an option would be ignored without a word.

    Args:
        section: Where the options are in the configuration.
        upstream: Megatron's dataclass.
        options: By field.

    Raises:
        ValueError: There is no such member or dtype.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(upstream)}
    return {name: _value(f"{section}.{name}", value, defaults[name]) for name, value in options.items()}


def _value(path: str, value: Any, default: Any) -> Any:
    if not isinstance(value, str):
        return value
    if isinstance(default, enum.Enum):
        members = {member.name: member for member in type(default)}
    elif isinstance(default, torch.dtype):
        names = ("float32", "bfloat16", "float16", "uint8")  # uint8 holds FP8 states
        members = {name: getattr(torch, name) for name in names}
    else:
        return value
    if value not in members:
        raise ValueError(f"{path}: must be one of {', '.join(members)}, got {value!r}")
    return members[value]
