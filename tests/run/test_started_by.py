"""A rank of torchrun is told from what inherited its variables, on real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import PATIENCE_SECONDS

PROBE = "from launcher.run import started_by; print(started_by.why_no_rank(), flush=True)"
NOTEBOOK = (
    "import torch, subprocess, sys; "
    "subprocess.run([sys.executable, *sys.argv[1:]], start_new_session=True)"
)
SCRIPT = f"""
probe() {{ "$@" "{sys.executable}" -c "{PROBE}"; }}
probe
probe env
probe setsid --wait
"{sys.executable}" -c "{NOTEBOOK}" -c "{PROBE}"
echo '"{sys.executable}" -c "{PROBE}"' | bash --norc
probe env -u RANK
"""


@pytest.mark.slow
def test_only_what_torchrun_starts_is_a_rank(tmp_path: Path) -> None:
    (script := tmp_path / "wrapper.sh").write_text(SCRIPT)
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    done = subprocess.run(
        [*agent, "--no-python", "bash", str(script)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:2] == ["None", "None"], "by a script of the rank, and by a program in it"
    assert all("which started this session, is not torchrun" in each for each in said[2:4]), said
    assert "in which this was typed, is a shell that torchrun started" in said[4]
    assert said[5:] == ["not RANK"]
