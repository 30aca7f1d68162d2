"""Run torchrun on this machine: start it, wait for it, and report the first failure."""

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
from launcher.folders.run import RunDir
from launcher.run.rank_log import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Failure:
    """Why a rank failed."""

    rank: int
    exit_code: int
    message: str


def launch(run: RunDir, nproc_per_node: int, gpus: int) -> int:
    """Run all ranks until they end. Returns the exit status of the attempt.

    Rank 0 prints to this process's stdout; the output of the agent and of libraries goes to logs.
    The first signal asks the ranks to stop with a checkpoint, the second ends them at once.
    """
    received: list[int] = []
    agent: subprocess.Popen[bytes] | None = None

    def handle_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            run.stop.write_text(signal.Signals(number).name)
            say(run, "\nstopping with a checkpoint at the next step; signal again to end at once")
        elif agent is not None:
            _kill_all(agent)

    # An ignored signal stays ignored, as `nohup` requires.
    previous = {
        number: signal.signal(number, handle_signal)
        for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    with (run.logs / "torchrun.log").open("wb") as log:
        agent = subprocess.Popen(
            command.torchrun_command(run.path, run.attempt, nproc_per_node),
            stdin=subprocess.DEVNULL,
            stderr=log,
            env=command.rank_environment(nproc_per_node, gpus),
            start_new_session=True,  # Ctrl-C in a terminal reaches only this process
        )
        if len(received) > 1:
            _kill_all(agent)
        status = agent.wait()
    for number, handler in previous.items():
        signal.signal(number, handler)
    if status == 0 and run.status.is_file():
        return int(json.loads(run.status.read_text())["exit_code"])
    run.stop.unlink(missing_ok=True)
    if len(received) > 1:
        name = signal.Signals(received[1]).name
        say(run, f"\nended by {name}; all ranks have ended: {run.path}")
        return 128 + received[1]
    failure = first_failure(run)
    say(run, describe_failure(run, failure))
    return failure.exit_code if failure else status or 1


def _kill_all(agent: subprocess.Popen[bytes]) -> None:
    """Kill the agent and its ranks.

    The kernel kills a rank with its agent only once the rank has asked for it (rank_log): a rank
    that has just started would survive. The agent is paused first, so that it starts no more ranks.
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
    """The rank that failed first, from the ranks' own reports or from the agent's summary."""
    reports = [json.loads(path.read_text()) for path in run.logs.glob("rank-*.error.json")]
    killed = _killed_rank(run)
    if reports:
        first = min(reports, key=lambda report: report["time"])
        # A killed rank writes no report; the other ranks then fail because they have lost it.
        if killed is None or not first["lost_peer"]:
            return Failure(first["rank"], first["exit_code"], first["message"])
    return killed


def lost_a_node(run: RunDir, world_size: int) -> bool:
    """Whether a machine was lost: some ranks left no report, and all others failed only because
    they had lost a rank."""
    reports = [json.loads(path.read_text()) for path in run.logs.glob("rank-*.error.json")]
    only_lost_peers = all(report["lost_peer"] for report in reports)
    return 0 < len(reports) < world_size and only_lost_peers and _killed_rank(run) is None


def _killed_rank(run: RunDir) -> Failure | None:
    """A rank that a signal ended, according to torchrun's summary. The agent itself ends the other
    ranks with SIGTERM, so that signal counts only for the root cause."""
    logs = sorted(run.logs.glob("torchrun*.log"))
    summary = "\n".join(log.read_text(errors="replace") for log in logs)
    pattern = r"rank\s*: (\d+) .*\n\s*exitcode\s*: -(\d+)"
    killed = re.findall(pattern, summary)
    root_cause = re.findall(pattern, summary.rpartition("Root Cause")[2])
    for rank, code in killed:
        number = int(code)
        if number != signal.SIGTERM or (rank, code) in root_cause:
            hint = "; often the machine ran out of memory" if number == signal.SIGKILL else ""
            message = f"ended by signal {signal.Signals(number).name}{hint}"
            return Failure(int(rank), 128 + number, message)
    return None


def describe_failure(run: RunDir, failure: Failure | None) -> str:
    """The message of the first failure, and the log with more details."""
    if failure is None:
        return f"The ranks ended without an error message. Logs: {run.logs / 'torchrun*.log'}"
    return f"rank {failure.rank} failed: {failure.message}\nLog: {run.rank_log(failure.rank)}"
