"""Rotations and projections of PEFT: their files, and what they compute.

python tests/golden/maps.py      # writes tests/golden/maps.npz; needs torch and PEFT 0.21.2
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

SHAPE = (8, 12)  # in and out
OPTIONS: dict[str, tuple[str, dict]] = {
    "oft": ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}),
    "oft_neumann": ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 5}),
    "oft_three_terms": ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    "oft_blocks": ("OFTConfig", {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False}),
    "oft_shared": ("OFTConfig", {"oft_block_size": 4, "block_share": True, "use_cayley_neumann": False}),
    "oft_constrained": ("OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.5, "use_cayley_neumann": False}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 1}),
    "hra": ("HRAConfig", {"r": 4}),
    "hra_gram_schmidt": ("HRAConfig", {"r": 4, "apply_GS": True}),
    "road_1": ("RoadConfig", {"variant": "road_1", "group_size": 6}),
    "road_2": ("RoadConfig", {"variant": "road_2", "group_size": 4}),
    "road_4": ("RoadConfig", {"variant": "road_4", "group_size": 6}),
    "deft": ("DeftConfig", {"r": 3, "alpha": 6}),
    "deft_qr": ("DeftConfig", {"r": 3, "decomposition_method": "qr"}),
    "para": ("DeftConfig", {"r": 3, "para": True}),
    "para_qr": ("DeftConfig", {"r": 3, "para": True, "decomposition_method": "qr"}),
}


def records() -> dict[str, np.ndarray]:
    """Base, input, and of every case the configuration, the tensors in the file, and the output."""
    import peft  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    from safetensors.numpy import load_file

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(*SHAPE)).double()
    x = torch.randn(5, SHAPE[0], dtype=torch.float64)
    out = {"weight": base[0].weight, "bias": base[0].bias, "x": x}
    for name, (config, options) in OPTIONS.items():
        layer = torch.nn.Sequential(torch.nn.Linear(*SHAPE)).double()
        layer.load_state_dict(base.state_dict())
        model = peft.get_peft_model(layer, getattr(peft, config)(target_modules=["0"], **options)).double()
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.requires_grad:
                    tensor.add_(0.3 * torch.randn_like(tensor))
        model.eval()
        out[f"{name}/y"] = model(x)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            text = (Path(folder) / "adapter_config.json").read_text()
            tensors = load_file(Path(folder) / "adapter_model.safetensors")
        out[f"{name}/config"] = np.array(json.dumps(json.loads(text), sort_keys=True))
        out |= {f"{name}/tensor/{key}": tensor for key, tensor in tensors.items()}
    return {
        key: array.detach().numpy().astype(np.float32) if isinstance(array, torch.Tensor) else array
        for key, array in out.items()
    }


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **records())
