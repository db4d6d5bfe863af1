"""How Orbax stored the arrays of a checkpoint: as zarr 2 or zarr 3, in an OCDBT database or in plain files."""

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorstore as ts

from jlora.io.checkpoint.errors import CheckpointError

ADVICE = "Use an earlier checkpoint."

_DESCRIPTIONS = {"zarr": ".zarray", "zarr3": "zarr.json"}  # by TensorStore's driver, the file that describes an array
_INDEX = "manifest.ocdbt"
_LIMITS = {
    "cache_pool": {"total_bytes_limit": 0},
    "cache_pool#chunks": {"total_bytes_limit": 256 << 20},
    "cache_pool#index": {"total_bytes_limit": 100 << 20},
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """The arrays in a folder.

    Arguments:
        folder: what Orbax wrote.
        driver: TensorStore's driver for its arrays, `zarr` or `zarr3`.
        ocdbt: whether the arrays are in an OCDBT database.
        context: TensorStore's caches.
    """

    folder: Path
    driver: str
    ocdbt: bool
    context: ts.Context

    def open(self, name: str, *, cached: bool = False) -> ts.TensorStore:
        """Opens an array for reading.

        Arguments:
            name: of the array.
            cached: keeps chunks in memory, for reads that are smaller than a chunk.

        Raises:
            CheckpointError: if the array has a description that TensorStore cannot use.
            ValueError: if the array is missing or damaged; TensorStore raises no other class.
        """
        spec = {
            "driver": self.driver,
            "kvstore": _kvstore(self.folder, f"{name}/", self.ocdbt),
            "cache_pool": "cache_pool#chunks" if cached else "cache_pool",
            "fill_missing_data_reads": False,
        }
        try:
            return ts.open(spec, context=self.context, open=True, read=True).result()
        except Exception as error:
            if not self._is_described(name):
                raise
            reason = str(error).splitlines()[0][:300]
            raise CheckpointError(
                f"The array {name!r} in {self.folder} is not in a format that this release reads: {reason}. "
                "Upgrade jlora, orbax-checkpoint and tensorstore, or save the adapter again with the release that "
                "wrote it."
            ) from error

    def _is_described(self, name: str) -> bool:
        """Whether the array has a description that is intact as JSON."""
        try:
            description = _read(self.folder, f"{name}/{_DESCRIPTIONS[self.driver]}", self.ocdbt, self.context)
            return description is not None and isinstance(json.loads(description), dict)
        except ValueError:  # of TensorStore and of JSON
            return False


def detect(folder: Path, names: Iterable[str]) -> Storage:
    """Finds out how the arrays in a folder are stored.

    Arguments:
        folder: what Orbax wrote.
        names: of the arrays that are expected there.

    Raises:
        CheckpointError: if the arrays are missing, or in a format that is not known.
        ValueError: if the index of an OCDBT database is damaged.
    """
    context = ts.Context(_LIMITS)
    ocdbt = (folder / _INDEX).exists()
    for name, (driver, file) in itertools.product(names, _DESCRIPTIONS.items()):
        if _read(folder, f"{name}/{file}", ocdbt, context) is not None:
            return Storage(folder, driver, ocdbt, context)
    files = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    if ocdbt or not files or _declares_ocdbt(folder):
        raise CheckpointError(f"The arrays in {folder} are missing: it has no description of any. {ADVICE}")
    raise CheckpointError(
        f"The arrays in {folder} are not in a format that this release reads: expected zarr 2 or zarr 3, with or "
        f"without OCDBT, found the files {', '.join(files[:5])}. Upgrade jlora, or save the adapter again with the "
        "library that wrote it."
    )


def _declares_ocdbt(folder: Path) -> bool:
    """Whether Orbax notes that it wrote an OCDBT database, whose index is then missing."""
    try:
        return json.loads((folder / "_METADATA").read_text(encoding="utf-8"))["use_ocdbt"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _kvstore(folder: Path, path: str, ocdbt: bool) -> dict[str, Any]:
    if not ocdbt:
        return {"driver": "file", "path": f"{folder}/{path}"}
    base = {"driver": "file", "path": f"{folder}/"}
    return {"driver": "ocdbt", "base": base, "path": path, "cache_pool": "cache_pool#index"}


def _read(folder: Path, key: str, ocdbt: bool, context: ts.Context) -> bytes | None:
    """Returns the value of a key, None if there is no such key."""
    store = ts.KvStore.open(_kvstore(folder, "", ocdbt), context=context).result()
    result = store.read(key).result()
    return result.value if result.state == "value" else None
