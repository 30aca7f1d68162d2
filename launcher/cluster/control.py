"""Stop and resume runs, on this machine and in Slurm's queue. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from launcher.cluster import launch, liveness, preflight, settle, slurm_queue
from launcher.config import store
from launcher.errors import UserError
from launcher.folders import regular
from launcher.folders.checkpoint import describe_skipped, finished_checkpoints
from launcher.folders.json_file import DamagedFile
from launcher.folders.run import RunDir
from launcher.run import processes, started_by, status, sweep
from launcher.run.outcome import command_again


def request_stop(path: Path) -> Iterator[str]:
    """Ask the run at `path`, or all runs of the sweep there, to stop. Yields a message for each.

    Raises UserError if none of them is running.
    """
    runs = sweep.list_runs(path) if sweep.is_sweep(path) else [status.find_run(path)]
    run_of_job = {job: run for run in runs if (job := status.known_job_id(run))}
    queue = slurm_queue.query_queue(list(run_of_job))
    alive = {run_of_job[job] for job in queue}
    alive |= {run for run in runs if processes.living(run.newest_attempt())}
    failed = [why for run in alive if (why := _write_request(run))]
    waiting = [job for job, queued in queue.items() if queued.state == "PENDING"]
    for job in waiting:  # first: otherwise one of them starts when another run has ended
        slurm_queue.cancel_waiting(job)
        yield f"job {job} was removed from the queue"
    for run in alive - {run_of_job[job] for job in waiting}:
        yield (
            f"{run.path} will stop with a checkpoint at its next step: "
            f"shardway logs {run.path} --follow"
        )
    if failed:
        raise UserError("\n".join(failed))
    if not alive:
        reason = (
            "none of its runs is"
            if len(runs) > 1
            else f"its state is {status.run_state(runs[0], None)}"
        )
        raise UserError(f"{path} is not running: {reason}")


def _write_request(run: RunDir) -> str | None:
    """Why it cannot be written, None if it is. A run that starts at this moment reads it too."""
    try:
        regular.write_text(run.stop, "shardway stop")
    except OSError as error:
        return f"{run.stop} cannot be written: {error.strerror} → remove it, or press Ctrl-C"
    return None


def resume_run(path: Path) -> int:
    """Resume the run at `path` from its newest checkpoint, on the cluster where it ran before.
    Returns its exit status.

    Raises UserError if it is running, waits in a queue, or has no checkpoint.
    """
    run = status.find_run(path)
    if started_by.is_rank():
        raise UserError(
            "shardway resume starts the ranks itself → shardway resume without torchrun, or "
            f"{command_again(run, 'torchrun … -m launcher.train')}"
        )
    liveness.refuse_if_alive(run)
    finished = finished_checkpoints(run.checkpoints)
    if not finished:
        reasons = "; ".join(describe_skipped(run.checkpoints)) or (
            f"start it again: {command_again(run)}"
        )
        raise UserError(f"{run.path} has no finished checkpoint; {reasons}")
    try:
        config = store.load(run.config)
    except DamagedFile as error:
        raise UserError(f"{error} → copy that of a checkpoint: {finished[0].config}") from error
    training = dataclasses.replace(config.training, stop_after_steps=None)
    config = dataclasses.replace(config, resume="auto", run_dir=str(run.path), training=training)
    choice = settle.settle(config)  # of an attempt that has ended before its ranks chose
    return launch.launch(choice, preflight.check(choice.config))
