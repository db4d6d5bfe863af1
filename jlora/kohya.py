"""Adapters in the files of kohya, LyCORIS and diffusers: the public names of `jlora.io.kohya`."""

from jlora.io.kohya import Module as Module
from jlora.io.kohya import Names as Names
from jlora.io.kohya import load as load
from jlora.io.kohya import save as save

__all__ = ["Module", "Names", "load", "save"]
__docformat__ = "google"
