"""Makes trl_policy_losses.json: GRPOTrainer's loss and its gradient for the cases of test_losses_policy.py.

    PYTHONPATH=.:tests python tests/vectors/make_trl_policy_losses.py        (needs torch and trl)

TRL's own `_compute_loss` runs in float64 on the log-probabilities of the case's completions; of a trainer it has what
that function reads, and nothing else.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl

from jaxft.losses import PolicyLoss
from test_losses_policy import CASES, completions_alone, name_of, near, random_log_probs


def main() -> None:
    batch = completions_alone()
    text = batch.text
    new = random_log_probs(text, 1)
    arrays = {"new": new, "old": near(text, new, 2), "ref": near(text, new, 3)}
    found: dict[str, Any] = {"versions": {"trl": trl.__version__, "torch": torch.__version__}}
    for settings in CASES:
        loss, gradient = of_trl(arrays, text.loss_mask, batch.advantages[:, 0], settings)
        found[name_of(settings)] = {"loss": loss, "gradient": gradient[text.loss_mask != 0].tolist()}
    Path(__file__).with_name("trl_policy_losses.json").write_text(json.dumps(found, indent=1) + "\n")


def of_trl(
    arrays: dict[str, np.ndarray], mask: np.ndarray, advantages: np.ndarray, settings: PolicyLoss
) -> tuple[float, np.ndarray]:
    """(loss, its gradient [N, T]) of N completions."""
    new, old, ref = (torch.tensor(arrays[name], dtype=torch.float64) for name in ("new", "old", "ref"))
    new.requires_grad_()
    ids = torch.zeros(mask.shape, dtype=torch.long)
    completion_mask = torch.tensor(mask, dtype=torch.float64)
    inputs = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": completion_mask[:, :0],
        "completion_ids": ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": completion_mask.sum(),
    }
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.ones_like(new), None),
        **{name: getattr(settings, name) for name in ("loss_type", "importance_sampling_level", "beta")},
        epsilon_low=settings.epsilon,
        epsilon_high=settings.upper,
        max_completion_length=settings.max_completion_length,
        args=SimpleNamespace(delta=settings.delta, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
    )
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)  # pyright: ignore[reportArgumentType]
    loss.backward()
    assert new.grad is not None
    return loss.item(), new.grad.numpy()


if __name__ == "__main__":
    main()
