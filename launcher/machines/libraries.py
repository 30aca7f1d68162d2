"""What torch and DeepSpeed can do on this machine, as JSON.

    python -m launcher.machines.libraries

A process of its own: importing them takes seconds, and a broken driver can end or hang it.
"""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

OPS = {"CPUAdamBuilder": "cpu_adam", "AsyncIOBuilder": "async_io", "FusedAdamBuilder": "fused_adam"}


def main() -> None:
    """The command line."""
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints while it is imported
        found = inspect_libraries()
    print(json.dumps(found))


def inspect_libraries() -> dict[str, Any]:
    """`torch`, `cuda` (of its build), `gpus` that it can use, `nccl`, `gloo`, and `ops`: those of
    DeepSpeed that can be built here."""
    import torch
    import torch.distributed as dist

    has_nccl = torch.version.cuda is not None and dist.is_nccl_available()
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
        "gloo": dist.is_gloo_available(),
    }
    from deepspeed.ops import op_builder

    found["ops"] = [
        name for key, name in OPS.items() if getattr(op_builder, key)().is_compatible(verbose=False)
    ]
    return found


if __name__ == "__main__":
    main()
