"""The columns of a row: those with a meaning are honored or refused by name, others ignored and
named. Imports no torch."""

from __future__ import annotations

from launcher.data.rows.messages import REASONING_KEYS, Row
from launcher.errors import UserError

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
NO_VALUE: tuple[object, ...] = (None, "", [])


def refuse_unsupported(location: str, row: Row) -> None:
    """Raises UserError for a column that changes what the row means and that is not supported."""
    for column in PREFERENCE:
        if row.get(column) not in NO_VALUE:
            raise _preference_error(location, column)
    label = row.get("label")
    is_verdict = label in (True, False) if "completion" in row else isinstance(label, bool)
    if is_verdict or str(label).lower() in ("true", "false"):
        raise _preference_error(location, "label")
    for column in MEDIA:
        if row.get(column):
            raise UserError(
                f"{location} has {column}, and only text is supported; remove the column if its "
                "rows make sense without it"
            )
    for column in UNSUPPORTED:
        if row.get(column) not in (*NO_VALUE, 1):
            raise UserError(f"{location} has {column}, which is not supported; remove the column")


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
        f"column {column} is ignored"
        for column in row
        if column in extra and row[column] not in NO_VALUE
    ]
