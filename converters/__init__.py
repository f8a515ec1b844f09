"""Checkpoint formats in and out: Hugging Face, PEFT, Orbax, GGUF; `checkpoint.py` says what they have in common."""
