"""Rows of CSV, separated by commas, semicolons or tabs. Imports no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.data.files.text_files import open_text, own_suffix
from launcher.errors import UserError

MAX_FIELD_CHARACTERS = 1 << 30
SEPARATORS = (",", ";", "\t")  # the first one that fits is used
COMPARED_ROWS = 100  # rows at the start that must have as many fields as the header


def read_csv(path: Path, encoding: str) -> Iterator[tuple[str, Any]]:
    """Each row by the column names of the first line; a UserError for a row that has another number
    of fields."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    separator = "\t" if own_suffix(path) == ".tsv" else _find_separator(path, encoding)
    with open_text(path, encoding, newline="") as file:
        reader = csv.DictReader(file, strict=True, delimiter=separator)
        try:
            for row in reader:
                location = f"{path}:{reader.line_num}"
                uneven = None in row or None in row.values()
                message = f"{location} does not have as many fields as the first line has names"
                yield location, UserError(message) if uneven else row
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num} is not CSV: {error}") from error


def _find_separator(path: Path, encoding: str) -> str:
    """The separator of the header. If several are in it, the first with which the rows have as many
    fields as the header."""
    counts = {separator: _field_counts(path, encoding, separator) for separator in SEPARATORS}
    candidates = [each for each in SEPARATORS if counts[each][0] > 1]
    fitting = [each for each in candidates if len(set(counts[each])) == 1]
    return [*fitting, *candidates, SEPARATORS[0]][0]


def _field_counts(path: Path, encoding: str, separator: str) -> list[int]:
    """The number of fields of the header and the first rows; 0 where `separator` gives no CSV."""
    counts = []
    with open_text(path, encoding, newline="") as file:
        rows = csv.reader(file, strict=True, delimiter=separator)
        try:
            for row in islice(rows, COMPARED_ROWS):
                counts += [len(row)] if row else []
        except csv.Error:  # `read_csv` reports what is wrong with the separator that fits best
            counts.append(0)
    return counts or [0]
