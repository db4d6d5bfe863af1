"""Records `peft_options.json`: every option of every configuration of PEFT, with its default.

pip install ".[references]"
PYTHONPATH=. python -m tests.golden.peft_options
"""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

import peft  # pyright: ignore[reportMissingImports]  # noqa: F401  (registers the types)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # pyright: ignore[reportMissingImports]


def default(field: Any) -> Any:
    """The default of a field as JSON holds it; "required" if it has none."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.value if isinstance(value, enum.Enum) else sorted(value) if isinstance(value, set) else value


def records() -> dict[str, dict[str, Any]]:
    types = {getattr(name, "value", name): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    options = {
        name: {field.name: default(field) for field in dataclasses.fields(types[name])} for name in sorted(types)
    }
    return json.loads(json.dumps(options))


if __name__ == "__main__":
    Path(__file__).with_suffix(".json").write_text(json.dumps(records(), indent=1) + "\n")
