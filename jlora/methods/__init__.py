"""The methods, one a file."""

from jlora.methods._base import Method as Method
from jlora.methods.adalora import AdaLoRA as AdaLoRA
from jlora.methods.additive import Additive as Additive
from jlora.methods.boft import BOFT as BOFT
from jlora.methods.conv_lora import ConvLoRA as ConvLoRA
from jlora.methods.delora import DeLoRA as DeLoRA
from jlora.methods.dora import DoRA as DoRA
from jlora.methods.fourierft import FourierFT as FourierFT
from jlora.methods.full import Full as Full
from jlora.methods.grouped_lora import GroupedLoRA as GroupedLoRA
from jlora.methods.hadamard import Hadamard as Hadamard
from jlora.methods.hira import HiRA as HiRA
from jlora.methods.hra import HRA as HRA
from jlora.methods.ia3 import IA3 as IA3
from jlora.methods.locon import LoCon as LoCon
from jlora.methods.loha import LoHa as LoHa
from jlora.methods.lokr import LoKr as LoKr
from jlora.methods.lora import LoRA as LoRA
from jlora.methods.lora_xs import LoRAXS as LoRAXS
from jlora.methods.miss import MiSS as MiSS
from jlora.methods.oft import OFT as OFT
from jlora.methods.randlora import RandLoRA as RandLoRA
from jlora.methods.shira import SHiRA as SHiRA
from jlora.methods.vera import VeRA as VeRA
