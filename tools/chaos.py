"""Inject faults into a demo run, and measure what they cost.

    python tools/chaos.py --minutes 10
    python tools/chaos.py --kinds kill,flipped-bit,hang --faults 6 --seed 3 --json chaos.json
    python tools/chaos.py --minutes 30 model=smollm2_135m method=full strategy=fsdp

One run trains with cluster.max_restarts, and seeded faults come one after another, each at a random
moment. A run that has ended is started again with the same command, as Slurm or a person would. At
the end the run is stopped, and its losses and its last checkpoint are compared, bit by bit, with
those of a run without faults. Overrides change the run; --list names the kinds of faults.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import chaos_goodput
from chaos_faults import FAULTS, Fault
from chaos_run import PATIENCE_SECONDS, POLL_SECONDS, DemoRun, Stuck

from launcher.errors import UserError, exit_when_refused

WORDS = (
    *("model=tiny", "cluster.cpu_processes=2", "cluster.max_restarts=100000", "method=lora"),
    *("strategy=ddp", "training.epochs=null", "training.max_steps=100000"),
    *("checkpoint.save_steps=20", "checkpoint.keep_last=4", "tracking.plot=false"),
    *("tracking.progress=false", "launch.collective_minutes=0.25"),
)
DISK_MB = 512
SECONDS_BETWEEN_FAULTS = 3.0  # at most, from the first step after one
SAVE_SECONDS = 30.0  # that training waits for a checkpoint of a large model, for the simulation
SLOW_SECONDS = 600.0  # to go on, of the pessimistic simulation


@dataclass(frozen=True)
class Result:
    """What one fault has cost."""

    kind: str
    lost: int  # steps that were trained again
    notice: float | None  # seconds until the attempt ended; None: it went on
    go_on: float  # seconds until the first step after the fault
    by: str  # what started the next attempt: the launcher itself, or the command again


def main() -> None:
    """Run the campaign of the command line; the exit status is 1 if the end is not bit-equal."""
    options, words = _parser().parse_known_args()
    if options.list:
        print("\n".join(f"{kind:16} {fault.about}" for kind, fault in FAULTS.items()))
        return
    if bad := [word for word in words if "=" not in word or word.startswith("-")]:
        raise UserError(f"{bad[0]} is neither a flag nor an override KEY=VALUE → --help")
    kinds = _kinds(options.kinds)
    needs = {FAULTS[kind].needs for kind in kinds}
    with _disk("disk" in needs) as folder:
        run = DemoRun(folder / "run", [*WORDS, *words], own_network="network" in needs)
        try:
            report = campaign(run, kinds, options.seed, options.minutes, options.faults)
        except Stuck as error:
            sys.exit(f"{error}")
    print("\n".join(lines(report, options.seed)))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if report["equal"] else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="no fault comes after these")
    parser.add_argument("--faults", type=int, help="no more than these many")
    parser.add_argument("--kinds", help="kind,kind,…; by default all that this user may cause")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the moments")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("--list", action="store_true", help="list the kinds of faults")
    return parser


def _kinds(asked: str | None) -> list[str]:
    """The kinds to inject. Raises UserError for a name that is none."""
    kinds = asked.split(",") if asked else list(FAULTS)
    if unknown := [kind for kind in kinds if kind not in FAULTS]:
        raise UserError(f"--kinds {unknown[0]} is no fault → {', '.join(FAULTS)}")
    possible = [kind for kind in kinds if _is_possible(FAULTS[kind])]
    for kind in (kind for kind in kinds if kind not in possible):
        print(f"{kind} is left out: only root may make a {FAULTS[kind].needs} of its own here")
    if not possible:
        raise UserError("none of these faults can be caused here → other --kinds, or as root")
    return possible


def _is_possible(fault: Fault) -> bool:
    """Whether this user may make what it needs."""
    if not fault.needs:
        return True
    made = ["unshare", {"disk": "-m", "network": "-n"}[fault.needs], "true"]
    return subprocess.run(made, capture_output=True, check=False).returncode == 0


@contextmanager
def _disk(is_own: bool) -> Iterator[Path]:
    """A folder for the run; on a small disk of its own if that is to be filled."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        if not is_own:
            yield folder
            return
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", name]
        subprocess.run(mount, check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", name], check=True)


def schedule(kinds: list[str], chance: random.Random) -> Iterator[str]:
    """Kinds in random order, each as often as the others."""
    while True:
        yield from chance.sample(kinds, len(kinds))


def campaign(
    run: DemoRun, kinds: list[str], seed: int, minutes: float, faults: int | None
) -> dict[str, Any]:
    """Inject faults into `run` until the time is over; return the report."""
    chance = random.Random(seed)
    results: list[Result] = []
    run.start()
    try:
        run.wait_for_steps(2)
        begin = time.monotonic()
        first = run.step()
        for kind in schedule(kinds, chance):
            if time.monotonic() - begin > 60 * minutes or len(results) == faults:
                break
            results.append(inject(run, kind, chance))
            _say(results, time.monotonic() - begin, minutes)
        run.wait_for_steps(1)
        seconds, steps = time.monotonic() - begin, run.step() - first
        run.stop()
        return _report(run, results, seconds, steps)
    finally:
        run.kill()


def inject(run: DemoRun, kind: str, chance: random.Random) -> Result:
    """One fault, from the moment before it to the first step after it. Raises Stuck."""
    fault = FAULTS[kind]
    run.wait_for_steps(1)
    time.sleep(chance.uniform(0, SECONDS_BETWEEN_FAULTS))
    before, begin, starts = run.mark(), time.monotonic(), run.starts
    fault.act(run, chance, before)
    notice: float | None = None
    reached = before.step
    while True:
        if notice is None:
            reached = max(reached, run.step())
            if run.has_noticed(before):
                notice = time.monotonic() - begin
        if run.has_ended():
            run.start()
        step = run.first_step_after(before, fault.survives and notice is None)
        go_on = time.monotonic() - begin
        if step is not None:
            by = "-" if notice is None else "launcher" if run.starts == starts else "command"
            return Result(kind, max(0, reached - step + 1) if notice else 0, notice, go_on, by)
        if go_on > PATIENCE_SECONDS:
            raise Stuck(f"{kind}: no step in {go_on:.0f} s: {run.last_words()}")
        time.sleep(POLL_SECONDS)


def _say(results: list[Result], seconds: float, minutes: float) -> None:
    last = results[-1]
    noticed = "not noticed" if last.notice is None else f"noticed after {last.notice:.1f} s"
    print(
        f"{seconds / 60:5.1f}/{minutes:g} min  {len(results)}  {last.kind}: {noticed}, "
        f"{last.lost} steps lost, on after {last.go_on:.1f} s by {last.by}",
        flush=True,
    )


def _report(run: DemoRun, results: list[Result], seconds: float, steps: int) -> dict[str, Any]:
    """The results, and the comparison with a run without faults."""
    last = run.step()
    print(f"comparing with {last} steps of a run without faults", flush=True)
    words = [*run.words, f"training.stop_after_steps={last}"]
    whole = DemoRun(run.folder.with_name("whole"), words, own_network=False)
    whole.start()
    assert whole.process is not None
    whole.process.wait(PATIENCE_SECONDS + seconds)
    times = [record["time"] for record in whole.records()]
    step_seconds = statistics.median(b - a for a, b in pairwise(times))
    trained = [{r["step"]: r["loss"] for r in each.records()} for each in (run, whole)]
    steps_that_differ = [s for s in range(1, last + 1) if len({t.get(s) for t in trained}) > 1]
    return {
        "results": [asdict(each) for each in results],
        "seconds": seconds,
        "steps": steps,
        "step_seconds": step_seconds,
        "goodput": min(1.0, steps * step_seconds / seconds),
        "steps_that_differ": steps_that_differ,
        "equal": not steps_that_differ and _weights(run, last) == _weights(whole, last),
    }


def _weights(run: DemoRun, step: int) -> dict[str, str]:
    """The checksums of weights and optimizer state after `step`. Random states that training never
    draws from differ from one process to the next."""
    folder = run.run.checkpoints / f"step-{step:06d}"
    tensors = (".safetensors", ".distcp")
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in tensors]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.name != "rng.safetensors"
    }


