"""Run folders that a released version of Shardway wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

from launcher.folders import manifest
from launcher.folders.checkpoint import Checkpoint

RELEASED = Path(__file__).resolve().parents[1] / "released"
RECORDED_IN = "/data/shardway"  # where the runs were recorded


def moved(name: str, folder: Path, tiny: Path) -> Path:
    """A copy of the run in `folder`, with the paths in its files changed to this machine."""
    run = folder / "runs" / name
    shutil.copytree(RELEASED / name, run)
    shutil.copyfile(RELEASED / "rows.jsonl", folder / "rows.jsonl")
    for file in (*run.rglob("*.yaml"), *run.rglob("*.json")):
        text = file.read_text().replace(f"{RECORDED_IN}/cache/models/tiny", str(tiny))
        file.write_text(text.replace(RECORDED_IN, str(folder)))
    checkpoint = Checkpoint(run / "checkpoints/step-000005")
    files = manifest.entries(checkpoint.path, lambda path: path != checkpoint.manifest)
    assert files.keys() == manifest.read(checkpoint.manifest)["files"].keys()
    make_manifest_anew(checkpoint)
    return run


def make_manifest_anew(checkpoint: Checkpoint) -> None:
    """Write the checksums of the files as they are."""
    content = manifest.read(checkpoint.manifest)
    files = manifest.entries(checkpoint.path, lambda path: path != checkpoint.manifest)
    manifest.write(checkpoint.manifest, content, files)
