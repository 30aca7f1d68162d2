"""This machine: start torchrun, wait, and say what went wrong first."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import psutil

from launcher.cluster import command
from launcher.run_dir import RunDir

TAKEN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Failure:
    rank: int
    exit_code: int
    message: str


def launch(run: RunDir, nproc_per_node: int, gpus: int) -> int:
    """Run all ranks to their end and return the exit status of the attempt.

    The console belongs to rank 0 (stdout); what the agent and the libraries say goes to the logs.
    The first signal asks the ranks to stop with a checkpoint, the second ends them.
    """
    signals: list[int] = []
    agent: subprocess.Popen[bytes] | None = None

    def take(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) == 1:
            run.stop.write_text(signal.Signals(number).name)
            print("\nstopping at the next step boundary, with a checkpoint; again: at once")
        elif agent is not None:
            _end_at_once(agent)

    # What is ignored stays ignored: `nohup` means it.
    before = {
        number: signal.signal(number, take)
        for number in TAKEN
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    with (run.logs / "torchrun.log").open("wb") as log:
        agent = subprocess.Popen(
            command.torchrun(run.path, run.attempt, nproc_per_node),
            stdin=subprocess.DEVNULL,
            stderr=log,
            env=command.environment(nproc_per_node, gpus),
            start_new_session=True,  # Ctrl-C in a terminal reaches this process alone
        )
        if len(signals) > 1:
            _end_at_once(agent)
        status = agent.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if status == 0 and run.status.is_file():
        return int(json.loads(run.status.read_text())["exit_code"])
    run.stop.unlink(missing_ok=True)
    if len(signals) > 1:
        print(f"\nended by {signal.Signals(signals[1]).name}; every rank has ended. {run.path}")
        return 128 + signals[1]
    failure = first_failure(run)
    print(report(run, failure))
    return failure.exit_code if failure else status or 1


def _end_at_once(agent: subprocess.Popen[bytes]) -> None:
    """Kill the agent and its ranks.

    The kernel ends a rank with its agent only once the rank has asked for it (rank_log): one that
    was just started would outlive it. A stopped agent starts no more.
    """
    agent.send_signal(signal.SIGSTOP)
    try:
        ranks = psutil.Process(agent.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        ranks = []
    agent.kill()
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.kill()


def first_failure(run: RunDir) -> Failure | None:
    """The rank that failed first: from the ranks' own files, else from the agent's summary."""
    own = [json.loads(path.read_text()) for path in run.logs.glob("rank-*.error.json")]
    killed = _killed_rank(run)
    if own:
        first = min(own, key=lambda error: error["time"])
        # A rank that was killed wrote no file; its peers then fail for want of it.
        if killed is None or not first["lost_peer"]:
            return Failure(first["rank"], first["exit_code"], first["message"])
    return killed


def lost_a_node(run: RunDir, ranks: int) -> bool:
    """Whether ranks failed only because others went away that left no word: their machine did."""
    own = [json.loads(path.read_text()) for path in run.logs.glob("rank-*.error.json")]
    lost = bool(own) and len(own) < ranks and all(error["lost_peer"] for error in own)
    return lost and _killed_rank(run) is None


def _killed_rank(run: RunDir) -> Failure | None:
    """A rank that a signal ended, by torchrun's summary (SIGTERM is its own, for the others)."""
    logs = sorted(run.logs.glob("torchrun*.log"))
    summary = "\n".join(log.read_text(errors="replace") for log in logs)
    pattern = r"rank\s*: (\d+) .*\n\s*exitcode\s*: -(\d+)"
    killed = re.findall(pattern, summary)
    # A SIGTERM that came first was not the agent's.
    root = re.findall(pattern, summary.rpartition("Root Cause")[2])
    for rank, code in killed:
        number = int(code)
        if number != signal.SIGTERM or (rank, code) in root:
            hint = "; often the machine ran out of memory" if number == signal.SIGKILL else ""
            message = f"ended by signal {signal.Signals(number).name}{hint}"
            return Failure(int(rank), 128 + number, message)
    return None


def report(run: RunDir, failure: Failure | None) -> str:
    """What went wrong first, in a sentence, and where to read on."""
    if failure is None:
        return f"The ranks ended without a word. Logs: {run.logs / 'torchrun*.log'}"
    return f"rank {failure.rank} failed: {failure.message}\nLog: {run.rank_log(failure.rank)}"
