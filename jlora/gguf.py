"""LoRA adapters in GGUF files: the public names of `jlora.io.gguf`."""

from jlora.io.gguf import Module as Module
from jlora.io.gguf import Names as Names
from jlora.io.gguf import load as load
from jlora.io.gguf import save as save

__all__ = ["Module", "Names", "load", "save"]
__docformat__ = "google"
