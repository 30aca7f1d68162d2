"""Build DeepSpeed's ops on this machine before the ranks start.

Otherwise the first rank would build them while the others wait.
"""

from __future__ import annotations

import subprocess
import sys

from launcher.errors import UserError
from launcher.folders.run import RunDir
from launcher.run.rank_log import say

BUILD_ASYNC_IO = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"


def build_async_io(run: RunDir) -> None:
    """Build the op that reads and writes parameters on NVMe. Takes a minute or two the first time.

    Raises UserError with the path of the log if it cannot be built.
    """
    say(run, "building DeepSpeed's async I/O op, once on this machine")
    log = run.logs / "compiler.log"
    with log.open("wb") as output:
        result = subprocess.run(
            [sys.executable, "-c", BUILD_ASYNC_IO], stdout=output, stderr=output
        )
    if result.returncode != 0:
        raise UserError(
            f"DeepSpeed's async I/O op cannot be built (see {log}); "
            "strategy.offload_param=cpu does not need it"
        )
