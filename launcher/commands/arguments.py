"""What several verbs share on the command line: the parser, sizes, and the path of a picture."""

from __future__ import annotations

import argparse
import math
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

from launcher.errors import UserError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def command_parser(
    verb: str, about: str | None, usage: str | None = None
) -> argparse.ArgumentParser:
    """The parser of `shardway VERB`. --help prints `about` without reformatting it.

    `usage` is given for a verb that passes words on.
    """
    parser = argparse.ArgumentParser(
        prog=f"shardway {verb}",
        usage=usage,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=usage is None,  # words that are passed on may look like the start of an option
    )
    # -1GB is the value of an option, as -1 is, and is refused as such.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    return parser


def number(
    kind: type[int] | type[float], minimum: float, maximum: float = math.inf
) -> Callable[[str], float]:
    """The `type` of an option: a number of this kind within these bounds, which are allowed."""
    name = "a whole number" if kind is int else "a number"
    bounds = f"of at least {minimum:g}" if maximum == math.inf else f"{minimum:g} to {maximum:g}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (minimum <= value <= maximum and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not {name} {bounds}")
        return value

    return parse


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Bytes: `5GB` is 5·10⁹, `5GiB` is 5·2³⁰, in letters of either case and of any width. Raises
    UserError, which names `option`, for anything else: a number without a unit could be bytes or
    gigabytes."""
    plain = unicodedata.normalize("NFKC", text).strip()
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", plain)
    number, unit = (match[1], match[2].upper()) if match else ("", "")
    if match and not unit and float(number) > 0:
        raise UserError(f"{option} {number} has no unit → {number}GB? For bytes, {number}B")
    if unit in UNITS and float(number) > 0:
        if (size := int(Decimal(number) * UNITS[unit])) < 1:
            raise UserError(f"{option} {text} is less than a byte → 5GB, 500MB or 5GiB")
        return size
    way_out = "5GB, 500MB or 5GiB"
    if re.fullmatch(r"[0-9]+,[0-9]+ *[A-Za-z]+", plain):
        way_out = f"{plain.replace(',', '.')}, with a point, or {plain.replace(',', '')}"
    elif unit and f"{unit[0]}B" in UNITS and unit in {unit[0], f"{unit[0]}BS", f"{unit[0]}I"}:
        way_out = f"{number}{unit[0]}B or {number}{unit[0]}iB"
    raise UserError(f"{option} {text} is not a size → {way_out}")


def picture_path(output: Path | None, name: str, overwrite: bool) -> Path:
    """Where to write a picture: `output`, or `name` in the working directory, with a number
    appended if that exists.

    Raises UserError if `output` exists (unless `overwrite`), has another suffix than
    PICTURE_SUFFIXES, or if its folder does not exist.
    """
    default = Path(name)
    if output is None:
        numbered = (default.with_stem(f"{default.stem}-{number}") for number in range(2, 1000))
        return next(path for path in (default, *numbered) if not path.exists())
    if output.suffix not in PICTURE_SUFFIXES:
        raise UserError(f"--output {output} is not a picture → a name in .png, .svg or .pdf")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists → another --output, or --overwrite")
    if not output.parent.is_dir():
        raise UserError(
            f"the folder of --output {output} does not exist → create it, or choose another"
        )
    return output
