"""The methods, one a file. A file is imported when the name of its method is first used."""

import importlib
import typing

from jlora.methods import _interchange, _registry

if typing.TYPE_CHECKING:
    from jlora.methods.adalora import AdaLoRA as AdaLoRA
    from jlora.methods.adamss import AdaMSS as AdaMSS
    from jlora.methods.additive import Additive as Additive
    from jlora.methods.bd_lora import BDLoRA as BDLoRA
    from jlora.methods.boft import BOFT as BOFT
    from jlora.methods.c3a import C3A as C3A
    from jlora.methods.conv_lora import ConvLoRA as ConvLoRA
    from jlora.methods.deft import DEFT as DEFT
    from jlora.methods.delora import DeLoRA as DeLoRA
    from jlora.methods.dora import DoRA as DoRA
    from jlora.methods.fourierft import FourierFT as FourierFT
    from jlora.methods.frod import FRoD as FRoD
    from jlora.methods.full import Full as Full
    from jlora.methods.glora import GLoRA as GLoRA
    from jlora.methods.gralora import GraLoRA as GraLoRA
    from jlora.methods.grouped_lora import GroupedLoRA as GroupedLoRA
    from jlora.methods.hadamard import Hadamard as Hadamard
    from jlora.methods.hira import HiRA as HiRA
    from jlora.methods.hra import HRA as HRA
    from jlora.methods.ia3 import IA3 as IA3
    from jlora.methods.kasa import KaSA as KaSA
    from jlora.methods.locon import LoCon as LoCon
    from jlora.methods.loha import LoHa as LoHa
    from jlora.methods.lokr import LoKr as LoKr
    from jlora.methods.lora import LoRA as LoRA
    from jlora.methods.lora_xs import LoRAXS as LoRAXS
    from jlora.methods.miss import MiSS as MiSS
    from jlora.methods.monteclora import MonteCLoRA as MonteCLoRA
    from jlora.methods.oft import OFT as OFT
    from jlora.methods.osf import OSF as OSF
    from jlora.methods.para import PaRa as PaRa
    from jlora.methods.peanut import PEANuT as PEANuT
    from jlora.methods.psoft import PSOFT as PSOFT
    from jlora.methods.pvera import PVeRA as PVeRA
    from jlora.methods.qalora import QALoRA as QALoRA
    from jlora.methods.randlora import RandLoRA as RandLoRA
    from jlora.methods.road import RoAd as RoAd
    from jlora.methods.rows import Rows as Rows
    from jlora.methods.shared_lora import SharedLoRA as SharedLoRA
    from jlora.methods.shira import SHiRA as SHiRA
    from jlora.methods.super_tuning import SuperTuning as SuperTuning
    from jlora.methods.tinylora import TinyLoRA as TinyLoRA
    from jlora.methods.unilora import UniLoRA as UniLoRA
    from jlora.methods.vblora import VBLoRA as VBLoRA
    from jlora.methods.vera import VeRA as VeRA
    from jlora.methods.waveft import WaveFT as WaveFT

_MODULES = {
    "AdaLoRA": "jlora.methods.adalora",
    "AdaMSS": "jlora.methods.adamss",
    "Additive": "jlora.methods.additive",
    "BDLoRA": "jlora.methods.bd_lora",
    "BOFT": "jlora.methods.boft",
    "C3A": "jlora.methods.c3a",
    "ConvLoRA": "jlora.methods.conv_lora",
    "DEFT": "jlora.methods.deft",
    "DeLoRA": "jlora.methods.delora",
    "DoRA": "jlora.methods.dora",
    "FourierFT": "jlora.methods.fourierft",
    "FRoD": "jlora.methods.frod",
    "Full": "jlora.methods.full",
    "GLoRA": "jlora.methods.glora",
    "GraLoRA": "jlora.methods.gralora",
    "GroupedLoRA": "jlora.methods.grouped_lora",
    "Hadamard": "jlora.methods.hadamard",
    "HiRA": "jlora.methods.hira",
    "HRA": "jlora.methods.hra",
    "IA3": "jlora.methods.ia3",
    "KaSA": "jlora.methods.kasa",
    "LoCon": "jlora.methods.locon",
    "LoHa": "jlora.methods.loha",
    "LoKr": "jlora.methods.lokr",
    "LoRA": "jlora.methods.lora",
    "LoRAXS": "jlora.methods.lora_xs",
    "MiSS": "jlora.methods.miss",
    "MonteCLoRA": "jlora.methods.monteclora",
    "OFT": "jlora.methods.oft",
    "OSF": "jlora.methods.osf",
    "PaRa": "jlora.methods.para",
    "PEANuT": "jlora.methods.peanut",
    "PSOFT": "jlora.methods.psoft",
    "PVeRA": "jlora.methods.pvera",
    "QALoRA": "jlora.methods.qalora",
    "RandLoRA": "jlora.methods.randlora",
    "RoAd": "jlora.methods.road",
    "Rows": "jlora.methods.rows",
    "SharedLoRA": "jlora.methods.shared_lora",
    "SHiRA": "jlora.methods.shira",
    "SuperTuning": "jlora.methods.super_tuning",
    "TinyLoRA": "jlora.methods.tinylora",
    "UniLoRA": "jlora.methods.unilora",
    "VBLoRA": "jlora.methods.vblora",
    "VeRA": "jlora.methods.vera",
    "WaveFT": "jlora.methods.waveft",
}

if not typing.TYPE_CHECKING:  # type checkers read the imports above
    __all__ = sorted(_MODULES)

_registry.declare(_MODULES)
_interchange.register()


def __getattr__(name: str) -> typing.Any:
    if name in _MODULES:
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_MODULES]
