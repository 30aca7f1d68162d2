"""Writing a checkpoint: aside, manifest last, then one rename by one process."""

from __future__ import annotations

from pathlib import Path

from launcher import manifest
from launcher.checkpoint import layout
from launcher.config.model import ModelConfig
from launcher.method.base import Method
from launcher.strategy import Strategy


def save_checkpoint(
    strategy: Strategy,
    method: Method,
    model: ModelConfig,
    checkpoints: Path,
    step: int,
    is_main: bool,
) -> None:
    """Write `checkpoints/step-N`. Collective; all ranks return when it stands.

    A method with an adapter gathers its trained parameters to rank 0; else every rank writes its
    shards of the whole model.
    """
    final = checkpoints / layout.folder_name(step)
    aside = checkpoints / f".{final.name}.partial"
    if is_main:
        if final.exists():
            raise FileExistsError(f"{final} exists; a checkpoint is never written over")
        aside.mkdir()
    strategy.barrier()
    if method.adapter:
        trained = strategy.gather_trained()
        if trained is not None:
            method.write(strategy.model, trained, aside / layout.ADAPTER)
    else:
        strategy.save_model(aside / layout.MODEL)
    strategy.barrier()
    if is_main:
        base = {"name_or_path": model.name_or_path, "revision": model.revision}
        manifest.write(aside / layout.MANIFEST, {"step": step, "base": base})
        aside.rename(final)
    strategy.barrier()
