"""Commands about LoRA adapters: `merge`, `extract-lora`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from converters.commands.base import Writes
from jaxft.console import console, warn
from jaxft.errors import JaxftError

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from converters.merge import MergedCheckpoint
    from converters.model_card import Card
    from converters.peft_io import Adapter

_NOTES = {
    "merged_16bit": "merged checkpoint, 16 bits",
    "merged": "merged checkpoint, in the base's dtypes",
    "merged_4bit_forced": "merged checkpoint in bitsandbytes' NF4",
}


@dataclasses.dataclass(frozen=True)
class Merge(Writes):
    """A base model and its adapter to one checkpoint: W + scale * B A in float32, one tensor at a time.

    Attributes:
      adapter: the folder of a PEFT adapter.
      destination: the new folder.
      base: the base model, a folder, a .gguf file or a name on the hub; without it, what the adapter names as its base.
        Name the original 16-bit checkpoint where the adapter was trained over a quantized copy of it.
      save_method: merged_16bit stores tensors of more than 16 bits as bfloat16; merged keeps the base's dtypes;
        merged_4bit_forced quantizes the merged weights again, and says what that loses.
    """

    adapter: Positional[Path]
    destination: Positional[Path]
    base: str | None = None
    save_method: Literal["merged_16bit", "merged", "merged_4bit_forced"] = "merged_16bit"

    def run(self) -> None:
        """Merges."""
        from converters.bnb import write_bnb
        from converters.hf_export import write_hf
        from converters.load import check
        from converters.merge import CastCheckpoint, MergedCheckpoint
        from converters.open import base_of, open_checkpoint
        from converters.peft_io import read_adapter

        adapter = read_adapter(self.adapter)
        name = self.base or base_of(adapter.config, self.adapter)
        base = open_checkpoint(name)
        self._say_into_what(base)
        merged = MergedCheckpoint(base, adapter)
        check(merged)
        card, loss = self._card(name, base, adapter), {}
        text = card.text(self.destination.name)
        if self.save_method == "merged_4bit_forced":
            write_bnb(merged, self.destination, overwrite=self.overwrite, card=text)
            loss = self._loss(merged, card)
        else:
            result = CastCheckpoint(merged) if self.save_method == "merged_16bit" else merged
            write_hf(result, self.destination, overwrite=self.overwrite, card=text)
        self.report({self.destination: _NOTES[self.save_method]}, base=merged.where, **loss)

    @staticmethod
    def _say_into_what(base: Checkpoint) -> None:
        from converters.checkpoint import quantization_of

        quantization = quantization_of(base)
        if quantization:
            warn(f"{base.where} is quantized ({quantization}), and the adapter is merged into its decoded weights; "
                 "name the original checkpoint with --base to merge into that")  # fmt: skip
        else:
            console.print(f"merging into the weights of {base.where}", soft_wrap=True)

    def _card(self, name: str, base: Checkpoint, adapter: Adapter) -> Card:
        from converters.checkpoint import quantization_of
        from converters.model_card import FORCED_4BIT, Card, licence_of, of_adapter, of_merge, training_section_of

        quantization = quantization_of(base)
        into = f"the base's decoded weights ({quantization})" if quantization else "the base's own weights"
        forced = (FORCED_4BIT,) if self.save_method == "merged_4bit_forced" else ()
        return Card(
            self.save_method.removesuffix("_forced"),
            name,
            licence_of(base),
            (of_adapter(adapter.config), of_merge(into), *forced),
            training_text=training_section_of(self.adapter),
        )

    def _loss(self, merged: MergedCheckpoint, card: Card) -> dict[str, Any]:
        """What was read back, against what was to be written; the model card says it as well."""
        from converters.merge import rounding_loss
        from converters.model_card import write_card
        from converters.open import open_checkpoint

        loss = rounding_loss(merged, open_checkpoint(self.destination))
        words = (
            f"4 bits round the merged weights by {loss.of_weights:.1%} of their size (rms), which is "
            f"{loss.of_change:.2f} times what the adapter changed"
        )
        warn(f"{words}; merged_16bit loses neither")
        card = dataclasses.replace(card, weights=(*card.weights, f"Measured: {words}."))
        write_card(self.destination, card.text(self.destination.name))
        return {"loss": dataclasses.asdict(loss)}


@dataclasses.dataclass(frozen=True)
class ExtractLora(Writes):
    """The difference of two checkpoints as a PEFT adapter, by singular value decomposition.

    Attributes:
      base: the checkpoint before fine-tuning, of any format.
      tuned: the same model after it.
      destination: the new folder.
      r: rank of every module.
    """

    base: Positional[str]
    tuned: Positional[str]
    destination: Positional[Path]
    r: int = 16

    def run(self) -> None:
        """Extracts."""
        from converters.extract_lora import extract_lora
        from converters.open import open_checkpoint
        from converters.peft_io import write_adapter

        if self.r < 1:
            raise JaxftError("r", f"the rank must be at least 1, not {self.r}")
        found = extract_lora(open_checkpoint(self.base), open_checkpoint(self.tuned), self.r)
        if found.left_out:
            warn(f"an adapter on linears cannot hold what changed in {', '.join(found.left_out)}")
        write_adapter(found.adapter, self.destination, overwrite=self.overwrite)
        worst = min(found.kept, key=found.kept.__getitem__)
        note = f"PEFT adapter, rank {self.r}, {len(found.kept)} modules"
        console.print(f"least kept of a module's change: {found.kept[worst]:.2%} of its squared norm, in {worst}")
        self.report({self.destination: note}, kept=found.kept, left_out=found.left_out)
