"""Translations of the page: its English texts are in the code, the Chinese ones in chinese.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

import yaml

from launcher.folders import paths


@dataclass(frozen=True)
class Translations:
    """The texts of the page in one language. Call it with an English text to translate it."""

    other_path: str  # path of the page in the other language
    other_name: str
    table: dict[str, str] = field(default_factory=dict)  # English text → translation

    def __call__(self, text: str) -> str:
        """`text` in this language; unchanged if the table does not contain it."""
        return self.table.get(text, text)


ENGLISH = Translations("/zh/", "中文")


def chinese() -> Translations:
    """The Chinese texts, read from chinese.yaml."""
    table = yaml.safe_load(paths.bundled("ui/chinese.yaml").read_text(encoding="utf-8"))
    return Translations("/", "English", table)
