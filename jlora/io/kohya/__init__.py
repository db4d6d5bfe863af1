"""Adapters in the files of kohya, LyCORIS and diffusers."""

from jlora.io.kohya.api import Module as Module
from jlora.io.kohya.api import Names as Names
from jlora.io.kohya.api import load as load
from jlora.io.kohya.api import save as save

__all__ = ["Module", "Names", "load", "save"]
__docformat__ = "google"
