"""What PEFT calls the type of each method: by the name of the method, but for variants of a type."""

from jlora.io.peft.layouts import ADAPTERS
from jlora.methods import BDLoRA, DoRA, KaSA, MonteCLoRA, PaRa, QALoRA
from jlora.methods._base import Method

_VARIANTS: dict[type[Method], str] = {DoRA: "LORA", MonteCLoRA: "LORA", BDLoRA: "LORA", KaSA: "LORA", PaRa: "DEFT"}

# PEFT has QALoRA for layers of GPTQ alone.
PEFT_TYPES = {method: _VARIANTS.get(method, method.__name__.upper()) for method in ADAPTERS if method is not QALoRA}
