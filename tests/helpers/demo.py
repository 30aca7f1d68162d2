"""Questions for a model that was fine-tuned on the bundled rows."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.chat.model import ChatModel
from launcher.chat.options import Options
from launcher.chat.target import find_target
from launcher.folders import paths


def wrong_answers(export: Path) -> list[str]:
    """Held-out questions that a fine-tuned SmolLM2 does not answer as it should."""
    talk = ChatModel(find_target(export))
    lines = paths.bundled("demo/held_out.jsonl").read_text().splitlines()
    assert any("capital of France" in line for line in lines)
    wrong = []
    for row in map(json.loads, lines):
        asked = [{"role": "user", "content": row["question"]}]
        answer = talk.answer(asked, Options(max_new_tokens=48))
        if not all(part.lower() in answer.lower() for part in row["expect"]):
            wrong.append(f"{row['question']} → {answer} (expected {row['expect']})")
    return wrong
