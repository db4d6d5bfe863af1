"""What a file of kohya, LyCORIS or diffusers holds."""

from collections.abc import Mapping

import numpy as np

from jlora._adapter.summary import UpdateSummary
from jlora.io.info.modules import FileFactors, summarize
from jlora.io.info.report import Content
from jlora.io.kohya.forms import contents
from jlora.io.kohya.keys import by_module, split_key
from jlora.io.kohya.read import configurations, with_configuration
from jlora.io.peft.config import Config
from jlora.methods import Full


def is_file(names: list[str]) -> bool:
    """Whether tensors of these names are an adapter of kohya, LyCORIS or diffusers."""
    endings = {split[1] for name in names if (split := split_key(name))}
    return bool(endings - {"weight"})


def format_name(names: list[str]) -> str:
    """Whose keys these are."""
    return "diffusers" if any("." in split[0] for name in names if (split := split_key(name))) else "kohya or LyCORIS"


def read(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Content:
    """The content of a file's tensors.

    Arguments:
        tensors: by their keys.
        metadata: of the file.
    """
    refused: list[str] = []
    try:
        modules, unknown = by_module(tensors)
        configs = configurations(metadata)
    except ValueError as error:
        return Content((), (str(error),))
    refused += [f"{key}: jlora knows no such tensor." for key in unknown]
    updates: list[UpdateSummary] = []
    for key, by_kind in modules.items():
        try:
            updates += _updates(key, by_kind, configs)
        except ValueError as error:
            refused.append(f"{key}: {error}")
    return Content(tuple(updates), tuple(refused))


def _updates(key: str, by_kind: Mapping[str, np.ndarray], configs: Mapping[str, Config]) -> list[UpdateSummary]:
    """The summaries of a module's weight and of its parameters."""
    content, parameters = contents(by_kind)
    updates = []
    if content is not None:
        if "alpha" not in by_kind:
            content = with_configuration(content, key, configs)
        updates.append(summarize(key, FileFactors(content.method, content.layout, content.arrays, content.scale)))
    for name, array in parameters.items():
        norm = float(np.linalg.norm(array.astype(np.float64)))
        updates.append(UpdateSummary(f"{key}.{name}", Full(), None, array.shape, array.size, array.nbytes, norm))
    return updates
