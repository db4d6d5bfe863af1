"""What a GGUF file with a LoRA holds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.io.gguf.read import EMBEDDING, LINEAR, check_fields, method_of, pairs
from jlora.io.info.modules import FileFactors, summarize
from jlora.io.info.report import Content


def read(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Content:
    """The content of a file's fields and tensors.

    Raises:
        ValueError: if the file is no adapter.
    """
    if fields.get("general.type") != "adapter":
        raise ValueError(f"general.type is {fields.get('general.type')!r}: the file holds a model, and no adapter.")
    try:
        architecture, alpha = check_fields(fields)
    except ValueError as error:
        return Content((), (str(error),))
    modules, reasons = pairs(tensors)
    refused, updates = [f"{name}: {reason}" for name, reason in reasons.items()], []
    for module, pair in modules.items():
        try:
            layout = EMBEDDING if module == "token_embd" else LINEAR
            updates.append(
                summarize(module, FileFactors(method_of(pair, alpha), layout, dict(zip("ab", pair, strict=True))))
            )
        except ValueError as error:
            refused.append(f"{module}: {error}")
    return Content(tuple(updates), tuple(refused), (f"The architecture is {architecture}.",))