def lines(report: dict[str, Any], seed: int) -> list[str]:
    """The report as lines of Markdown."""
    table = [
        "",
        "| fault | times | steps lost | seconds to notice | seconds to go on | started by |",
        "|---|--:|--:|--:|--:|---|",
    ]
    results = [Result(**each) for each in report["results"]]
    for kind in sorted({each.kind for each in results}, key=list(FAULTS).index):
        of_kind = [each for each in results if each.kind == kind]
        noticed = [each.notice for each in of_kind if each.notice is not None]
        notice = f"{statistics.median(noticed):.1f}" if noticed else "-"
        table.append(
            f"| {kind}: {FAULTS[kind].about} | {len(of_kind)} "
            f"| {statistics.median(each.lost for each in of_kind):g} | {notice} "
            f"| {statistics.median(each.go_on for each in of_kind):.1f} "
            f"| {', '.join(sorted({each.by for each in of_kind}))} |"
        )
    differing = report["steps_that_differ"]
    end = (
        "equal to the bit"
        if report["equal"]
        else f"DIFFERENT from step {differing[0]} on"
        if differing
        else "DIFFERENT: the weights alone"
    )
    table += [
        "",
        f"{len(results)} faults in {report['seconds'] / 60:.1f} minutes, {report['steps']} steps "
        f"of {report['step_seconds']:.3f} s; goodput {report['goodput']:.1%}; losses, weights and "
        f"optimizer state {end}",
    ]
    ended = [each for each in results if each.notice is not None]
    if not ended:
        return table
    costs = chaos_goodput.Costs(
        SAVE_SECONDS,
        statistics.mean(each.notice or 0.0 for each in ended),
        statistics.mean(each.go_on for each in ended),
    )
    table += ["", f"As measured: {costs.go_on:.1f} s to go on, saves of {costs.save:.0f} s:", ""]
    table += chaos_goodput.table(costs, seed)
    slow = chaos_goodput.Costs(SAVE_SECONDS, SLOW_SECONDS, SLOW_SECONDS)
    table += ["", f"With {slow.go_on:.0f} s to go on:", "", *chaos_goodput.table(slow, seed)]
    return table


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with exit_when_refused():
        main()
