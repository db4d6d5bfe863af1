"""Many adapters of one base: stacked in a bank, trained together, served in one batch, swapped and combined.

    bank = jlora.bank.stack({"films": films, "tweets": tweets})
    apply = jlora.bank.apply(model.apply)                        # g(params, bank, ids, tokens)
    logits = apply(params, bank, bank.ids(["films", None]), tokens)

`bank` has the pytree itself, `form` the common form of members, `rows` one batch for many adapters, `mixtures` one
batch for mixtures of them, `pool` the slots of a server, `training` the optimiser of all members, `checkpoint` the
folder of a bank. `combine` and `extract` compute adapters of adapters and of checkpoints.
"""

import importlib
import typing

from jlora.bank.bank import Bank as Bank
from jlora.bank.bank import shardings as shardings
from jlora.bank.bank import stack as stack
from jlora.bank.bank import unstack as unstack
from jlora.bank.bank import vmap as vmap
from jlora.bank.combine import combine as combine
from jlora.bank.extract import extract as extract
from jlora.bank.mixtures import mix as mix
from jlora.bank.mixtures import mixture as mixture
from jlora.bank.pool import Pool as Pool
from jlora.bank.rows import apply as apply
from jlora.bank.rows import select as select

if typing.TYPE_CHECKING:
    from jlora.bank.checkpoint import load as load
    from jlora.bank.checkpoint import load_member as load_member
    from jlora.bank.checkpoint import names as names
    from jlora.bank.checkpoint import save as save
    from jlora.bank.training import BankState as BankState
    from jlora.bank.training import optimiser as optimiser
    from jlora.bank.training import restart as restart
    from jlora.bank.training import retire as retire

# Orbax and optax take as long to import as JAX itself.
_LAZY = {
    "load": "checkpoint",
    "load_member": "checkpoint",
    "names": "checkpoint",
    "save": "checkpoint",
    "BankState": "training",
    "optimiser": "training",
    "restart": "training",
    "retire": "training",
}

_NAMES = ("Bank", "Pool", "apply", "combine", "extract", "mix", "mixture", "select", "shardings", "stack", "unstack")

__all__ = sorted([*_LAZY, *_NAMES, "vmap"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> typing.Any:
    if name in _LAZY:
        module = importlib.import_module(f"jlora.bank.{_LAZY[name]}")
        value = globals()[name] = getattr(module, name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
