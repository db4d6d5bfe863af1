"""LoRA adapters in GGUF files, as llama.cpp reads them."""

from jlora.io.gguf.api import Module as Module
from jlora.io.gguf.api import Names as Names
from jlora.io.gguf.api import load as load
from jlora.io.gguf.api import save as save

__all__ = ["Module", "Names", "load", "save"]
__docformat__ = "google"
