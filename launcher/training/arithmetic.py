"""How this process computes: TF32, and the order of sums."""

from __future__ import annotations

import torch

from launcher.config.schema.training import TrainingConfig


def set_arithmetic(training: TrainingConfig) -> str:
    """Apply `training.tf32` and `training.deterministic` to this process; return a line for the
    log, empty if both are off.

    launcher/run/environment.py has set the variables that CUDA libraries read. An operation that
    has no deterministic implementation raises RuntimeError with its name.
    """
    if training.tf32:
        # Not backends.cuda.matmul.fp32_precision: once that is set, torch refuses to tell the
        # precision to libraries that ask in this way.
        torch.set_float32_matmul_precision("high")
    if training.deterministic:
        torch.use_deterministic_algorithms(True)
        # It would overwrite every new tensor: nothing here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    notes = {
        "fp32 matrix products in TF32 (training.tf32=true)": training.tf32,
        "sums in a fixed order (training.deterministic=true)": training.deterministic,
    }
    return ", ".join(note for note, is_on in notes.items() if is_on)
