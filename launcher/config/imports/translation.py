"""What an imported file becomes: a verb with its words, and every key accounted for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.config.overrides import format_value

ABSENT: Any = object()


@dataclass
class Translation:
    """A command. Each key of the file is in its words, in `notes`, in `ignored` or in `refused`."""

    verb: str = "train"
    words: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)  # key=value → what is different here
    ignored: dict[str, str] = field(default_factory=dict)  # key=value → why nothing is lost
    refused: dict[str, str] = field(default_factory=dict)  # key=value → why, and the way out


class Reader:
    """Takes the keys of a file one after the other; `finish` accounts for what nobody has taken."""

    def __init__(self, settings: Mapping[str, Any], peer: str) -> None:
        self.settings = dict(settings)
        self.peer = peer
        self.known: set[str] = set()
        self.result = Translation()

    def take(self, key: str, default: Any = None) -> Any:
        """The value of `key`; `default` is what the peer assumes where the file has none."""
        self.known.add(key)
        value = self.settings.get(key)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        """A number, also where YAML reads a text, as for `1e-4`. Another value is refused."""
        value = self.take(key, default)
        try:
            return float(value)
        except (TypeError, ValueError):
            self.refuse(key, "is not a number")
            return default

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping, empty without one. Another value is refused."""
        value = self.take(key, {})
        if isinstance(value, Mapping):
            return {str(name): each for name, each in value.items()}
        self.refuse(key, "is not a mapping")
        return {}

    def has(self, key: str) -> bool:
        self.known.add(key)
        return self.settings.get(key) is not None

    def set(self, setting: str, value: Any) -> None:
        """Add an override of Shardway."""
        self.result.words.append(f"{setting}={format_value(value)}")

    def add(self, *words: str) -> None:
        self.result.words.extend(words)

    def note(self, key: str, text: str) -> None:
        self.result.notes[self._stated(key)] = text

    def refuse(self, key: str, text: str) -> None:
        self.result.refused[self._stated(key)] = text

    def translate(self, names: Mapping[str, str]) -> None:
        """Keys that only have another name here: the peer's key → the setting, where it is set."""
        for key, setting in names.items():
            if self.has(key):
                self.set(setting, self.settings[key])

    def finish(self, ignored: Mapping[str, str], unused: Mapping[str, str]) -> Translation:
        """Account for the keys that were not taken.

        Args:
            ignored: keys without an effect on the result here, and why.
            unused: keys that have no equivalent, with the reason; a value that turns one off is no
                loss.
        """
        for key, value in self.settings.items():
            if key in self.known or value is None:
                continue
            if key in ignored:
                self.result.ignored[self._stated(key)] = ignored[key]
            elif key not in unused:
                self.refuse(key, f"is not a key of {self.peer}{nearest(key, (*ignored, *unused))}")
            elif not is_off(value):
                self.refuse(key, unused[key])
        self.known |= {*ignored, *unused}
        return self.result

    def _stated(self, key: str) -> str:
        value = self.settings.get(key)
        if value is None:
            return key
        hidden = "token" in key or "api_key" in key or "secret" in key
        return f"{key}: {'•••' if hidden and value else value}"


def is_off(value: Any) -> bool:
    """Whether a value means that its key is not used."""
    return value in (None, False, 0, "", [], {}) or str(value).lower() in ("false", "none", "no")


def as_list(value: Any) -> list[str]:
    """Names of a YAML list or of a text with commas."""
    parts = value if isinstance(value, list) else str(value or "").split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def nearest(key: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(names), n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""
