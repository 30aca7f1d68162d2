"""Which settings a resumed run may change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from launcher.config import store
from launcher.run.resume import compare_configs
from tests.helpers.parts import Case


def test_new_tokens_are_part_of_the_tensors_and_older_runs_have_none(tmp_path: Path) -> None:
    config = Case(tmp_path, tmp_path).config()
    before = yaml.safe_load(store.dump(config))
    del before["model"]["add_tokens"]  # as a run before this setting was frozen
    frozen = tmp_path / "config.yaml"
    frozen.write_text(yaml.safe_dump(before))
    same = compare_configs(frozen, config)
    assert (same.allowed, same.breaking, same.incompatible) == ([], [], [])
    other = replace(config, model=replace(config.model, add_tokens=["<a>"]))
    assert compare_configs(frozen, other).incompatible == ["model.add_tokens: [] → ['<a>']"]
