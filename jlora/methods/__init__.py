"""The methods, one a file."""

from jlora.methods import _interchange
from jlora.methods.adalora import AdaLoRA
from jlora.methods.adamss import AdaMSS
from jlora.methods.additive import Additive
from jlora.methods.bd_lora import BDLoRA
from jlora.methods.boft import BOFT
from jlora.methods.c3a import C3A
from jlora.methods.conv_lora import ConvLoRA
from jlora.methods.deft import DEFT
from jlora.methods.delora import DeLoRA
from jlora.methods.dora import DoRA
from jlora.methods.fourierft import FourierFT
from jlora.methods.frod import FRoD
from jlora.methods.full import Full
from jlora.methods.glora import GLoRA
from jlora.methods.gralora import GraLoRA
from jlora.methods.grouped_lora import GroupedLoRA
from jlora.methods.hadamard import Hadamard
from jlora.methods.hira import HiRA
from jlora.methods.hra import HRA
from jlora.methods.ia3 import IA3
from jlora.methods.kasa import KaSA
from jlora.methods.locon import LoCon
from jlora.methods.loha import LoHa
from jlora.methods.lokr import LoKr
from jlora.methods.lora import LoRA
from jlora.methods.lora_xs import LoRAXS
from jlora.methods.miss import MiSS
from jlora.methods.monteclora import MonteCLoRA
from jlora.methods.oft import OFT
from jlora.methods.osf import OSF
from jlora.methods.para import PaRa
from jlora.methods.peanut import PEANuT
from jlora.methods.psoft import PSOFT
from jlora.methods.pvera import PVeRA
from jlora.methods.qalora import QALoRA
from jlora.methods.randlora import RandLoRA
from jlora.methods.road import RoAd
from jlora.methods.rows import Rows
from jlora.methods.shared_lora import SharedLoRA
from jlora.methods.shira import SHiRA
from jlora.methods.super_tuning import SuperTuning
from jlora.methods.tinylora import TinyLoRA
from jlora.methods.unilora import UniLoRA
from jlora.methods.vblora import VBLoRA
from jlora.methods.vera import VeRA
from jlora.methods.waveft import WaveFT

__all__ = [
    "BOFT",
    "C3A",
    "DEFT",
    "HRA",
    "IA3",
    "OFT",
    "OSF",
    "PSOFT",
    "AdaLoRA",
    "AdaMSS",
    "Additive",
    "BDLoRA",
    "ConvLoRA",
    "DeLoRA",
    "DoRA",
    "FRoD",
    "FourierFT",
    "Full",
    "GLoRA",
    "GraLoRA",
    "GroupedLoRA",
    "Hadamard",
    "HiRA",
    "KaSA",
    "LoCon",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAXS",
    "MiSS",
    "MonteCLoRA",
    "PEANuT",
    "PVeRA",
    "PaRa",
    "QALoRA",
    "RandLoRA",
    "RoAd",
    "Rows",
    "SHiRA",
    "SharedLoRA",
    "SuperTuning",
    "TinyLoRA",
    "UniLoRA",
    "VBLoRA",
    "VeRA",
    "WaveFT",
]

_interchange.register()
