"""Makes smollm2_reference.json: what SmolLM2 computes in torch and float32 (needs torch).

    python tests/vectors/make_smollm2_reference.py

Three questions and a story's beginning with their ids, the ten largest logits after the prompt, and up to 64 greedy tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from converters.gguf_import import GGUFCheckpoint
from jaxft.fetch import SMOLLM2, fetch

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Tom has 3 apples and buys 5 more. How many apples does he have?",
)
STORY = "Once upon a time, there was a little girl who"
N_TOKENS = 64


def main() -> None:
    path = fetch(SMOLLM2)
    tokenizer = GGUFCheckpoint(path).tokenizer()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    torch.set_grad_enabled(False)
    rows = []
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    for prompt in [*prompts, STORY]:
        ids = tokenizer(prompt)["input_ids"]
        logits = model(torch.tensor([ids])).logits[0, -1]
        top = torch.topk(logits, 10)
        output = model.generate(torch.tensor([ids]), max_new_tokens=N_TOKENS, do_sample=False)[0, len(ids) :]
        rows.append(
            {
                "prompt": prompt,
                "input_ids": ids,
                "output_ids": output.tolist(),
                "top10": list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
            }
        )
    Path(__file__).with_name("smollm2_reference.json").write_text(
        "[\n " + ",\n ".join(json.dumps(row) for row in rows) + "\n]\n"
    )


if __name__ == "__main__":
    main()
