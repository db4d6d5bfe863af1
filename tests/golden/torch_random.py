"""Records `torch_random.npz`: the numbers that torch draws for the calls in `support/torch_draws.py`.

pip install ".[references]"
PYTHONPATH=. python -m tests.golden.torch_random
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from tests.support.torch_draws import CALLS, SEEDS


def draw(generator: Any, call: str, *args: Any) -> Any:
    """One call in torch."""
    match call, args:
        case "uniform", (shape, low, high):
            return torch.empty(shape).uniform_(low, high, generator=generator)
        case "kaiming_uniform", (shape,):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(math.prod(shape[1:])))
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        case "normal", (shape, mean, std):
            return torch.normal(mean, std, shape, generator=generator)
        case "integers", (low, high, shape):
            return torch.randint(low, high, shape, generator=generator)
        case "permutation", (n, count):
            return torch.randperm(n, generator=generator)[:count]
    raise ValueError(f"There is no call {call}.")


def records() -> dict[str, np.ndarray]:
    out = {}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        for number, call in enumerate(CALLS):
            out[f"{seed}/{number}"] = draw(generator, *call).numpy()
    return out


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **records())
