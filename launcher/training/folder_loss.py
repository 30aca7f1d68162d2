"""The loss per token of models in folders, on the same rows: of an export, and of its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from launcher.config.schema.data import DataConfig
from launcher.data.collate import IGNORED, MicroBatch, collate
from launcher.data.dataset import load_data
from launcher.data.source import find_problems
from launcher.errors import UserError, one_line
from launcher.export.writing.progress import Progress
from launcher.folders.vocabulary import embedding_rows
from launcher.io.absent_towers import towers_may_be_absent
from launcher.io.adapter import check_modules, read_adapter
from launcher.io.model_class import class_to_load
from launcher.training.loss import token_loss


@dataclass(frozen=True)
class Model:
    """A model as other libraries load it: with adapters beside its weights, if it has any."""

    folder: Path
    adapters: tuple[Path, ...] = ()
    earlier_adapters: tuple[Path, ...] = ()  # that are merged into its weights first, in order


@dataclass(frozen=True)
class Rows:
    batches: list[MicroBatch]  # of one row each
    targets: int  # tokens in the loss
    summary: str


def data_config(path: str) -> DataConfig:
    """The settings that read the rows in `path`, conversations or raw texts, in their order.

    Raises UserError if they can be read as neither.
    """
    config = DataConfig(path=path, too_long="auto", shuffle=False, workers=1)
    if not (problems := find_problems(config)):
        return config
    as_text = replace(config, format="text", concatenate=False)
    if not find_problems(as_text):
        return as_text
    raise UserError("\n".join(problems))


def read_rows(config: DataConfig, folder: Path, trust_remote_code: bool = False) -> Rows:
    """The rows as the tokenizer of the model in `folder` cuts them. Raises UserError for a bad
    row."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    data = load_data(config, tokenizer, vocabulary_size=embedding_rows(folder))
    pad = tokenizer.pad_token_id or 0
    batches = [collate([[data.rows[row]]], 1, pad, False) for row in range(len(data.rows))]
    targets = sum(int((batch.target_ids != IGNORED).sum()) for batch in batches)
    return Rows(batches, targets, data.describe())


@torch.no_grad()
def mean_loss(model: Model, rows: Rows, device: str, trust_remote_code: bool = False) -> float:
    """The cross-entropy per target token. The model is in memory in its own dtype meanwhile.

    Raises UserError if transformers or PEFT cannot load it, or it has no loss on tokens alone.
    """
    loaded = _load(model, trust_remote_code).to(device).eval()
    try:
        losses = []
        with Progress(f"evaluating {model.folder.name}", rows.targets, "tokens") as progress:
            for batch in rows.batches:
                losses.append(token_loss(loaded, batch.to(torch.device(device))).double().cpu())
                progress.advance(int((batch.target_ids != IGNORED).sum()))
    except Exception as error:  # each model raises its own errors
        raise UserError(f"{model.folder} cannot be evaluated: {one_line(error)}") from error
    return torch.stack(losses).sum().item() / rows.targets


def _load(model: Model, trust_remote_code: bool) -> Any:
    adapters = model.adapters
    try:
        if trust_remote_code:
            from transformers import AutoModelForCausalLM as model_class
        else:
            model_class = class_to_load(model.folder, adapters[0] if adapters else None)
        with towers_may_be_absent():
            loaded: Any = model_class.from_pretrained(
                model.folder,
                dtype="auto",
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
        for folder in model.earlier_adapters:
            loaded = _with_adapters(loaded, (folder,)).merge_and_unload()
        return _with_adapters(loaded, adapters) if adapters else loaded
    except UserError:
        raise
    except Exception as error:  # a damaged folder raises many kinds of errors
        names = ", ".join(map(str, (model.folder, *adapters)))
        raise UserError(f"{names} cannot be loaded: {one_line(error)}") from error


def _with_adapters(model: Any, adapters: Sequence[Path]) -> Any:
    """The model with PEFT's layers, whose deltas are summed."""
    from launcher.model.peft import PeftModel

    modules = {name for name, _ in model.named_modules()}
    for folder in adapters:
        check_modules(read_adapter(folder), modules)
    names = [f"adapter-{number}" for number in range(len(adapters))]
    wrapped: Any = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        wrapped.load_adapter(str(folder), adapter_name=name)
    wrapped.base_model.set_adapter(names)
    return wrapped
