"""PEFT with torch on the CPU, eager: the same numbers in torch's layers, on as many threads as JAX has cores."""

import importlib
from typing import Any

import numpy as np

from benchmarks import _measure, peft_costs
from benchmarks._peers import tries
from benchmarks._peers.step import Arrays, Problem, Step, nonzero

torch, peft = peft_costs.torch, peft_costs.peft
FlopCounter: Any = importlib.import_module("torch.utils.flop_counter").FlopCounterMode


def state(params: Arrays) -> dict[str, Any]:
    """The parameters by torch's names and with its axes: kernels are `(out, in)`."""
    out = {}
    for path, w in params.items():
        kernel = w.ndim == 2 and path not in ("embed", "position")
        name = path if path == "position" else f"{path.replace('_', '.')}.weight"
        out[name] = torch.from_numpy(w.T.copy() if kernel else w)
    return out


def step(given: Problem) -> Step:
    """The step, with the FLOPs that torch counts: those of products alone."""
    torch.set_num_threads(_measure.environment()["cores"])
    model = peft_costs.Transformer(given.sizes)
    model.load_state_dict(state(given.params))
    kernels = sorted({path.rsplit("_", 1)[-1] for path in given.kind.weights})
    config = peft.LoraConfig(r=tries.RANK, lora_alpha=tries.ALPHA, target_modules=kernels)
    adapted = peft.get_peft_model(model, config)
    factors = {name: w for name, w in adapted.named_parameters() if w.requires_grad}
    for name, value in nonzero({name: np.empty(w.shape) for name, w in factors.items()}).items():
        factors[name].data = torch.from_numpy(value)
    start = {name: w.detach().clone() for name, w in factors.items()}
    run, trained = peft_costs.training(adapted, torch.from_numpy(given.tokens).long())
    counter = FlopCounter(display=False)
    with counter:
        loss = run()
    row = {"flops": counter.get_total_flops(), "temp_bytes": None, "compile_seconds": None, "lower_seconds": None}

    def change() -> Arrays:
        out = {}
        for path in given.kind.weights:
            site = f"base_model.model.{path.replace('_', '.')}"
            a, b = (start[f"{site}.lora_{factor}.default.weight"].numpy() for factor in "AB")
            out[path] = np.float32(tries.ALPHA / tries.RANK) * (b @ a).T
        return out

    return Step(run, row | {"trained": trained, "loss": loss}, change)
