"""Run a command of Slurm, free of a surrounding job's environment. Imports no torch."""

from __future__ import annotations

import os
import shlex
import subprocess

from launcher.errors import UserError

# Where Slurm is, and who asks.
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
# SLURM_*: of the job in which this process runs. Slurm overwrites only some of them in a new job.
# The others are defaults of filters and of questions: the answers here are parsed.
OF_THIS_PROCESS = ("SLURM_", "SQUEUE_", "SCANCEL_", "SCONTROL_")
# Defaults of sbatch in place of what slurm/train.sbatch says: each would override it.
OF_THE_SCRIPT = (
    *("SBATCH_ARRAY_INX", "SBATCH_BATCH", "SBATCH_ERROR", "SBATCH_EXPORT", "SBATCH_INPUT"),
    *("SBATCH_NO_REQUEUE", "SBATCH_OPEN_MODE", "SBATCH_OUTPUT", "SBATCH_REQUEUE", "SBATCH_SIGNAL"),
    *("SBATCH_GET_USER_ENV", "SBATCH_WAIT"),
)


def run_slurm(
    command: list[str],
    allowed_error: str | None = None,
    seconds: float | None = None,
    variables: dict[str, str] | None = None,
) -> str:
    """Run a command of Slurm and return its output, or "" if it fails with `allowed_error` in its
    message. `variables` are added to its environment.

    Raises UserError with Slurm's reason, or if it takes more than `seconds`.
    """
    environment = {**clean_environment(), **(variables or {})}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"Slurm has not answered within {seconds:.0f} s: {shlex.join(command)}"
        ) from error
    except FileNotFoundError as error:
        raise UserError(
            f"cluster=slurm: there is no {command[0]} on this machine; use a login node, or "
            "cluster=local"
        ) from error
    if result.returncode != 0 and allowed_error and allowed_error in result.stderr:
        return ""
    if result.returncode != 0:
        status = f"exit status {result.returncode}"
        reason = result.stderr.strip() or result.stdout.strip() or status
        raise UserError(f"Slurm refused the command: {reason}\n{shlex.join(command)}")
    return result.stdout


def clean_environment() -> dict[str, str]:
    """The environment of this process for a command of Slurm."""
    return {
        key: value
        for key, value in os.environ.items()
        if key in KEPT or not (key.startswith(OF_THIS_PROCESS) or key in OF_THE_SCRIPT)
    }
