"""Compare the installed package versions with those that Shardway is tested with.

Imports none of the packages.
"""

from __future__ import annotations

from importlib import metadata

from launcher.folders import paths

CHECKED_PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "hydra-core",
)


def tested_versions() -> dict[str, str]:
    """Package → version, as pinned in constraints.txt."""
    lines = paths.resource("constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {package: pins[package] for package in CHECKED_PACKAGES}


def installed_versions() -> dict[str, str | None]:
    """Package → installed version, None if it is missing."""
    versions: dict[str, str | None] = {}
    for package in ("shardway", *CHECKED_PACKAGES):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def describe_mismatch() -> str | None:
    """A message if the installed versions are not the tested ones, otherwise None.

    A local build tag (`2.13.0+cpu`, `2.13.0+cu130`) counts as the same version.
    """
    installed = installed_versions()
    differing = [
        f"{package} {installed[package] or 'missing'} (tested: {version})"
        for package, version in tested_versions().items()
        if (installed[package] or "").split("+")[0] != version
    ]
    if not differing:
        return None
    return (
        f"Installed versions differ from the tested ones: {', '.join(differing)}. "
        "To match: pip install -c constraints.txt shardway"
    )
