"""Where the bytes of a checkpoint's arrays lie: the index that Orbax keeps of them, an OCDBT database."""

import functools
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import tensorstore as ts


class Span(NamedTuple):
    """Bytes of a file."""

    file: Path
    start: int
    size: int


def read(folder: Path) -> dict[str, bytes | Span]:
    """Every key with its value or, where it is large, with where that lies.

    Raises:
        ValueError: where there is no index, or it is damaged; TensorStore checks a sum of each of its parts.
    """
    base = ts.KvStore.open({"driver": "file", "path": f"{folder}/"}).result()
    newest = ts.ocdbt.dump(base).result()["versions"][-1]
    found: dict[str, bytes | Span] = {}
    if "location" in newest["root"]:
        _collect(folder, base, newest["root"]["location"], newest["root_height"], b"", found)
    return found


def _collect(
    folder: Path, base: Any, location: str, height: int, prefix: bytes, found: dict[str, bytes | Span]
) -> None:
    """Adds what is below a node of the tree, whose keys all begin with `prefix`."""
    node = ts.ocdbt.dump(base, location).result()
    if node["height"] != height:
        raise ValueError(f"the index has a node of height {node['height']} in place of one of {height}")
    for entry in node["entries"]:
        if height:
            below = prefix + entry["subtree_common_prefix"]
            _collect(folder, base, entry["location"], height - 1, below, found)
        else:
            key = (prefix + entry["key"]).decode(errors="replace")
            found[key] = _span(folder, entry["indirect_value"]) if "indirect_value" in entry else entry["inline_value"]


def _span(folder: Path, location: str) -> Span:
    """The bytes that `value:<folder>:<file>:<start>:<size>` names; the folder and its colon may be missing."""
    named, start, size = location.removeprefix("value:").rsplit(":", 2)
    return Span(_file(folder, named), int(start), int(size))


@functools.lru_cache
def _file(folder: Path, named: str) -> Path:
    """A file by its name in the index, which many arrays share."""
    return folder / "".join(unquote(part) for part in named.split(":"))
