"""`shardway consolidate --evaluate ROWS`: the loss of the export and of its source on the same
rows."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UserError
from launcher.export.assembled import Options
from launcher.export.source import Source

if TYPE_CHECKING:
    from launcher.config.schema.data import DataConfig


@dataclass(frozen=True)
class Losses:
    """Loss per target token."""

    rows: str  # what was read of ROWS
    tokens: int  # targets
    result: float
    source: float | None  # None: it was not evaluated
    compared_with: str  # what the source is, or why it was not evaluated

    def describe(self) -> str:
        """Two lines."""
        result = f"loss per token: {self.result:.4f}"
        if self.source is None:
            compared = f"the source was not evaluated: {self.compared_with}"
        else:
            compared = f"{self.source:.4f} of {self.compared_with}"
        return f"evaluated on {self.tokens:,} tokens: {self.rows}\n{result}; {compared}"

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def check(arguments: argparse.Namespace) -> DataConfig | None:
    """How the rows of --evaluate are read, None without the option. Raises UserError if they
    cannot be, or if nothing is evaluated."""
    if arguments.evaluate is None:
        return None
    for option in ("adapter_only", "dry_run"):
        if getattr(arguments, option):
            raise UserError(
                f"--evaluate {arguments.evaluate} needs a model that is written, and "
                f"--{option.replace('_', '-')} writes none → one of the two options"
            )
    from launcher.training.folder_loss import data_config  # imports transformers: seconds

    return data_config(arguments.evaluate)


def evaluate(config: DataConfig, source: Source, output: Path, options: Options) -> Losses:
    """The losses of the export and of its source. Raises UserError if the export has none; if only
    the source has none, the result says why."""
    from launcher.training.folder_loss import Model, mean_loss, read_rows

    device, code = options.device, options.trust_remote_code
    failed = f"The export in {output} is written and verified; only its evaluation failed"
    try:
        rows = read_rows(config, output, code)
    except UserError as error:
        raise UserError(
            f"--evaluate {config.path}: {error}\nOf each row, up to {config.max_length:,} tokens "
            f"are read, and longer conversations are left out → shorter rows. {failed}"
        ) from error
    try:
        result = mean_loss(Model(output), rows, device, code)
    except UserError as error:
        raise UserError(f"--evaluate {config.path}: {error}\n{failed}") from error
    if source.read is not None or source.base is None:
        reason = f"no library loads {source.path} ({source.kind.value}) as a model"
        return Losses(rows.summary, rows.targets, result, None, reason)
    try:
        before_merge = Model(source.base, source.adapters, source.earlier_adapters)
        before = mean_loss(before_merge, rows, device, code)
    except UserError as error:
        return Losses(rows.summary, rows.targets, result, None, str(error))
    names = " + ".join(map(str, (source.base, *source.earlier_adapters, *source.adapters)))
    compared = f"{names}, not merged" if source.adapters else names
    return Losses(rows.summary, rows.targets, result, before, compared)
