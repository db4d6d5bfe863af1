"""Makes `minilm.json`: sentence embeddings of MiniLM-L6 computed with torch operations, straight from the file.

It shares nothing with the Flax model that is tested against it but the files of weights and tokens.

    pip install torch==2.13.0 safetensors tokenizers
    python tests/golden/minilm.py "$(python examples/assets.py | sed -n 's/^encoder *//p')"
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional  # pyright: ignore[reportMissingImports]

SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The stock market fell sharply.",
    "The quiet, unhurried Café scenes — 24 of them! — are the film's best.",
    "No.",
    "A plot so thin that, before the second reel is out, the audience has guessed its ending, counted its holes and "
    "begun, row by row, to look for coats, hats and the nearest way out of the theatre and into the evening rain.",
]
LENGTH = 48
HEADS = 12


@torch.no_grad()
def embed(w: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-12)

    batch, length = ids.shape
    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][:length] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    hidden = (1.0 - mask[:, None, None, :]) * torch.finfo(x.dtype).min
    for i in range(6):
        at = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{name}").view(batch, length, HEADS, -1).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + hidden, dim=-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, length, -1)
        x = norm(x + linear(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        up = functional.gelu(linear(x, f"{at}.intermediate.dense"))
        x = norm(x + linear(up, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return (x * mask[:, :, None]).sum(1) / mask[:, :, None].sum(1)


def main(folder: Path) -> None:
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens.enable_truncation(LENGTH)
    tokens.no_padding()
    weights = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    ids, embeddings = [], []
    for sentence in SENTENCES:  # one at a time: no padding here, so padding is tested there
        row = tokens.encode(sentence).ids
        found = embed(weights, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.double))
        ids.append(row)
        embeddings.append([round(value, 7) for value in found[0].tolist()])
    unit = functional.normalize(torch.tensor(embeddings), dim=-1)
    golden = {
        "made_by": f"tests/golden/minilm.py, torch {torch.__version__.split('+')[0]}, float64",
        "length": LENGTH,
        "sentences": SENTENCES,
        "ids": ids,
        "cosines": {"paraphrase": (unit[0] @ unit[1]).item(), "unrelated": (unit[0] @ unit[2]).item()},
        "embeddings": embeddings,
    }
    path = Path(__file__).with_suffix(".json")
    body = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    path.write_text(f"{{\n{body}\n}}\n")
    print(path, path.stat().st_size, "bytes", golden["cosines"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
