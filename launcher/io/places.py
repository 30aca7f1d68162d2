"""Where the parts of a model that is trained alone are in the composite that contains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from launcher.io.module_paths import begins


@dataclass(frozen=True)
class Places:
    """Where the parts of a model are in the composite that contains it."""

    inner_class: str  # of the part that is trained alone
    outer_class: str  # of the composite
    prefixes: tuple[tuple[str, str], ...]  # (path in the inner class, path in the outer one)
    others: frozenset[str]  # modules of the outer class that the inner class does not have

    def outer(self, name: str) -> str:
        """The composite's name of a parameter or module of the inner class. A name that is the
        composite's already is returned as it is."""
        if self.is_outer(name):
            return name
        return renamed(name, self.prefixes)

    def inner(self, name: str) -> str:
        """The reverse. A name that is the inner class's already is returned as it is."""
        return renamed(name, tuple((outer, inner) for inner, outer in self.prefixes))

    def is_outer(self, name: str) -> bool:
        """Whether only the composite has the name."""
        moved = [outer for inner, outer in self.prefixes if inner != outer]
        return any(begins(name, path) for path in (*moved, *self.roots))

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """The modules of the composite that the inner class does not have, without those inside
        one of them: a vision tower, a projector."""
        parts = [outer for _, outer in self.prefixes]
        apart = {name for name in self.others if not any(begins(part, name) for part in parts)}
        return tuple(sorted(name for name in apart if name.rpartition(".")[0] not in apart))

    def renaming(self, names: Iterable[str]) -> Callable[[str], str] | None:
        """`outer`, for the `names` of the tensors of a model or an adapter; None if some are the
        composite's already: all are then left as they are."""
        return None if any(map(self.is_outer, names)) else self.outer

    def contains(self, name: str) -> bool:
        """Whether a name of the composite is one of a part that the inner class has."""
        return any(begins(name, outer) for _, outer in self.prefixes)


def renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """`name` with the first path of `pairs` that it begins with replaced."""
    for old, new in pairs:
        if begins(name, old):
            rest = name.removeprefix(old).removeprefix(".")
            return ".".join(filter(None, (new, rest)))
    return name
