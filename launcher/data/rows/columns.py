"""The columns of a row: those with a meaning are honored or refused by name, others ignored and
named. Imports no torch."""

from __future__ import annotations

from launcher.data.rows.messages import REASONING_KEYS, Row
from launcher.errors import UserError
from launcher.folders.brief import brief

# The columns that each format reads.
OWN = {
    "alpaca": ("instruction", "input", "output", "history"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
SHARED = ("system", "tools", "functions", "chat_template_kwargs", *REASONING_KEYS)
# Columns that change what a row means and that belong to another kind of training.
PREFERENCE = (
    *("chosen", "rejected", "chosen_response", "rejected_response", "rejected_messages"),
    "kto_tag",
)
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
UNSUPPORTED = ("documents", "weight", "loss_scale")
LOSS = {  # column → the values of a row that is not learned; a loss may be a figure
    "train": ("false", "0", "0.0"),
    "weight": ("0", "0.0"),
    "loss": ("false",),
}
IGNORED = "is ignored"  # ends a note on a column or key without a meaning
NO_VALUE: tuple[object, ...] = (None, "", [], "[]")  # a CSV file has texts only


def refuse_unsupported(location: str, row: Row) -> None:
    """Raises UserError for a column that changes what the row means and that is not supported."""
    for column in PREFERENCE:
        if row.get(column) not in NO_VALUE:
            raise _preference_error(location, column)
    verdicts = {"true", "false"}
    if "instruction" not in row:  # a number beside an instruction is the class of a text
        verdicts |= {"0", "1", "0.0", "1.0"}
    if str(row.get("label")).lower() in verdicts:
        raise _preference_error(location, "label")
    refuse_media(location, row)
    for column, values in LOSS.items():
        if str(row.get(column)).lower() in values:
            raise UserError(
                f"{location} has {column} {row[column]!r}: a row that is not in the loss; remove "
                "the row"
            )
    for column in UNSUPPORTED:
        if row.get(column) not in (*NO_VALUE, 1, "1", "1.0"):
            raise UserError(
                f"{location} has {column} {brief(row[column])}, which is not supported; remove the "
                "column if its rows are to be learned as they are"
            )
    if row.get("tools") not in NO_VALUE and row.get("functions") not in NO_VALUE:
        raise UserError(f"{location} has tools and functions; keep one of them")


def refuse_media(location: str, row: Row) -> None:
    """Raises UserError for a column with images, audio or video."""
    for column in MEDIA:
        if row.get(column) not in (*NO_VALUE, {}, False):
            raise UserError(
                f"{location} has {column}, and only text is supported; remove the column if its "
                "rows make sense without it"
            )


def _preference_error(location: str, column: str) -> UserError:
    return UserError(
        f"{location} has {column}: a row for preference training, where not every answer is one to "
        "learn; remove the column and the answers that are not wanted"
    )


def ignored(row: Row, format: str) -> list[str]:
    """Notes on the columns that no format of the field gives a meaning."""
    shared = () if format == "text" else SHARED
    extra = row.keys() - {*OWN[format], *shared, *UNSUPPORTED}
    return [
        f"column {column} {IGNORED}"
        for column in row
        if column in extra and row[column] not in NO_VALUE
    ]
