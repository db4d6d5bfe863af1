"""Adapters of the original library, loralib: the public name of `jlora.io.loralib`."""

from jlora.io.loralib import load as load

__all__ = ["load"]
__docformat__ = "google"
