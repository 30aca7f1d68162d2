"""The dtypes of a run, by the name of its precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """One arithmetic under every strategy: casting, no autocast."""

    name: str
    compute: torch.dtype  # frozen weights, activations, the working copy of trained weights
    master: torch.dtype  # trained weights and the optimizer's moments
    reduce: torch.dtype  # sums of gradients over ranks

    def table(self) -> str:
        rows = {
            "frozen weights": self.compute,
            "trained weights": self.master,
            "compute": self.compute,
            "gradient reduction": self.reduce,
            "optimizer state": self.master,
        }
        return "  ".join(f"{what}: {str(dtype)[6:]}" for what, dtype in rows.items())


PRECISIONS = {
    "fp32": Precision("fp32", torch.float32, master=torch.float32, reduce=torch.float32),
    "bf16": Precision("bf16", torch.bfloat16, master=torch.float32, reduce=torch.float32),
}
