"""The methods, one a file."""

from jlora.methods.full import Full as Full
from jlora.methods.lora import LoRA as LoRA

METHODS = {method.__name__: method for method in (Full, LoRA)}
