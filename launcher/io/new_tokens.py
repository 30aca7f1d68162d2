"""Adds tokens to a model folder: to its tokenizer, and as rows of its embedding and output head.

The result is a model folder of its own in the cache. Files without changes are links to the base's.
A new row is the mean of the rows that the tokenizer uses, so that a new token is at first as likely
as an average one (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.folders import durable, manifest
from launcher.folders.checked_cache import is_checked, lock
from launcher.folders.extended_model import (
    FILES,
    RECORD,
    extended_folder,
    is_special_token,
    padded_rows,
)
from launcher.folders.file_names import WEIGHT_FILES, matches
from launcher.folders.json_file import read_object
from launcher.folders.model import (
    CONFIG,
    INDEX,
    TEMPLATES,
    TOKENIZER_FILES,
    model_folder,
    single_weights_file,
)
from launcher.folders.model_config import read_model_config
from launcher.folders.tensor_entries import TensorEntry, tensor_entries
from launcher.folders.vocabulary import HEAD_MODULES, config_changes, is_embedding, stated_tie
from launcher.io.new_rows import chunks, with_new_rows
from launcher.io.readers.safetensors_file import header, read_header


@dataclass(frozen=True)
class NewVocabulary:
    """The tokenizer with the new tokens, and the rows that its ids need."""

    added: dict[str, int]  # new token → id
    known: list[str]  # requested, but in the tokenizer before
    old_ids: list[int]  # that the tokenizer used before and that have a row
    new_rows: list[int]  # rows that get the mean
    rows_before: int
    rows: int


def base_model_folder(
    name_or_path: str,
    revision: str | None,
    include_code: bool = False,
    add_tokens: Sequence[str] = (),
) -> Path:
    """The local folder of a model, with new tokens if there are any. Raises UserError if it cannot
    be downloaded, or the tokens cannot be added."""
    folder = model_folder(name_or_path, revision, include_code)
    return extend(folder, add_tokens, include_code) if add_tokens else folder


def extend(base: Path, tokens: Sequence[str], trust_remote_code: bool = False) -> Path:
    """The folder of `base` with new `tokens`. One process makes it, others wait for it. Raises
    UserError if the tokens cannot be added."""
    folder = extended_folder(base, tokens)
    if folder == base or is_checked(folder / RECORD, folder / CONFIG):
        return folder
    try:
        with lock(folder.with_name(f".{folder.name}.lock"), folder):
            if not _is_whole(folder):
                _write_whole(base.resolve(), tokens, folder, trust_remote_code)
    except OSError as error:
        raise UserError(
            f"model.add_tokens: {folder} cannot be written: {error.strerror or error}; free disk "
            "space, or set SHARDWAY_CACHE to a folder that you can write"
        ) from error
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the folder exists and its own files are as they were written. A damaged one is named
    and deleted. The first process of a start looks, the others trust that."""
    if not folder.is_dir() or is_checked(folder / RECORD, folder / CONFIG):
        return folder.is_dir()
    try:
        # Earlier versions wrote no checksums.
        files = read_object(folder / RECORD).get(FILES, {})
        found = [manifest.problem(folder / name, entry) for name, entry in files.items()]
        problems = [problem for problem in found if problem]
    except (UserError, AttributeError, KeyError, TypeError):
        problems = [f"{folder / RECORD} is damaged"]
    if problems:
        print(f"{'; '.join(problems)}; rebuilt", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
        return False
    with suppress(OSError):  # a read-only cache
        os.utime(folder / RECORD)
    return True


def _write_whole(base: Path, tokens: Sequence[str], folder: Path, trust_remote_code: bool) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        _write(base, tokens, partial, trust_remote_code)
    except BaseException:
        shutil.rmtree(partial)
        raise
    durable.replace(partial, folder)


def _write(base: Path, tokens: Sequence[str], folder: Path, trust_remote_code: bool) -> None:
    entries = _read_entries(base)
    config = read_model_config(base / CONFIG)
    embedding = _find_embedding(base, entries)
    rows = entries[embedding].shape[0]
    vocabulary = _write_tokenizer(base, tokens, rows, folder, trust_remote_code)
    resized = {embedding, *_find_heads(base, entries, embedding, config)}
    added_bytes = 0
    for file in sorted({entry.file for entry in entries.values()}):
        if any(entries[name].file == file for name in resized):
            added_bytes += _write_shard(file, resized, vocabulary, folder / file.name)
        else:
            (folder / file.name).symlink_to(file.resolve())
    config |= config_changes(config, vocab_size=vocabulary.rows)
    _write_json(folder / CONFIG, config)
    if (base / INDEX).is_file():
        _write_json(folder / INDEX, _resized_index(base / INDEX, added_bytes))
    _link_other_files(base, folder)
    record: dict[str, Any] = {
        "base": str(base),
        "tokens": list(tokens),
        "added": list(vocabulary.added),
        "known": vocabulary.known,
        "rows": [vocabulary.rows_before, vocabulary.rows],
        FILES: manifest.entries(folder, lambda path: not path.is_symlink()),
    }
    for name in record[FILES]:
        durable.sync(folder / name)
    _write_json(folder / RECORD, record)


def _read_entries(base: Path) -> dict[str, TensorEntry]:
    if not (base / INDEX).is_file():
        single_weights_file(base)  # refuses a folder with several
    entries = tensor_entries(base)
    if not entries:
        raise UserError(
            f"model.add_tokens: the safetensors files of {base} cannot be read → a complete model "
            "folder, or model.add_tokens=[]"
        )
    return entries


def _find_embedding(base: Path, entries: dict[str, TensorEntry]) -> str:
    names = [name for name in entries if is_embedding(name)]
    if len(names) != 1:
        raise UserError(
            f"model.add_tokens: {len(names)} tensors of {base} have the name of an input embedding "
            "→ add the tokens once with resize_token_embeddings of transformers, save the model "
            "and its tokenizer, and name that folder with model.add_tokens=[]"
        )
    return names[0]


def _find_heads(
    base: Path, entries: dict[str, TensorEntry], embedding: str, config: dict[str, Any]
) -> list[str]:
    """The weight of the output head, if it is stored, and its bias."""
    rows = entries[embedding].shape[0]
    heads = [
        name
        for name, entry in entries.items()
        if HEAD_MODULES & {*name.split(".")} and entry.shape[:1] == (rows,)
    ]
    for name, entry in entries.items():
        if name.rpartition("lm_head")[2] == ".weight" and entry.shape[0] != rows:
            raise UserError(
                f"model.add_tokens: {embedding} of {base} has {rows} rows and {name} "
                f"{entry.shape[0]}, so a new token would have two ids → model.add_tokens=[]"
            )
    if not heads and stated_tie(config) is False:
        raise UserError(
            f"model.add_tokens: no tensor of {base} is recognized as the output head, which "
            "config.json does not tie to the embedding → model.add_tokens=[]"
        )
    return heads


def _write_tokenizer(
    base: Path, tokens: Sequence[str], rows: int, folder: Path, trust_remote_code: bool
) -> NewVocabulary:
    """Save the tokenizer with the new tokens. `rows`: of the embedding before."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer  # an export without new tokens does not import it

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    except Exception as error:  # each tokenizer class raises its own errors
        raise UserError(f"model.name_or_path={base} has no tokenizer: {error}") from error
    before: dict[str, int] = tokenizer.get_vocab()
    new = [token for token in tokens if token not in before]
    tokenizer.add_tokens(
        [AddedToken(text, special=is_special_token(text), normalized=False) for text in new]
    )
    after: dict[str, int] = tokenizer.get_vocab()
    for token in new:
        if after.get(token) not in tokenizer.encode(token, add_special_tokens=False):
            raise UserError(
                f"model.add_tokens=[{token}]: the tokenizer of {base} does not read this text as "
                "one token → another text"
            )
    tokenizer.save_pretrained(folder)
    highest = max(after.values()) + 1
    new_count = rows if highest <= rows else padded_rows(highest)
    added = {token: after[token] for token in new}
    fresh = {i for i in after.values() if i >= rows} | {*added.values()} | {*range(rows, new_count)}
    return NewVocabulary(
        added,
        known=[token for token in tokens if token in before],
        old_ids=sorted({i for i in before.values() if i < rows}),
        new_rows=sorted(fresh),
        rows_before=rows,
        rows=new_count,
    )


def _write_shard(file: Path, resized: set[str], vocabulary: NewVocabulary, copy: Path) -> int:
    """Write `copy` of a weights file with new rows. Returns how many bytes it has more."""
    before = read_header(file)
    tensors = [
        with_new_rows(tensor, vocabulary.old_ids, vocabulary.new_rows, vocabulary.rows)
        if name in resized
        else tensor
        for name, tensor in before.items()
    ]
    with copy.open("wb") as stream:
        stream.write(header([(t.name, t.dtype, t.shape) for t in tensors]))
        for tensor in tensors:
            for values in chunks(tensor):
                stream.write(values.view(torch.uint8).numpy().data)
    return sum(tensor.nbytes for tensor in tensors) - sum(t.nbytes for t in before.values())


def _resized_index(index: Path, added_bytes: int) -> dict[str, Any]:
    content = read_object(index)
    metadata = content.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = int(metadata["total_size"]) + added_bytes
        metadata.pop("total_parameters", None)  # optional, and now another number
    return content


def _link_other_files(base: Path, folder: Path) -> None:
    """Link what is neither weights nor of the tokenizer, such as generation_config.json, and
    subfolders."""
    excluded = (*WEIGHT_FILES, *TOKENIZER_FILES, "*.index.json", TEMPLATES, ".*")
    for path in base.iterdir():
        copy = folder / path.name
        if not copy.exists() and not matches(path.name, excluded):
            copy.symlink_to(path.resolve())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
