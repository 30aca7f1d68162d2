"""The faults of tools/chaos.py, as they come in practice: signals, damaged files, a full disk, a
cut network."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from chaos_run import DemoRun, Mark, Stuck, signal_process, wait_until

PAUSE_SECONDS = 3.0
CUT_SECONDS = 30.0
Act = Callable[[DemoRun, random.Random, Mark], None]


@dataclass(frozen=True)
class Fault:
    """What is done to a run."""

    act: Act
    about: str
    survives: bool = False  # the attempt goes on
    needs: str = ""  # disk or network: what only root can make


def _any_rank(run: DemoRun, chance: random.Random) -> int:
    return chance.choice(run.ranks())


def _signal_rank(number: int, run: DemoRun, chance: random.Random, before: Mark) -> None:
    signal_process(_any_rank(run, chance), number)


def _kill_first(run: DemoRun, chance: random.Random, before: Mark) -> None:
    signal_process(run.rank(0), signal.SIGKILL)


def _kill_agent(run: DemoRun, chance: random.Random, before: Mark) -> None:
    signal_process(run.agent(), signal.SIGKILL)


def _signal_launcher(number: int, run: DemoRun, chance: random.Random, before: Mark) -> None:
    signal_process(run.launcher, number)


def _interrupt_twice(run: DemoRun, chance: random.Random, before: Mark) -> None:
    signal_process(run.launcher, signal.SIGINT)
    time.sleep(0.01)
    signal_process(run.launcher, signal.SIGINT)


def _lose_node(run: DemoRun, chance: random.Random, before: Mark) -> None:
    for pid in (run.launcher, run.agent(), *run.ranks()):
        signal_process(pid, signal.SIGKILL)


def _stop_file(run: DemoRun, chance: random.Random, before: Mark) -> None:
    run.run.stop.touch()


def _pause(pids: list[int], seconds: float) -> None:
    for pid in pids:
        signal_process(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        signal_process(pid, signal.SIGCONT)


def _pause_rank(run: DemoRun, chance: random.Random, before: Mark) -> None:
    _pause([_any_rank(run, chance)], PAUSE_SECONDS)


def _suspend(run: DemoRun, chance: random.Random, before: Mark) -> None:
    _pause([run.launcher, run.agent(), *run.ranks()], PAUSE_SECONDS)


def _slow(run: DemoRun, chance: random.Random, before: Mark) -> None:
    rank, end = _any_rank(run, chance), time.monotonic() + PAUSE_SECONDS
    while time.monotonic() < end:
        _pause([rank], 0.1)
        time.sleep(0.02)


def _hang(run: DemoRun, chance: random.Random, before: Mark) -> None:
    signal_process(_any_rank(run, chance), signal.SIGSTOP)


def _launch_again(run: DemoRun, chance: random.Random, before: Mark) -> None:
    second = subprocess.run(run.command(), capture_output=True, text=True, check=False)
    if second.returncode != 2 or "is running" not in second.stderr:
        raise Stuck(f"a second launch was not refused: {second.stdout}{second.stderr}")


def _then_kill(damage: Callable[[DemoRun, random.Random], None]) -> Act:
    def act(run: DemoRun, chance: random.Random, before: Mark) -> None:
        damage(run, chance)
        signal_process(_any_rank(run, chance), signal.SIGKILL)

    return act


def _newest_file(run: DemoRun, chance: random.Random) -> Path:
    """A file of the newest checkpoint."""
    newest = run.checkpoints()[0].path
    return chance.choice(sorted(file for file in newest.rglob("*") if file.is_file()))


def _flip_bit(run: DemoRun, chance: random.Random) -> None:
    file = _newest_file(run, chance)
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def _truncate(run: DemoRun, chance: random.Random) -> None:
    file = _newest_file(run, chance)
    os.truncate(file, chance.randrange(file.stat().st_size))


def _lose_checkpoint(run: DemoRun, chance: random.Random) -> None:
    shutil.rmtree(run.checkpoints()[0].path)


def _tear_metrics(run: DemoRun, chance: random.Random) -> None:
    with run.run.metrics.open("ab") as file:
        file.write(b'\0\0\0{"step": 1')


def _wait_for_save(run: DemoRun, chance: random.Random) -> None:
    folder = run.run.checkpoints
    wait_until(lambda: any(folder.glob(".step-*.partial")), "no checkpoint was begun")


def _fill_disk(run: DemoRun, chance: random.Random, before: Mark) -> None:
    filler = run.folder.parent / "filler"
    free = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
    try:
        wait_until(run.has_ended, "the run did not end on a full disk")
    finally:
        filler.unlink()


def _set_network(run: DemoRun, state: str) -> None:
    inside = ["nsenter", "-t", str(run.launcher), "-n", "ip", "link", "set", "lo", state]
    subprocess.run(inside, check=True)


def _cut_network(seconds: float, run: DemoRun, chance: random.Random, before: Mark) -> None:
    _set_network(run, "down")
    try:
        time.sleep(seconds)
    finally:
        _set_network(run, "up")


FAULTS: dict[str, Fault] = {
    "kill": Fault(partial(_signal_rank, signal.SIGKILL), "kill -9 of a rank"),
    "kill-first": Fault(_kill_first, "kill -9 of rank 0"),
    "segfault": Fault(partial(_signal_rank, signal.SIGSEGV), "a rank crashes (SIGSEGV)"),
    "abort": Fault(partial(_signal_rank, signal.SIGABRT), "a rank aborts, as NCCL's watchdog does"),
    "kill-agent": Fault(_kill_agent, "kill -9 of torchrun's agent"),
    "kill-launcher": Fault(partial(_signal_launcher, signal.SIGKILL), "kill -9 of shardway train"),
    "node-lost": Fault(_lose_node, "kill -9 of all processes at once"),
    "term": Fault(partial(_signal_rank, signal.SIGTERM), "SIGTERM to a rank"),
    "usr2": Fault(partial(_signal_rank, signal.SIGUSR2), "SIGUSR2 to a rank, as Slurm sends it"),
    "interrupt": Fault(partial(_signal_launcher, signal.SIGINT), "Ctrl-C"),
    "interrupt-twice": Fault(_interrupt_twice, "Ctrl-C twice: no checkpoint"),
    "hangup": Fault(partial(_signal_launcher, signal.SIGHUP), "the terminal is closed"),
    "stop": Fault(_stop_file, "the file RUN/stop"),
    "pause": Fault(_pause_rank, "a rank stands still for 3 s", survives=True),
    "suspend": Fault(_suspend, "the machine stands still for 3 s", survives=True),
    "slow": Fault(_slow, "a rank has a sixth of its CPU for 3 s", survives=True),
    "hang": Fault(_hang, "a rank stands still for ever"),
    "two-launches": Fault(_launch_again, "the run is launched again", survives=True),
    "flipped-bit": Fault(_then_kill(_flip_bit), "a bit of the newest checkpoint flips; kill -9"),
    "truncated": Fault(_then_kill(_truncate), "a file of the newest checkpoint is cut; kill -9"),
    "lost-checkpoint": Fault(
        _then_kill(_lose_checkpoint), "the newest checkpoint is gone; kill -9"
    ),
    "torn-metrics": Fault(_then_kill(_tear_metrics), "metrics.jsonl ends in garbage; kill -9"),
    "killed-save": Fault(_then_kill(_wait_for_save), "kill -9 while a checkpoint is written"),
    "full-disk": Fault(_fill_disk, "the disk is full until the run has ended", needs="disk"),
    "cut-network": Fault(
        partial(_cut_network, PAUSE_SECONDS), "no network for 3 s", survives=True, needs="network"
    ),
    "lost-network": Fault(
        partial(_cut_network, CUT_SECONDS),
        "no network for 30 s, twice as long as ranks wait",
        needs="network",
    ),
}
