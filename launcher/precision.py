"""The dtypes of a run, by the name of its precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from launcher.config.precision import Fp16Config, PrecisionConfig


@dataclass(frozen=True)
class Precision:
    """One arithmetic under every strategy: casting, no autocast."""

    name: str
    compute: torch.dtype  # frozen weights, activations, the working copy of trained weights
    master: torch.dtype  # trained weights and the optimizer's moments
    reduce: torch.dtype  # sums of gradients over ranks
    scaling: Fp16Config | None = None  # of the loss

    def table(self, state: str | None = None) -> str:
        """`state`: the optimizer's, where it is not the masters'."""
        rows = {
            "frozen weights": self.compute,
            "trained weights": self.master,
            "compute": self.compute,
            "gradients": self.master,
            "gradient reduction": self.reduce,
            "optimizer state": self.master,
        }
        names = {what: str(dtype)[6:] for what, dtype in rows.items()}
        names["optimizer state"] = state or names["optimizer state"]
        return "  ".join(f"{what}: {name}" for what, name in names.items())


PRECISIONS = {
    "fp32": Precision("fp32", torch.float32, master=torch.float32, reduce=torch.float32),
    "bf16": Precision("bf16", torch.bfloat16, master=torch.float32, reduce=torch.float32),
    "fp16": Precision("fp16", torch.float16, master=torch.float32, reduce=torch.float32),
    "pure_bf16": Precision("pure_bf16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
}


def precision_of(config: PrecisionConfig) -> Precision:
    scaling = config if isinstance(config, Fp16Config) else None
    return replace(PRECISIONS[config.name], scaling=scaling)
