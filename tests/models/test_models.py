"""Every causal model type of transformers lands: trained, resumed, exported and loaded again, or
refused before training, as docs/models.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.model_table import in_page, row_of
from tests.helpers.tiny_models import model_types

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# One of each kind: sinks, soft caps, experts, latent attention, a shared block, Mamba, both in
# parallel, short convolutions, alibi, a composite, an encoder-decoder.
DOZEN = (
    "gpt_oss", "gemma2", "qwen3_moe", "deepseek_v3", "zamba2", "mamba2", "falcon_h1", "lfm2",
    "bloom", "gemma3", "gpt2", "bart",
)  # fmt: skip
ALL = [
    pytest.param(name, marks=[] if name in DOZEN else pytest.mark.whole) for name in model_types()
]


@pytest.mark.parametrize("model_type", ALL)
def test_a_model_type_lands_or_is_refused(
    model_type: str, ranks: Any, rows_file: Path, tmp_path: Path
) -> None:
    row = row_of(model_type, ranks, rows_file, tmp_path / "work")
    assert not row.is_lost, row
    assert in_page(row) in PAGE.read_text().splitlines()
