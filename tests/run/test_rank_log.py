"""How a rank ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# A thread of gloo completes a sum, and waits for the GIL to drop its tensor when the interpreter is
# finalized: the main thread holds the GIL for its last three seconds.
RANK = """
import atexit, builtins, ctypes
atexit.register(ctypes.PyDLL(None).sleep, 3)
import sys, time
import torch
import torch.distributed as dist
from launcher.run import rank_log

rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
dist.barrier()
builtins.group = dist.group.WORLD
time.sleep(2 * (rank == 0))
for _ in range(20):
    dist.all_reduce(torch.ones(1000), async_op=True)
if rank == 0:
    time.sleep(2)
print("done")
rank_log.end_process()  # with sys.exit() rank 1 aborts
"""


def test_a_rank_ends_in_order_beside_threads_that_hold_tensors(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")], stdout=-1, stderr=-1
        )
        for rank in range(2)
    ]
    for process in ranks:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert output == b"done\n", "what was printed is written"
