"""What an adapter is: `LoraConfig`, with PEFT's field names and PEFT's rules for which module a name means."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxft.errors import JaxftError

# The linears of most architectures, and the default: of any other it means all that it has (MLA's q_a_proj ...).
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EVERY_LINEAR = "all-linear"  # PEFT's word for all of them but the head

Bias = Literal["none", "all", "lora_only"]
_STARTS = ("gaussian", "pissa", "olora", "loftq")
_PISSA_STEPS = re.compile(r"pissa_niter_(\d+)")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What an adapter is; the field names are PEFT's. Modules are meant by their HF path, "model.layers.3.mlp.up_proj".

    Attributes:
      r: rank.
      lora_alpha: numerator of the scale.
      lora_dropout: probability of dropping a value of the adapter's input in training.
      target_modules: the modules to adapt: names that their paths end in, or one regular expression for whole paths, or
        "all-linear" for every linear but the head. The default means the same.
      use_rslora: scale by 1/sqrt(r) instead of 1/r (arXiv:2312.03732).
      use_dora: the magnitude of each row of W + B A trains by itself (arXiv:2402.09353).
      bias: which biases train as well: "none", "all", or "lora_only", those of adapted modules.
      modules_to_save: names that the paths of modules end in that train whole: embed_tokens, lm_head, norms ...
      exclude_modules: as target_modules, of modules not to adapt.
      layers_to_transform: numbers of the layers to adapt; None: all. Not with a regular expression for the targets.
      rank_pattern: r of some modules: regular expression for the end of a path -> value; the first that matches counts.
      alpha_pattern: the same for lora_alpha.
      init_lora_weights: what A and B start from: True, "gaussian", "pissa", "pissa_niter_N", "olora" or "loftq", as
        `jaxft.lora.start` says.
      ensure_weight_tying: a head that is the embedding stays so where the embedding is among modules_to_save. False, as
        PEFT has it: the two part.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    use_rslora: bool = False
    use_dora: bool = False
    bias: Bias | str = "none"
    modules_to_save: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    init_lora_weights: bool | str = True
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if rank < 1:
                raise JaxftError(name, f"the rank must be at least 1, not {rank}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise JaxftError("lora_dropout", f"must be in [0, 1), not {self.lora_dropout}")
        if self.bias not in ("none", "all", "lora_only"):
            raise JaxftError("bias", f"{self.bias!r} is not known", "Choose none, all or lora_only")
        start = self.init_lora_weights
        if (
            start is not True
            and start not in _STARTS
            and not (isinstance(start, str) and _PISSA_STEPS.fullmatch(start))
        ):
            known = ", ".join((*_STARTS, "pissa_niter_N"))
            raise JaxftError("init_lora_weights", f"{start!r} is not known", f"Choose True or one of {known}")

    @property
    def scale(self) -> float:
        """What B A x is multiplied by in modules that no pattern means."""
        return self.scale_of("")

    def rank_of(self, module: str) -> int:
        """The rank of one module."""
        return _by_pattern(self.rank_pattern, self.r, module)

    def scale_of(self, module: str) -> float:
        """What B A x is multiplied by in one module: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, self.lora_alpha, module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def pissa_steps(self) -> int | None:
        """The number of iterations that "pissa_niter_N" names; None otherwise."""
        match = _PISSA_STEPS.fullmatch(str(self.init_lora_weights))
        return int(match[1]) if match else None

    def is_target(self, module: str) -> bool:
        """Whether a module that could be adapted is."""
        if matches(self.exclude_modules, module) or self.is_saved(module) or not matches(self.target_modules, module):
            return False
        if self.layers_to_transform is None or isinstance(self.target_modules, str):
            return True
        layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        return layer is not None and int(layer[1]) in self.layers_to_transform

    def is_saved(self, module: str) -> bool:
        """Whether a module trains whole."""
        return any(module.endswith(name) for name in self.modules_to_save)


def matches(names: Sequence[str] | str, module: str) -> bool:
    """As PEFT matches: one text is a regular expression for the path, of several one must be its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], otherwise: Any, module: str) -> Any:
    """As PEFT looks it up: the first pattern that matches the end of the module's path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise
