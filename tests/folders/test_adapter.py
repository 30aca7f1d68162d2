"""Settings of an adapter that no honest adapter has are refused before anything is merged."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UserError
from launcher.folders.adapter import MAX_PATTERN, read_settings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", 1e308),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "16"),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("rank_pattern", {"x" * (MAX_PATTERN + 1): 4}),
        ("rank_pattern", {"q_proj": 0}),
    ],
)
def test_a_setting_beyond_all_bounds_is_named(tmp_path: Path, key: str, value: Any) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, key: value}))
    started = time.process_time()
    with pytest.raises(UserError, match=rf"adapter_config\.json is damaged: {key} is"):
        read_settings(file)
    assert time.process_time() - started < 1


def test_an_honest_adapter_is_read(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.5, "alpha_pattern": {"q_proj": 1}}
    file.write_text(json.dumps(said))
    assert read_settings(file) == said
