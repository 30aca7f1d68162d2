"""The words of the page in English, which is how they stand in the code, and in Chinese."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Words:
    other: str  # the address of the page in the other language
    other_name: str
    table: dict[str, str] = field(default_factory=dict)

    def __call__(self, text: str) -> str:
        """`text` in this language; as it stands where there is no other word."""
        return self.table.get(text, text)


ENGLISH = Words("/zh", "中文")
CHINESE = Words("/", "English", {})
