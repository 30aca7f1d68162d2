"""The plot of the loss."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.tracking.plot import draw_loss
from tests.helpers.tracking import record


def test_the_plot_is_an_image(tmp_path: Path) -> None:
    lines = [json.dumps(record(step)) for step in range(1, 9)]
    lines.append(json.dumps({"step": 8, "eval_loss": 2.0}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
