"""Adapters in the files of Hugging Face PEFT: the public names of `jlora.io.peft`."""

from jlora.io.peft import Module as Module
from jlora.io.peft import Names as Names
from jlora.io.peft import load as load
from jlora.io.peft import save as save

__all__ = ["Module", "Names", "load", "save"]
__docformat__ = "google"
