"""The fingerprints of a checkpoint's tensors, computed when they are asked for, one tensor in memory at a time."""

import collections
from collections.abc import Sequence

import numpy as np

from jlora.io.peft.infer.fingerprint import Domain, Fingerprint, axis_sums, fingerprint
from jlora.io.torch.tensor_files import TensorFiles

Key = tuple[int, int]


class TensorTable:
    """Looks tensors up by their fingerprints.

    Arguments:
        files: the checkpoint.
        names: the tensors that parameters may come from.
    """

    def __init__(self, files: TensorFiles, names: Sequence[str]) -> None:
        self.files = files
        self.names = [name for name in names if files.size(name)]
        self.sizes = sorted({files.size(name) for name in self.names})
        self._fingerprints: dict[Domain, dict[str, Fingerprint]] = {}
        self._constants: dict[Domain, dict[tuple[int, float], list[str]]] = {}
        self._by_key: dict[Domain, dict[Key, tuple[str, ...]]] = {}
        self._sums: dict[tuple[Domain, str, tuple[int, ...]], np.ndarray] = {}
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, name: str) -> np.ndarray:
        """A tensor; the last one that was read is kept."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self.files.read(name))
        return self._last[1]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.files.shape(name)

    def fingerprints(self, domain: Domain) -> dict[str, Fingerprint]:
        """The fingerprints of all tensors in a domain."""
        if domain not in self._fingerprints:
            self._fingerprints[domain] = {name: fingerprint(self.read(name), domain) for name in self.names}
            by_key = collections.defaultdict(list)
            for name, mark in self._fingerprints[domain].items():
                by_key[mark.key].append(name)
            self._by_key[domain] = {key: tuple(names) for key, names in by_key.items()}
        return self._fingerprints[domain]

    def constants(self, domain: Domain, size: int, value: float) -> list[str]:
        """The tensors of a size whose elements all have a value."""
        if domain not in self._constants:
            self._constants[domain] = collections.defaultdict(list)
            for name, mark in self.fingerprints(domain).items():
                if mark.constant is not None:
                    self._constants[domain][mark.size, mark.constant].append(name)
        return self._constants[domain].get((size, value), [])

    def lookup(self, domain: Domain, key: Key) -> tuple[str, ...]:
        """The tensors with a fingerprint."""
        self.fingerprints(domain)
        return self._by_key[domain].get(key, ())

    def sums(self, domain: Domain, name: str, axes: tuple[int, ...]) -> np.ndarray:
        """The sums of a tensor's hashes along all axes but some; kept, since they are small."""
        key = (domain, name, axes)
        if key not in self._sums:
            self._sums[key] = axis_sums(self.read(name), domain, [axes])[0]
        return self._sums[key]
