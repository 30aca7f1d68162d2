"""The dtypes of a run, by the name of its precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from launcher.config.schema.precision import Fp16Config, PrecisionConfig


@dataclass(frozen=True)
class Precision:
    """The same arithmetic under every strategy: tensors are cast, autocast is not used."""

    name: str
    compute: torch.dtype  # frozen weights, activations, the working copy of trained weights
    master: torch.dtype  # trained weights and the optimizer's moments
    reduce: torch.dtype  # sums of gradients over ranks
    scaling: Fp16Config | None = None  # of the loss

    def describe(self, optimizer_state: str | None, has_frozen: bool, reduces: bool) -> str:
        """The dtypes on one line, of what there is.

        Args:
            optimizer_state: If it differs from the master weights'.
            has_frozen: Whether some weights are frozen.
            reduces: Whether there are several ranks, over which gradients are summed.
        """
        dtypes = {
            "frozen weights": self.compute,
            "trained weights": self.master,
            "compute": self.compute,
            "gradients": self.master,
            "gradient reduction": self.reduce,
            "optimizer state": self.master,
        }
        names = {kind: str(dtype).removeprefix("torch.") for kind, dtype in dtypes.items()}
        names["optimizer state"] = optimizer_state or names["optimizer state"]
        if not has_frozen:
            del names["frozen weights"]
        if not reduces:
            del names["gradient reduction"]
        return "  ".join(f"{kind}: {name}" for kind, name in names.items())


PRECISIONS = {
    "fp32": Precision("fp32", torch.float32, master=torch.float32, reduce=torch.float32),
    "bf16": Precision("bf16", torch.bfloat16, master=torch.float32, reduce=torch.float32),
    "fp16": Precision("fp16", torch.float16, master=torch.float32, reduce=torch.float32),
    "pure_bf16": Precision("pure_bf16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
}


def precision_of(config: PrecisionConfig) -> Precision:
    """The dtypes that `config` names, with its settings for loss scaling if it is fp16."""
    scaling = config if isinstance(config, Fp16Config) else None
    return replace(PRECISIONS[config.name], scaling=scaling)
