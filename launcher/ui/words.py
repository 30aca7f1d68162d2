"""The words of the page: English, as they stand in the code, or another language by a table."""

from __future__ import annotations

from dataclasses import dataclass, field

import yaml

from launcher import paths


@dataclass(frozen=True)
class Words:
    other: str  # the address of the page in the other language
    other_name: str
    table: dict[str, str] = field(default_factory=dict)

    def __call__(self, text: str) -> str:
        """`text` in this language; as it stands where there is no other word."""
        return self.table[text] if text in self.table else text


ENGLISH = Words("/zh/", "中文")


def chinese() -> Words:
    table = yaml.safe_load(paths.bundled("ui/chinese.yaml").read_text(encoding="utf-8"))
    return Words("/", "English", table)
