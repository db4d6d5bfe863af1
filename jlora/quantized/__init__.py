"""Quantised weights: the formats of jlora (NF4, GGUF; those of qwix work too), and what chooses and fits them."""

from jlora.quantized.gguf import GGUF as GGUF
from jlora.quantized.nf4 import NF4 as NF4

__all__ = ["GGUF", "NF4"]
__docformat__ = "google"
