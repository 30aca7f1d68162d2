"""The versions that Shardway is tested with, against those installed. Imports none of them."""

from __future__ import annotations

from importlib import metadata

from launcher import paths

CHECKED = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "hydra-core",
)


def tested() -> dict[str, str]:
    """Package → version, as pinned in constraints.txt."""
    lines = paths.beside("constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {package: pins[package] for package in CHECKED}


def installed() -> dict[str, str | None]:
    """Package → installed version, None where it is missing."""
    found: dict[str, str | None] = {}
    for package in ("shardway", *CHECKED):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def difference() -> str | None:
    """One sentence when what is installed is not what was tested, else None.

    A local build tag (`2.13.0+cpu`, `2.13.0+cu130`) is the same version.
    """
    have = installed()
    apart = [
        f"{package} {have[package] or 'missing'} (tested: {version})"
        for package, version in tested().items()
        if (have[package] or "").split("+")[0] != version
    ]
    if not apart:
        return None
    return (
        f"Installed versions differ from the tested ones: {', '.join(apart)}. "
        "To match: pip install -c constraints.txt shardway"
    )
