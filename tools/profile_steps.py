"""Three steps of a run under torch.profiler: what the GPU computes, how long it is idle, and how
far the host is ahead of it.

    python tools/profile_steps.py model.name_or_path=FOLDER strategy=single precision=bf16
    python tools/profile_steps.py --json --warm-up 2 model=tiny strategy=ddp precision=fp32

Takes the overrides of `shardway train` and runs its loop on one rank: this machine's first GPU, or
its CPU. The first steps are not recorded. A share is the time of the kernels of a kind, relative to
the time of all kernels. Idle is the share of the time, from the first kernel to the end of the last
one, in which no kernel runs. The lead time is between the launch of a kernel and its start: if its
median is near zero, the GPU waits for the host. On a CPU the times are those of operators, each
without the operators that it calls, and a lead time does not exist.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_parts
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from launcher.config import Config
from launcher.config.compose import compose
from launcher.config.rules.rule import World
from launcher.data.build import build_loaders
from launcher.data.loader import StepBatch
from launcher.data.prefetch import Prefetcher
from launcher.errors import UserError
from launcher.model.open import open_model
from launcher.run import auto
from launcher.training.choices import device_of
from launcher.training.loop import StepLoaders, fit
from launcher.training.plan import Plan
from launcher.training.state import Progress
from launcher.training.throughput import ThroughputMeter

STEPS, TOP = 3, 8
Event = dict[str, Any]  # of a Chrome trace; times in microseconds
# Kind → part of the names of its kernels, the first that matches.
KINDS = {
    "communication": r"nccl|c10d|allgather|reduce_scatter",
    "copies": r"memcpy|memset|copy_|_to_copy",
    "attention": r"flash|fmha|attention|sdpa",
    "optimizer": r"multi_tensor|adam|lion|foreach",
    "quantization": r"quant|nf4|4bit|8bit",
    "matrix products": r"gemm|gemv|cutlass|nvjet|xmma|aten::(add)?(mm|bmm)|linear",
    "norm, softmax, loss": r"norm|softmax|nll|cross_entropy",
    "elementwise": r"elementwise|vectorized|reduce_kernel|triton|aten::(mul|add|sub|div|silu)",
}


@dataclass(frozen=True)
class Profile:
    """Three steps, or other events. Times in milliseconds."""

    device: str
    kernels: int
    milliseconds: float  # from the first kernel to the end of the last one
    idle: float  # share of this time
    lead: float | None  # median; None on a CPU
    late: float | None  # share of the kernels that start within 10 microseconds of their launch
    shares: dict[str, float]  # by kind
    top: dict[str, float]  # the kernels with the largest shares


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--warm-up", type=int, default=8, help="steps that are not recorded")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--trace", type=Path, help="keep the Chrome trace in this .json file")
    options, overrides = parser.parse_known_args()
    try:
        found = profile_run(compose(overrides), options.warm_up, options.trace)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(asdict(found)) if options.json else describe(found))


def profile_run(config: Config, warm_up: int, trace: Path | None) -> Profile:
    """Train `warm_up` steps and the recorded ones."""
    rank_info = bench_parts.alone()
    folder, tokenizer = open_model(config, _ignore)
    choice = auto.choose(config, [device_of(rank_info)], World(1, 1), folder, resumed=None)
    print(*choice.lines, sep="\n", end="\n" if choice.lines else "", file=sys.stderr)
    config = choice.config
    rows = build_loaders(
        *(config.data, config.training, tokenizer, 0, 1), say=_ignore, check=lambda: None
    ).training
    state = bench_parts.train_state(rank_info, config)
    recorded = RecordedSteps(Prefetcher(rows, rank_info.device), warm_up)
    end = warm_up + STEPS + 1  # the recording ends when the next step begins
    training = config.training
    plan = Plan(end, end, training.max_grad_norm, None, None, training.log_steps)
    meter = ThroughputMeter(rank_info.device)
    with recorded.profile:
        fit(state, StepLoaders(recorded), plan, [], _Unsaved(), lambda: False, Progress(), meter)
    dist.destroy_process_group()
    with tempfile.TemporaryDirectory() as scratch:
        path = trace or Path(scratch) / "trace.json"
        recorded.profile.export_chrome_trace(str(path))
        return summarize(json.loads(path.read_text())["traceEvents"])


class RecordedSteps:
    """The batches of a loader. Recording begins with step `warm_up`, counted from 0."""

    def __init__(self, loader: Prefetcher, warm_up: int) -> None:
        self.loader, self.steps_per_epoch = loader, loader.steps_per_epoch
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profile = profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=max(0, warm_up - 1), warmup=1, active=STEPS, repeat=1
            ),
        )
        self._started = False

    def step_batch(self, step: int) -> StepBatch:
        if self._started:
            self.profile.step()
        self._started = True
        return self.loader.step_batch(step)


class _Unsaved:
    """Saves no checkpoints."""

    def save(self, step: int, tokens: int, eval_loss: float | None) -> None: ...

    def failed(self) -> bool:
        return False

    def finish(self) -> None: ...


def _ignore(line: str) -> None: ...


def summarize(events: Sequence[Event]) -> Profile:
    """The figures of a Chrome trace. Raises UserError if it has no kernels."""
    timed = [each for each in events if each.get("ph") == "X"]
    kernels = [e for e in timed if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    device = "gpu" if kernels else "cpu"
    intervals = kernels or [e for e in timed if e["cat"] == "cpu_op"]
    kernels = kernels or _own_times(intervals)
    if not kernels:
        raise UserError("the profiler recorded no kernel; are there steps after the warm-up?")
    total = sum(e["dur"] for e in kernels)
    begin, end = min(e["ts"] for e in intervals), max(e["ts"] + e["dur"] for e in intervals)
    leads = list(_leads(kernels, timed))
    names, kinds = Counter[str](), Counter[str]()
    for each in kernels:
        names[each["name"][:100]] += each["dur"]
        kinds[kind_of(each["name"])] += each["dur"]
    return Profile(
        device,
        len(kernels),
        round((end - begin) / 1000, 3),
        round(1 - _covered(intervals) / (end - begin), 4),
        round(statistics.median(leads) / 1000, 3) if leads else None,
        round(sum(lead < 10 for lead in leads) / len(leads), 4) if leads else None,
        {kind: round(time / total, 4) for kind, time in kinds.most_common()},
        {name: round(time / total, 4) for name, time in names.most_common(TOP)},
    )


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    return next((kind for kind, part in KINDS.items() if re.search(part, name, re.I)), "other")


def _leads(kernels: Iterable[Event], events: Iterable[Event]) -> Iterable[float]:
    """Microseconds from the launch of each kernel to its start, if the launch was recorded."""
    launches = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in e["args"]
    }
    for each in kernels:
        number = each["args"].get("correlation") if "args" in each else None
        if number in launches:
            yield each["ts"] - launches[number]


def _covered(events: Iterable[Event]) -> float:
    """Microseconds in which at least one of `events` runs."""
    covered, until = 0.0, float("-inf")
    for each in sorted(events, key=lambda e: e["ts"]):
        end = each["ts"] + each["dur"]
        covered += max(0.0, end - max(until, each["ts"]))
        until = max(until, end)
    return covered


def _own_times(events: Iterable[Event]) -> list[Event]:
    """The events without the time of those that they contain, which are of the same thread."""
    found: list[Event] = []
    outer: list[Event] = []
    for each in sorted(events, key=lambda e: (e["tid"], e["ts"], -e["dur"])):
        while outer and (outer[-1]["tid"] != each["tid"] or outer[-1]["until"] <= each["ts"]):
            outer.pop()
        if outer:
            outer[-1]["dur"] -= each["dur"]
        found.append({**each, "until": each["ts"] + each["dur"]})
        outer.append(found[-1])
    return found


def describe(found: Profile) -> str:
    """The figures as text."""
    lead = "" if found.lead is None else f", the host {found.lead:.2f} ms ahead (median)"
    lines = [
        f"{STEPS} steps on the {found.device}: {found.milliseconds:,.1f} ms, {found.kernels:,} "
        f"kernels, idle {found.idle:.1%}{lead}",
        *(f"  {share:6.1%}  {kind}" for kind, share in found.shares.items()),
        "the largest:",
        *(f"  {share:6.1%}  {name}" for name, share in found.top.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
