"""Low-rank adaptation (LoRA) of any JAX program, as a function transformation.

    sites   = jlora.trace(model.apply, params, tokens)       # what can be adapted, and what it costs
    adapter = jlora.init(key, sites, jlora.LoRA(rank=8))     # a small trainable pytree
    apply   = jlora.adapt(model.apply)                       # f(params, *args) -> g(params, adapter, *args)
    merged  = jlora.merge(params, adapter)                   # plain parameters for inference

The law: `jlora.adapt(f)(params, adapter, *args) == f(jlora.merge(params, adapter), *args)`.
"""

import importlib
import types
import typing

from jlora import methods
from jlora._adapter.adapt import DenseError as DenseError
from jlora._adapter.adapt import DenseWarning as DenseWarning
from jlora._adapter.adapt import adapt as adapt
from jlora._adapter.init import init as init
from jlora._adapter.merge import merge as merge
from jlora._adapter.merge import scale as scale
from jlora._adapter.merge import unmerge as unmerge
from jlora._interpreter.site import Site as Site
from jlora._trace.sites import Sites as Sites
from jlora._trace.trace import trace as trace
from jlora._tree.leaves import Quantized as Quantized
from jlora._tree.leaves import dequantize as dequantize
from jlora.methods._base import Adapter as Adapter
from jlora.methods._base import Method as Method
from jlora.methods._base import Update as Update
from jlora.methods._sharing import untie as untie

if typing.TYPE_CHECKING:
    from jlora import bank as bank
    from jlora import extend as extend
    from jlora import gguf as gguf
    from jlora import hf as hf
    from jlora import io as io
    from jlora import kohya as kohya
    from jlora import loralib as loralib
    from jlora import nnx as nnx
    from jlora import peft as peft
    from jlora import quantized as quantized
    from jlora._adapter.biases import with_biases as with_biases
    from jlora._adapter.dropout import with_dropout as with_dropout
    from jlora._adapter.dylora import truncate as truncate
    from jlora._adapter.dylora import with_rank as with_rank
    from jlora._adapter.relora import restart as restart
    from jlora._adapter.sharding import shardings as shardings
    from jlora._adapter.starts.calibrate import calibrate as calibrate
    from jlora._adapter.starts.corda import corda as corda
    from jlora._adapter.starts.eva import eva as eva
    from jlora._adapter.starts.inputs import Inputs as Inputs
    from jlora._adapter.starts.lora_ga import lora_ga as lora_ga
    from jlora._adapter.summary import Summary as Summary
    from jlora._adapter.summary import summary as summary
    from jlora._adapter.to_lora import to_lora as to_lora
    from jlora._plan.plan import Plan as Plan
    from jlora._plan.plan import plan as plan
    from jlora._plan.topology import topology as topology
    from jlora._trace.explain import Explanation as Explanation
    from jlora._trace.explain import explain as explain
    from jlora.bank.combine import combine as combine
    from jlora.bank.extract import extract as extract
    from jlora.io.checkpoint.errors import CheckpointError as CheckpointError
    from jlora.io.checkpoint.orbax import checkpoint_args as checkpoint_args
    from jlora.io.checkpoint.orbax import load as load
    from jlora.io.checkpoint.orbax import load_state as load_state
    from jlora.io.checkpoint.orbax import save as save
    from jlora.io.info import info as info
    from jlora.methods import *  # noqa: F403  each method is exported there, once
    from jlora.optim.adalora import orthogonality as orthogonality
    from jlora.optim.adalora import rank_budget as rank_budget
    from jlora.optim.gradients import lora_fa_gradient as lora_fa_gradient
    from jlora.optim.gradients import lora_plus as lora_plus
    from jlora.optim.gradients import riemannian as riemannian
    from jlora.optim.kasa import kasa_penalty as kasa_penalty
    from jlora.optim.labels import labels as labels
    from jlora.optim.labels import mask as mask
    from jlora.quantized.loftq import loftq as loftq
    from jlora.quantized.quantize import quantize as quantize

__version__ = "0.1.0"
__docformat__ = "google"

# `import jlora` loads what `trace`, `init`, `adapt` and `merge` need. The module of any other name is imported when the
# name is first used: Orbax, TensorStore, optax and safetensors take as long to import as JAX itself.
_LAZY_MODULES = {"bank", "extend", "gguf", "hf", "io", "kohya", "loralib", "nnx", "peft", "quantized"}
_LAZY = {
    "with_biases": "jlora._adapter.biases",
    "with_dropout": "jlora._adapter.dropout",
    "truncate": "jlora._adapter.dylora",
    "with_rank": "jlora._adapter.dylora",
    "restart": "jlora._adapter.relora",
    "shardings": "jlora._adapter.sharding",
    "calibrate": "jlora._adapter.starts.calibrate",
    "corda": "jlora._adapter.starts.corda",
    "eva": "jlora._adapter.starts.eva",
    "Inputs": "jlora._adapter.starts.inputs",
    "lora_ga": "jlora._adapter.starts.lora_ga",
    "Summary": "jlora._adapter.summary",
    "summary": "jlora._adapter.summary",
    "to_lora": "jlora._adapter.to_lora",
    "Plan": "jlora._plan.plan",
    "plan": "jlora._plan.plan",
    "topology": "jlora._plan.topology",
    "Explanation": "jlora._trace.explain",
    "explain": "jlora._trace.explain",
    "combine": "jlora.bank.combine",
    "extract": "jlora.bank.extract",
    "CheckpointError": "jlora.io.checkpoint.errors",
    "checkpoint_args": "jlora.io.checkpoint.orbax",
    "load": "jlora.io.checkpoint.orbax",
    "load_state": "jlora.io.checkpoint.orbax",
    "save": "jlora.io.checkpoint.orbax",
    "info": "jlora.io.info",
    "orthogonality": "jlora.optim.adalora",
    "rank_budget": "jlora.optim.adalora",
    "lora_fa_gradient": "jlora.optim.gradients",
    "lora_plus": "jlora.optim.gradients",
    "riemannian": "jlora.optim.gradients",
    "kasa_penalty": "jlora.optim.kasa",
    "labels": "jlora.optim.labels",
    "mask": "jlora.optim.labels",
    "loftq": "jlora.quantized.loftq",
    "quantize": "jlora.quantized.quantize",
    **methods._MODULES,
}

# Every name that is imported above, with the lazy ones.
__all__ = sorted(  # pyright: ignore[reportUnsupportedDunderAll]
    {*_LAZY, *_LAZY_MODULES}
    | {name for name, value in globals().items() if name[0] != "_" and not isinstance(value, types.ModuleType)}
)


def __getattr__(name: str) -> typing.Any:
    if name in _LAZY_MODULES:
        value = globals()[name] = importlib.import_module(f"{__name__}.{name}")
        return value
    if name in _LAZY:
        value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
