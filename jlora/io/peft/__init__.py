"""Adapters in the files of Hugging Face PEFT."""

from jlora.io.peft.api import Module as Module
from jlora.io.peft.api import Names as Names
from jlora.io.peft.api import load as load
from jlora.io.peft.api import save as save

__all__ = ["Module", "Names", "load", "save"]
__docformat__ = "google"
