"""The steps of the usual Unsloth notebook, in a kernel, with their imports changed and nothing else (slow)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = {
    "model": """
from unsloth import FastLanguageModel
import torch
max_seq_length = 128 # any length
dtype = None # None for auto detection
load_in_4bit = True

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "MODEL",
    max_seq_length = max_seq_length,
    dtype = dtype,
    load_in_4bit = load_in_4bit,
    # token = "hf_...",
)
""",
    "adapter": """
model = FastLanguageModel.get_peft_model(
    model,
    r = 16,
    target_modules = ["q_proj", "k_proj", "v_proj", "o_proj",
                      "gate_proj", "up_proj", "down_proj",],
    lora_alpha = 16,
    lora_dropout = 0,
    bias = "none",
    use_gradient_checkpointing = "unsloth",
    random_state = 3407,
    use_rslora = False,
    loftq_config = None,
)
""",
    "template": """
from unsloth.chat_templates import get_chat_template

tokenizer = get_chat_template(
    tokenizer,
    chat_template = "chatml",
)

def formatting_prompts_func(examples):
    convos = examples["conversations"]
    texts = [tokenizer.apply_chat_template(convo, tokenize = False, add_generation_prompt = False) for convo in convos]
    return { "text" : texts, }

from datasets import Dataset
dataset = Dataset.from_list([
    {"conversations": [
        {"from": "human", "value": f"What is {i} plus 3?"}, {"from": "gpt", "value": f"The answer is {i + 3}."},
        {"from": "human", "value": "And one more?"}, {"from": "gpt", "value": f"{i + 4}."},
    ]} for i in range(30)
])
""",
    "standard": """
from unsloth.chat_templates import standardize_sharegpt
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(formatting_prompts_func, batched = True,)
print(dataset[5]["conversations"])
print(dataset[5]["text"])
""",
    "trainer": """
from trl import SFTConfig, SFTTrainer
from transformers import DataCollatorForSeq2Seq
from unsloth import is_bfloat16_supported

trainer = SFTTrainer(
    model = model,
    tokenizer = tokenizer,
    train_dataset = dataset,
    dataset_text_field = "text",
    max_seq_length = max_seq_length,
    data_collator = DataCollatorForSeq2Seq(tokenizer = tokenizer),
    dataset_num_proc = 2,
    packing = False,
    args = SFTConfig(
        per_device_train_batch_size = 2,
        gradient_accumulation_steps = 4,
        warmup_steps = 1,
        max_steps = 6,
        learning_rate = 2e-3,
        fp16 = not is_bfloat16_supported(),
        bf16 = is_bfloat16_supported(),
        logging_steps = 1,
        optim = "adamw_8bit",
        weight_decay = 0.01,
        lr_scheduler_type = "linear",
        seed = 3407,
        output_dir = "outputs",
        report_to = "none",
    ),
)
""",
    "responses": """
from unsloth.chat_templates import train_on_responses_only
trainer = train_on_responses_only(
    trainer,
    instruction_part = "<|im_start|>user\\n",
    response_part = "<|im_start|>assistant\\n",
)
""",
    "whole": """
print(tokenizer.decode(trainer.train_dataset[5]["input_ids"]))
""",
    "masked": """
space = tokenizer(" ", add_special_tokens = False).input_ids[0]
print(tokenizer.decode([space if x == -100 else x for x in trainer.train_dataset[5]["labels"]]))
""",
    "train": """
trainer_stats = trainer.train()
print(f"{trainer_stats.metrics['train_runtime']} seconds used for training.")
""",
    "generate": """
from unsloth.chat_templates import get_chat_template

tokenizer = get_chat_template(tokenizer, chat_template = "chatml",)
FastLanguageModel.for_inference(model) # Enable native 2x faster inference

messages = [
    {"role": "user", "content": "What is 5 plus 3?"},
]
inputs = tokenizer.apply_chat_template(
    messages,
    tokenize = True,
    add_generation_prompt = True,
    return_tensors = "pt",
    return_dict = True,
).to(model.device)

outputs = model.generate(**inputs, max_new_tokens = 16, use_cache = True, temperature = 1.5, min_p = 0.1)
print(tokenizer.batch_decode(outputs))
""",
    "stream": """
from transformers import TextStreamer
text_streamer = TextStreamer(tokenizer, skip_prompt = True)
_ = model.generate(input_ids = inputs, streamer = text_streamer, max_new_tokens = 16, use_cache = True,
                   pad_token_id = tokenizer.eos_token_id)
""",
    "save": """
model.save_pretrained("lora_model")
tokenizer.save_pretrained("lora_model")
""",
    "load": """
if True:
    from unsloth import FastLanguageModel
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name = "lora_model",
        max_seq_length = max_seq_length,
        dtype = dtype,
        load_in_4bit = load_in_4bit,
    )
    FastLanguageModel.for_inference(model)
again = model.generate(**inputs, max_new_tokens = 16, use_cache = True)
print(tokenizer.batch_decode(again))
""",
    "merged": """
if True: model.save_pretrained_merged("model", tokenizer, save_method = "merged_16bit",)
if True: model.save_pretrained_merged("model_4bit", tokenizer, save_method = "merged_4bit",)
if True: model.save_pretrained_merged("model_lora", tokenizer, save_method = "lora",)
if False: model.push_to_hub_merged("hf/model", tokenizer, save_method = "merged_16bit", token = "")
""",
    "gguf": """
if True: model.save_pretrained_gguf("model", tokenizer,)
if True: model.save_pretrained_gguf("model", tokenizer, quantization_method = "q4_k_m")
""",
}
WRITTEN = ["lora_model/adapter_model.safetensors", "lora_model/tokenizer.json", "model/model.safetensors",
           "model_4bit/model.safetensors", "model_lora/adapter_model.safetensors", "model/model.Q8_0.gguf",
           "model/model.Q4_K_M.gguf"]  # fmt: skip


def ported(source: str, model: Path) -> str:
    """The cell with its imports changed, and the name of the model that is here."""
    return re.sub(r"\bfrom (unsloth|trl)\b", "from jaxft", source).replace("MODEL", str(model))


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_cells_run(smollm2_gguf: Path, tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(ported(source, smollm2_gguf)) for source in CELLS.values()]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = {name: printed(cell) for name, cell in zip(CELLS, notebook.cells, strict=True)}
    print("\n".join(f"[{name}]\n{text}" for name, text in found.items()))
    assert "'role': 'assistant', 'content': 'The answer is 8.'" in found["standard"]
    rendered = "<|im_start|>user\nWhat is 5 plus 3?<|im_end|>\n<|im_start|>assistant\nThe answer is 8.<|im_end|>\n"
    assert rendered in found["whole"]
    learnt = " ".join(found["masked"].split())
    assert learnt == "The answer is 8.<|im_end|> 9.<|im_end|>"
    assert "seconds used for training" in found["train"]
    # Six steps teach the form of the answer, not sums.
    assert re.search(r"<\|im_start\|>assistant\\nThe answer is \d+\.<\|im_end\|>'\]$", found["generate"].strip())
    assert found["stream"].strip() in found["generate"]
    assert found["load"] == found["generate"]
    assert all((tmp_path / name).stat().st_size for name in WRITTEN)
