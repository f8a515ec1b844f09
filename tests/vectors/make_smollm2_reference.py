"""Makes smollm2_reference.json: what SmolLM2 computes in torch and float32 (needs torch).

    python tests/vectors/make_smollm2_reference.py

Three questions and a story's beginning: their ids, the ten largest logits after them, up to 64 greedy tokens. And the
mean negative log-likelihood of a paragraph, also through bitsandbytes' NF4.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers import AutoModelForCausalLM

from converters.gguf_import import GGUFCheckpoint
from jaxft.fetch import SMOLLM2, fetch

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Tom has 3 apples and buys 5 more. How many apples does he have?",
)
STORY = "Once upon a time, there was a little girl who"
PARAGRAPH = (
    "The Great Barrier Reef is the world's largest coral reef system, composed of over 2,900 individual r"
    "eefs and 900 islands stretching for over 2,300 kilometres. The reef is located in the Coral Sea, off"
    " the coast of Queensland, Australia. It supports a wide diversity of life and was selected as a Worl"
    "d Heritage Site in 1981. Climate change, pollution and tourism all threaten the reef, and scientists"
    " have recorded several mass bleaching events since 1998."
)
N_TOKENS = 64


def mean_nll(model: torch.nn.Module, ids: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item()


def through_nf4(model: torch.nn.Module) -> None:
    """Every linear of the layers as bitsandbytes' double-quantized NF4 decodes it."""
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            packed, state = quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            module.weight.data.copy_(dequantize_4bit(packed, state))


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
    ids = torch.tensor([tokenizer(PARAGRAPH)["input_ids"]])
    paragraph = {"input_ids": ids[0].tolist(), "mean_nll": mean_nll(model, ids)}
    through_nf4(model)
    paragraph["nf4_mean_nll"] = mean_nll(model, ids)
    reference = {"generations": rows, "paragraph": paragraph}
    Path(__file__).with_name("smollm2_reference.json").write_text(json.dumps(reference, indent=1) + "\n")


if __name__ == "__main__":
    main()
