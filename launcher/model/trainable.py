"""Which models that have a causal class cannot be trained with it, from their config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.errors import UserError


def refuse_untrainable(architecture: Any, folder: Path) -> None:
    """Raises UserError if the config of `folder` describes no causal language model."""
    where = f"model.name_or_path={folder}"
    if any(name.startswith("audio_encoder") for name in architecture.sub_configs):
        raise UserError(
            f"{where}: {architecture.model_type} generates audio, whose targets are not tokens of "
            "text → a causal language model"
        )
    if vars(architecture).get("is_decoder") is False:
        raise UserError(
            f"{where}: {architecture.model_type} with is_decoder=false reads both sides of a token,"
            f" so it would copy its targets → is_decoder=true in {folder}/config.json, or a causal "
            "language model"
        )
