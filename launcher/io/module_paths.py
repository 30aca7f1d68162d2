"""Dotted paths of modules and parameters."""

from __future__ import annotations


def begins(path: str, name: str) -> bool:
    """Whether `path` is `name` or inside it; every path is inside ""."""
    return not name or path == name or path.startswith(f"{name}.")


def ends_in(path: str, name: str) -> bool:
    """Whether `name` is the path, or the end of it: "v.proj" of "layers.0.v.proj"."""
    return path == name or path.endswith(f".{name}")
