"""Adapters in the files of Hugging Face PEFT: the public names of `jlora.io.peft`."""

from jlora.io.peft import InferredNames as InferredNames
from jlora.io.peft import Module as Module
from jlora.io.peft import Names as Names
from jlora.io.peft import infer_names as infer_names
from jlora.io.peft import load as load
from jlora.io.peft import names as names
from jlora.io.peft import save as save

__all__ = ["InferredNames", "Module", "Names", "infer_names", "load", "names", "save"]
__docformat__ = "google"
