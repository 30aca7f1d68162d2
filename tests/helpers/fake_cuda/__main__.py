"""python -m tests.helpers.fake_cuda GUARD CASES.json PROCESSES: one JSON line a case.

Cases run in forks of one process, which has imported everything. The lines have their order.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import sys
from pathlib import Path

from tests.helpers.fake_cuda import Case, build


def main() -> None:
    guard, file, processes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    build.load(guard)
    from tests.helpers.fake_cuda import device

    device.pretend()
    import torch

    from tests.helpers.fake_cuda.step import see

    torch.set_num_threads(1)  # a fork inherits no threads
    gc.collect()
    gc.freeze()
    cases = [Case(**{**case, "overrides": tuple(case["overrides"])}) for case in _read(file)]
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        for seen in pool.imap(see, cases, chunksize=1):
            print(json.dumps(dataclasses.asdict(seen)), flush=True)


def _read(file: Path) -> list[dict[str, object]]:
    cases: list[dict[str, object]] = json.loads(file.read_text())
    return cases


if __name__ == "__main__":
    main()
