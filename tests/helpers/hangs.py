"""Ranks that stop to move, in real processes: a function of theirs is replaced."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CUSTOMIZE = """\
import os, sys
if "launcher.worker" in " ".join(sys.orig_argv) and os.environ.get("RANK") in {ranks!r}:
    from tests.helpers.hangs import replace
    replace({module!r}, {name!r}, {action!r})
"""


def sleep() -> None:
    time.sleep(100_000)


def spin() -> None:
    while True:
        pass


def read_fifo() -> None:
    """Read a file that gives nothing, as one on a lost file system does."""
    Path(os.environ["HANG_FIFO"]).read_bytes()


def work() -> None:
    """Compute for longer than the limit of a step, and go on."""
    end = time.monotonic() + 9
    while time.monotonic() < end:
        pass


def replace(module: str, name: str, action: str) -> None:
    """Call `action` in the function `module`.`name` (CLASS.METHOD) when a file allows it.

    The module is not imported before its rank does.
    """

    def wait() -> None:
        while getattr(sys.modules.get(module), name.partition(".")[0], None) is None:
            time.sleep(0.002)
        owner: Any = importlib.import_module(module)
        *classes, function = name.split(".")
        for each in classes:
            owner = getattr(owner, each)
        before: Callable[..., Any] = getattr(owner, function)

        def hanging(*arguments: Any, **named: Any) -> Any:
            if Path(os.environ["HANG_NOW"]).exists():
                globals()[action]()
            return before(*arguments, **named)

        setattr(owner, function, hanging)

    threading.Thread(target=wait, daemon=True).start()


def plan_hang(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    action: Callable[[], None],
    ranks: tuple[str, ...] = ("1",),
) -> Path:
    """Have `ranks` of a run that is started later call `action` in `function` ("MODULE:NAME"), once
    the file exists that is returned."""
    module, _, name = function.partition(":")
    text = CUSTOMIZE.format(ranks=ranks, module=module, name=name, action=action.__name__)
    (folder / "sitecustomize.py").write_text(text)
    now = folder / "hang-now"
    monkeypatch.setenv("HANG_NOW", str(now))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{Path(__file__).parents[2]}")
    return now
