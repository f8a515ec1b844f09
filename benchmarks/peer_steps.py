"""`python benchmarks/peer_steps.py --model qwen3-30b-a3b --layers 12 --shape 2x2048`: Unsloth's train step, timed.

The peer of `python -m benchmarks.train`: the same shapes, random weights and tokens, r=16 on all linears, experts too
(Unsloth puts them into PEFT's `target_parameters`, gate and up as one matrix), 8-bit AdamW. Needs unsloth and
bitsandbytes, a GPU for figures, and no network. Writes a checkpoint first (--folder; removed at the end, unless
--keep), in bfloat16, of gpt-oss with its experts in MXFP4; Unsloth quantizes the dense models to NF4 as it loads them.
Prints one JSON line with the field names of benchmarks.train.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GIB = 2**30
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS", "UNSLOTH_DISABLE_AUTO_UPDATES")


class Model(NamedTuple):
    """A model's config.json, and whether Unsloth is to load it in 4 bits."""

    config: dict[str, Any]
    load_in_4bit: bool


def _model(model_type: str, *sizes: int, theta: float, load_in_4bit: bool = True, **fields: Any) -> Model:
    """Sizes: vocabulary, width, MLP's width, layers, heads, key-value heads, head, positions."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings")
    plain = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    config = dict(zip(names, sizes, strict=True)) | plain | fields
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta} | fields.get("rope_parameters", {})
    return Model({"model_type": model_type, "bos_token_id": 256, "eos_token_id": 257} | config, load_in_4bit)


_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
MODELS = {
    "qwen3-4b": _model(
        "qwen3", 151936, 2560, 9728, 36, 32, 8, 128, 40960, theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True
    ),
    "mistral-7b": _model("mistral", 32768, 4096, 14336, 32, 32, 8, 128, 32768, theta=1e6, sliding_window=None),
    # Phi-4 as Unsloth publishes it, with q, k and v apart: Microsoft's own folder has one matrix of them.
    "phi-4": _model("llama", 100352, 5120, 17920, 40, 40, 10, 128, 16384, theta=250000.0),
    "qwen3-30b-a3b": _model(
        *("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 128, 40960),
        theta=1e6,
        load_in_4bit=False,
        rms_norm_eps=1e-6,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        router_aux_loss_coef=0.001,
    ),
    "gpt-oss-20b": _model(
        *("gpt_oss", 201088, 2880, 2880, 24, 64, 8, 64, 131072),
        theta=150000.0,
        load_in_4bit=False,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
        router_aux_loss_coef=0.9,
        rope_parameters=_YARN | {"original_max_position_embeddings": 4096},
        quantization_config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                f"model.{name}" for name in ("layers.*.self_attn", "layers.*.mlp.router", "embed_tokens")
            ]
            + ["lm_head"],
        },
    ),
}


def model_of(name: str, layers: int | None) -> Model:
    """The model, or its first layers."""
    model = MODELS[name]
    return model._replace(config=model.config | {"num_hidden_layers": layers or model.config["num_hidden_layers"]})


def tensors(config: dict[str, Any], device: str) -> Iterator[dict[str, Any]]:
    """The checkpoint's tensors, file by file: those of a layer, and those of no layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    files: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():  # without what is tied
        part = name.split(".")[2] if ".layers." in name else ""
        files.setdefault(part, {})[name] = tuple(parameter.shape)
    for shapes in files.values():
        found = {}
        for name, shape in shapes.items():
            if "quantization_config" in config and name.endswith(EXPERTS):
                experts, rows, columns = shape[0], shape[2], shape[1] // 32
                blocks = torch.randint(256, (experts, rows, columns, 16), dtype=torch.uint8, device=device)
                found |= {f"{name}_blocks": blocks, f"{name}_scales": torch.full_like(blocks[..., 0], 120)}
                continue
            value = torch.empty(shape, dtype=torch.bfloat16, device=device)
            value.fill_(1) if "norm" in name else value.normal_(std=0.02)
            found |= expert_by_expert(name, value) if ".mlp.experts." in name and value.ndim == 3 else {name: value}
        yield found


def expert_by_expert(name: str, value: Any) -> dict[str, Any]:
    """A stack of experts [E, out, in] as Qwen3's files have it: a linear for each expert; gate and up apart."""
    stem, _, linear = name.rpartition(".")
    linears = ("gate_proj", "up_proj") if linear == "gate_up_proj" else (linear,)
    parts = zip(linears, value.chunk(len(linears), 1), strict=True)
    return {f"{stem}.{i}.{each}.weight": part[i] for each, part in parts for i in range(len(value))}


