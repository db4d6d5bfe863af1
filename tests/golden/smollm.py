"""Makes `smollm.json`: what transformers, which reads the GGUF file by itself, tokenises and goes on with greedily.

pip install torch==2.13.0 transformers gguf
python tests/golden/smollm.py "$(python examples/assets.py | sed -n 's/^language model *//p')"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportMissingImports]

QUESTIONS = [
    "What is the capital of France?",
    "Write a sentence about rain.",
    "How many days are there in 52 weeks?",
]
TEXT = "The quiet, unhurried Café scenes — 24 of them! —\n  aren't\tthe film's best: 10,000 to 1... 映画 🎬"
COUNT = 24


@torch.no_grad()
def main(path: Path) -> None:
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    conversations = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt").input_ids
        logits = model(ids).logits[0, -1]
        reply = ids
        for _ in range(COUNT):  # `generate` would stop at the end of the reply; here all replies have one length
            likeliest = model(reply).logits[:, -1:].argmax(dim=-1)
            reply = torch.cat([reply, likeliest], dim=1)
        conversations.append(
            {
                "question": question,
                "ids": ids[0].tolist(),
                "reply": reply[0, ids.shape[1] :].tolist(),
                "logits": [round(value, 5) for value in logits[::3001].tolist()],
            }
        )
    golden = {"text": TEXT, "text_ids": tokenizer(TEXT).input_ids, "conversations": conversations}
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
