"""One training step of PEFT's methods against PEFT's LoRA of the same rank, on the transformer of `benchmarks.methods`.

    python -m benchmarks.peft_costs                # about six minutes on two cores

It needs torch and PEFT: `pip install -e ".[references]"`. The model, its sizes, the batch and AdamW are those of
`benchmarks.methods`, in torch's own layers. All steps run in turns; every ratio is the median over rounds of the ratios
of one round. The names are those of `benchmarks.methods`.
"""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

from benchmarks import _measure, _transformer

# torch's threads spin 300,000 times before they sleep: on a busy machine they keep the core from one another.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
torch: Any = importlib.import_module("torch")
peft: Any = importlib.import_module("peft")
nn, functional = torch.nn, torch.nn.functional

RANK = 16
KERNELS = list(_transformer.KERNELS)

# Without dropout, at the hyper-parameters of `benchmarks.methods`.
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=RANK, target_modules=KERNELS),
    "LoRA-FA": lambda: peft.LoraConfig(r=RANK, target_modules=KERNELS),
    "DoRA": lambda: peft.LoraConfig(r=RANK, use_dora=True, target_modules=KERNELS),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=KERNELS),
    "LoKr": lambda: peft.LoKrConfig(r=RANK, target_modules=KERNELS),
    "VeRA": lambda: peft.VeraConfig(r=RANK, vera_dropout=0.0, target_modules=KERNELS),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=RANK, target_r=RANK, total_step=10**6, target_modules=KERNELS),
    "MiSS": lambda: peft.MissConfig(r=RANK, target_modules=KERNELS),
    "DeLoRA": lambda: peft.DeloraConfig(r=RANK, target_modules=KERNELS),
    "HRA": lambda: peft.HRAConfig(r=RANK, target_modules=KERNELS),
    "IA3": lambda: peft.IA3Config(target_modules=KERNELS, feedforward_modules=[]),
    "GraLoRA": lambda: peft.GraloraConfig(r=RANK, gralora_k=4, target_modules=KERNELS),
    "HiRA": lambda: peft.HiraConfig(r=RANK, target_modules=KERNELS),
    "OFT": lambda: peft.OFTConfig(oft_block_size=RANK, target_modules=KERNELS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=RANK, boft_n_butterfly_factor=1, target_modules=KERNELS),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=1000, target_modules=KERNELS),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=1000, target_modules=KERNELS),
    "RandLoRA": lambda: peft.RandLoraConfig(r=RANK, randlora_dropout=0.0, target_modules=KERNELS),
    "SHiRA": lambda: peft.ShiraConfig(r=RANK, target_modules=KERNELS),
    "C3A": lambda: peft.C3AConfig(block_size=128, target_modules=KERNELS),
    "RoAd": lambda: peft.RoadConfig(target_modules=KERNELS),
}


class Block(nn.Module):
    """One layer of the decoder."""

    def __init__(self, sizes: _transformer.Sizes) -> None:
        super().__init__()
        width, hidden = sizes.width, sizes.hidden
        self.heads = sizes.heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        linear = functools.partial(nn.Linear, bias=sizes.biases)
        self.wq, self.wk, self.wv, self.wo = (linear(width, width) for _ in range(4))
        self.w1, self.w2 = linear(width, hidden), linear(hidden, width)

    def forward(self, x: Any) -> Any:
        y = self.norm1(x)
        q, k, v = (w(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.wo(mixed)
        return x + self.w2(functional.gelu(self.w1(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """The decoder of `_transformer`."""

    def __init__(self, sizes: _transformer.Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.position = nn.Parameter(0.1 * torch.randn(sizes.length, sizes.width))
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm, self.head = nn.RMSNorm(sizes.width, eps=1e-6), nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def adapted(name: str, sizes: _transformer.Sizes) -> Any:
    """The model with one method."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Transformer(sizes), METHODS[name]())
    if name == "LoRA-FA":
        for parameter in (p for n, p in model.named_parameters() if "lora_A" in n):
            parameter.requires_grad_(False)
    return model


def training(model: Any, tokens: Any) -> tuple[Callable[[], float], int]:
    """A training step of a model's parameters that require gradients, and their number."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)
    following = torch.roll(tokens, -1, 1).flatten()

    def run() -> float:
        optimiser.zero_grad()
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), following)
        loss.backward()
        optimiser.step()
        return loss.item()

    return run, sum(p.numel() for p in trained)


def main() -> None:
    """Reads the options, measures, prints and writes."""
    parser = _measure.parser(__doc__, "peft_costs.json")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--batch", type=int, default=8, help="sequences (default: 8)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", choices=METHODS, help="beside LoRA (default: all)")
    options = parser.parse_args()
    if options.methods and options.out == parser.get_default("out"):
        parser.error("the result file holds all methods: with --methods pass --out with another file.")
    sizes = _transformer.Sizes()
    torch.manual_seed(1)
    torch.set_num_threads(_measure.environment()["cores"])
    tokens = torch.randint(sizes.vocabulary, (options.batch, sizes.length))
    names = [name for name in METHODS if name == "LoRA" or name in (options.methods or METHODS)]
    steps = {name: training(adapted(name, sizes), tokens) for name in names}
    seconds = _measure.interleave({name: run for name, (run, _) in steps.items()}, options.rounds)
    rows = {
        name: {
            "parameters": steps[name][1],
            "seconds": _measure.median(seconds[name]),
            "of_lora": _measure.ratio(seconds, name, "LoRA"),
        }
        for name in names
    }
    environment = _measure.environment() | {
        **{name: module.__version__ for name, module in (("peft", peft), ("torch", torch))},
        "threads": torch.get_num_threads(),
    }
    recorded = {name: value for name, value in vars(options).items() if name != "out"}
    _measure.save(options.out, {"environment": environment, "options": recorded, "methods": rows})
    body = [[n, f"{r['parameters']:,}", f"{r['seconds']:.3f}", f"{r['of_lora']:.3f}"] for n, r in rows.items()]
    print(_measure.table(["method", "parameters", "seconds", "of LoRA"], body))


if __name__ == "__main__":
    main()