def write_checkpoint(config: dict[str, Any], folder: Path, device: str) -> None:
    """Random weights, config.json and a tokenizer of bytes, in the layout of the Hub."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for index, found in enumerate(tensors(config, device)):
        file = f"model-{index:05d}.safetensors"
        save_file({name: value.cpu().contiguous() for name, value in found.items()}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(found, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    model_type = config["model_type"]
    facts = {name: value for name, value in config.items() if name != "model_type"}
    saved = AutoConfig.for_model(model_type, **facts)
    saved.architectures = [type_name(model_type)]
    saved.dtype = "bfloat16"
    saved.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def type_name(model_type: str) -> str:
    """The name of transformers' class for causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def loaded(model: Model, folder: Path, length: int) -> Any:
    """Unsloth's model with adapters, ready to train."""
    import torch
    from unsloth import FastLanguageModel

    peer, _ = FastLanguageModel.from_pretrained(
        str(folder), length, torch.bfloat16, model.load_in_4bit, use_exact_model_name=True
    )
    peer = FastLanguageModel.get_peft_model(
        peer,
        r=16,
        target_modules=list(TARGETS),
        target_parameters=list(EXPERTS) if model.config.get("num_experts_per_tok") else None,
        lora_alpha=16,
        use_gradient_checkpointing="unsloth",
    )
    return FastLanguageModel.for_training(peer) or peer


def measure(peer: Any, model: Model, rows: int, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times synchronized steps on one batch, as benchmarks.train does."""
    import torch

    device = next(peer.parameters()).device.type
    trainable = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    names = {part for name, p in peer.named_parameters() if p.requires_grad for part in [name.split(".lora_")[0]]}
    if device == "cuda":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(trainable, lr=1e-3, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    ids = torch.randint(model.config["vocab_size"], (rows, length), device=device)
    after_load = memory("memory_allocated")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(arguments.warmup + arguments.steps):
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = peer(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(float(loss.detach()), 4))
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[arguments.warmup :])
    return {
        "tok_s": round(rows * length / median, 1),
        "step_ms": round(median * 1e3, 2),
        "first_step_s": round(times[0], 1),
        "peak_alloc_gib": memory("max_memory_allocated"),
        "after_load_gib": after_load,
        "losses": losses,
        "trainable": sum(parameter.numel() for parameter in trainable),
        "lora_dtypes": sorted({str(parameter.dtype) for parameter in trainable}),
        "adapted": sorted({name.split(".layers.")[-1].partition(".")[2] for name in names}),
    }


def memory(name: str) -> float | None:
    """A statistic of torch's allocator in GiB; None on a CPU."""
    import torch

    return round(getattr(torch.cuda, name)() / GIB, 3) if torch.cuda.is_available() else None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--layers", type=int, help="so many of the model's layers")
    parser.add_argument("--shape", default="2x2048", help="rows x tokens")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes, such as a folder in memory")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there; one that is there is used")
    parser.add_argument("--out", help="append the JSON line to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    for name in OFFLINE:
        os.environ.setdefault(name, "1")
    import torch
    import unsloth  # before transformers, as its documentation asks
    from transformers import __version__ as transformers

    rows, length = map(int, arguments.shape.split("x"))
    model = model_of(arguments.model, arguments.layers)
    folder = arguments.folder or Path(tempfile.mkdtemp()) / "checkpoint"
    try:
        if not folder.exists():
            write_checkpoint(model.config, folder, "cuda" if torch.cuda.is_available() else "cpu")
        start = time.perf_counter()
        peer = loaded(model, folder, length)
        record = {"kind": "train", "job": "unsloth", "model": arguments.model, "batch": rows, "seq": length}
        record |= {"layers": model.config["num_hidden_layers"], "load_s": round(time.perf_counter() - start, 1)}
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    record |= measure(peer, model, rows, length, arguments)
    record |= {"unsloth": unsloth.__version__, "torch": torch.__version__, "transformers": transformers}
    record["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    report(record, arguments.out)


def report(record: dict[str, Any], out: str | None) -> None:
    """Prints the JSON line, and appends it to a file."""
    print(json.dumps(record), flush=True)
    if out:
        with open(out, "a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
