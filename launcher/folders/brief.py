"""Short text for values of files that are not trusted.

`repr` writes a value once for each of its occurrences: forty nested pairs of one tuple are 2**40
texts. Imports no torch.
"""

from __future__ import annotations

import reprlib
from typing import Any

LENGTH = 80
_repr = reprlib.Repr()
_repr.maxlevel = 3
_repr.maxstring = _repr.maxother = _repr.maxlong = LENGTH


def brief(value: Any) -> str:
    """At most `LENGTH` characters that show `value`, in bounded time."""
    return _repr.repr(value)[:LENGTH]
