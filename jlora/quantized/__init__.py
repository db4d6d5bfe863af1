"""Forms of quantised weights, beside those of qwix."""

from jlora.quantized.gguf import GGUF as GGUF
from jlora.quantized.nf4 import NF4 as NF4
