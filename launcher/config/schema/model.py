"""Schema of `model=`: the weights to start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.config.schema.setting import setting


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A model folder or hub id, and how to load it."""

    name: str = setting("model", "name of the model, used in the name of the run folder")
    name_or_path: str = setting(help="a folder with config.json and safetensors, or a hub id")
    revision: str | None = setting(None, "branch, tag or commit of a hub id")
    add_tokens: list[str] = setting(
        [], "new tokens: the vocabulary gets a row for each, which every method trains"
    )
    attention: str = setting(
        "sdpa",
        "attention implementation of transformers; flash_attention_2 needs a GPU and flash-attn. "
        "sdpa becomes eager where a class has no sdpa; the log says so",
        choices=("sdpa", "eager", "flash_attention_2"),
    )
    trust_remote_code: bool = setting(False, "run Python code from the model folder")

    def origin(self) -> dict[str, Any]:
        """The model as checkpoints record it, to open it again."""
        origin: dict[str, Any] = {"name_or_path": self.name_or_path, "revision": self.revision}
        return origin | ({"add_tokens": list(self.add_tokens)} if self.add_tokens else {})
