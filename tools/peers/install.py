"""The environments of the peers, each in its own subfolder of the folder that the user names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from launcher.errors import UserError
from launcher.folders import paths

TRL, FACTORY = "trl==1.16.0", "llamafactory==0.9.5"
# The first is installed with the same versions of torch, transformers and PEFT as Shardway. The
# requirements of the second do not work together without the three pins.
REQUIREMENTS = {
    "hf": ("torch", "transformers", "peft", "accelerate", TRL, "datasets"),
    "llamafactory": (FACTORY, "torch==2.11.0", "torchaudio==2.11.0", "torchvision==0.26.0"),
}
SHOWN = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory")


def install(folder: Path) -> None:
    """Create both environments in `folder`. This takes minutes and several GB."""
    for name, requirements in REQUIREMENTS.items():
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        pip = [str(folder / name / "bin" / "python"), "-m", "pip", "install", *requirements]
        if name == "hf":
            pip += ["--constraint", str(paths.resource("constraints.txt"))]
        subprocess.run(pip, check=True)


def python(folder: Path, system: str) -> Path:
    """The interpreter in which `system` is installed. Raises UserError if there is none."""
    name = "hf" if system == "trl" else system
    path = folder / name / "bin" / "python"
    if not path.exists():
        raise UserError(
            f"--peers {folder} has no {name}/bin/python; "
            f"run: python tools/bench_peers.py install {folder}"
        )
    return path.absolute()  # not resolved: a link into an environment is that environment


def versions(interpreter: Path) -> dict[str, str]:
    """The versions of the relevant packages in an environment."""
    script = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    asked = subprocess.run(
        [interpreter, "-c", script, *SHOWN], check=True, capture_output=True, text=True
    )
    return dict(json.loads(asked.stdout))
