"""Adapters in the files of Hugging Face PEFT."""

from jlora.io.peft import names as names
from jlora.io.peft.api import Module as Module
from jlora.io.peft.api import Names as Names
from jlora.io.peft.api import load as load
from jlora.io.peft.api import save as save
from jlora.io.peft.infer.api import infer_names as infer_names
from jlora.io.peft.infer.result import InferredNames as InferredNames

__all__ = ["InferredNames", "Module", "Names", "infer_names", "load", "names", "save"]
__docformat__ = "google"
