"""What is compiled on this machine before the ranks start: each would else wait for the first."""

from __future__ import annotations

import subprocess
import sys

from launcher.errors import UserError
from launcher.run_dir import RunDir

DISK_ACCESS = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"


def disk_access(run: RunDir) -> None:
    """DeepSpeed's, which reads and writes parameters on NVMe: a minute or two the first time.

    Raises UserError with the log's place when it cannot be built.
    """
    print("DeepSpeed's disk access is compiled, once on this machine", flush=True)
    log = run.logs / "compiler.log"
    with log.open("wb") as to:
        built = subprocess.run([sys.executable, "-c", DISK_ACCESS], stdout=to, stderr=to)
    if built.returncode != 0:
        raise UserError(
            f"DeepSpeed's disk access cannot be compiled (see {log}); "
            "strategy.offload_param=cpu needs none"
        )
