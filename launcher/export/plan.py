"""The plan of an export: every output tensor, where its bytes come from, and its shard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import UserError
from launcher.export.assemble import assemble
from launcher.export.assembled import Assembled, Options
from launcher.export.completeness import check_complete
from launcher.export.copied_files import check_copied_files, find_copied_files
from launcher.export.left_files import describe_left
from launcher.export.merge.ties import find_embedding_pair
from launcher.export.modelfile import make_modelfile
from launcher.export.shard_plan import assign_shards, natural_sort_key
from launcher.export.source import Source
from launcher.export.source_folders import model_home, template_folder, tokenizer_folder
from launcher.export.stop_tokens import Stops, with_stops
from launcher.folders import versions
from launcher.folders.brief import brief
from launcher.folders.vocabulary import embedding_rows, tokens_without_row
from launcher.io.readers.safetensors_file import CODES
from launcher.io.tensor import Tensor
from launcher.io.tokenizer_files import stated_template, token_ids


@dataclass(frozen=True)
class Plan:
    source: Source
    options: Options
    config: dict[str, Any]  # config.json of the result, or adapter_config.json for --adapter-only
    shards: list[list[Tensor]]
    actions: dict[str, str]  # name → copied | cast | gathered | merged … | replaced
    notes: tuple[str, ...]  # messages for the user
    generated: dict[str, bytes]  # other files that replace the base's: name → content

    @property
    def tensors(self) -> Iterator[Tensor]:
        return (tensor for shard in self.shards for tensor in shard)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def files(self) -> dict[str, list[Tensor]]:
        """The tensors of each file of weights."""
        return {self.file_name(number): shard for number, shard in enumerate(self.shards)}

    def file_name(self, shard: int) -> str:
        """The name of the file of shard number `shard`, from 0."""
        stem, count = "adapter_model" if self.options.adapter_only else "model", len(self.shards)
        if count == 1:
            return f"{stem}.safetensors"
        return f"{stem}-{shard + 1:05d}-of-{count:05d}.safetensors"

    def sources(self) -> list[Path]:
        """The files that are read, each once."""
        return sorted({file for tensor in self.tensors for file in tensor.files()})

    def identity(self) -> str:
        """A hash of everything that determines the bytes. A resumed export must have the same."""
        stats = [
            (str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.sources()
        ]
        layout = [
            (name, tensor.name, str(tensor.dtype), tensor.shape)
            for name, tensors in self.files.items()
            for tensor in tensors
        ]
        options = {key: str(value) for key, value in asdict(self.options).items()}
        version = versions.installed_versions()["shardway"]
        text = json.dumps([stats, layout, self.actions, options, self.config, version])
        return xxhash.xxh3_128_hexdigest(text.encode())

    def describe(self) -> str:
        """One line: the number of tensors for each action, bytes and files."""
        counts = Counter(self.actions.values())
        actions = ", ".join(f"{count} {action}" for action, count in sorted(counts.items()))
        return (
            f"{len(self.actions)} tensors ({actions}), {self.nbytes / 1e6:,.1f} MB in "
            f"{len(self.shards)} file(s) of at most {self.options.max_shard_bytes / 1e6:,.1f} MB"
        )

    def table(self) -> Iterator[str]:
        """One line for each tensor, with columns separated by two spaces."""
        for name, tensors in self.files.items():
            for tensor in tensors:
                dtype = str(tensor.dtype).removeprefix("torch.")
                yield (
                    f"{name}  {tensor.name}  {self.actions[tensor.name]}  "
                    f"{dtype} {list(tensor.shape)}  {tensor.nbytes:,} bytes"
                )


def make_plan(source: Source, options: Options | None = None) -> Plan:
    """Decide everything before the first byte is written. Raises UserError if the export is not
    possible."""
    options = options or Options()
    assembled = assemble(source, options)
    _check(source, assembled)
    tensors = [
        assembled.tensors[name].renamed(name)
        for name in sorted(assembled.tensors, key=natural_sort_key)
    ]
    if options.adapter_only:
        max_bytes = sum(tensor.nbytes for tensor in tensors)
    else:
        max_bytes = options.max_shard_bytes
    folder, notes = tokenizer_folder(source), assembled.notes
    if not options.adapter_only:
        notes += check_complete(source.path, assembled.config, assembled.tensors)
        notes += _describe_rows(source, assembled)
    check_copied_files(find_copied_files(source, options))
    stops = Stops(assembled.config)
    if not options.adapter_only:
        stops = with_stops(source, assembled.config, options.trust_remote_code)
        if folder is None:
            notes += ("no tokenizer is known: add its files to the folder before serving it",)
    generated = dict(stops.files)
    if options.modelfile:
        trained = template_folder(source)
        modelfile = make_modelfile(
            source.old_tokenizer or folder,
            assembled.config,
            options.trust_remote_code,
            None if trained is None else stated_template(trained),
        )
        generated["Modelfile"] = modelfile.encode()
    shards = assign_shards(tensors, max_bytes)
    notes += stops.notes
    notes += describe_left(source, options, {file for each in tensors for file in each.files()})
    return Plan(source, options, stops.config, shards, assembled.actions, notes, generated)


def _check(source: Source, assembled: Assembled) -> None:
    if not assembled.tensors:
        raise UserError(f"SOURCE {source.path} contains no tensor")
    if empty := [name for name, tensor in assembled.tensors.items() if tensor.shape == (0,)]:
        raise UserError(
            f"{empty[0]} ({len(empty)} tensor(s)) has no elements: its values are stored elsewhere,"
            " as in a file saved under ZeRO-3 without gathering; name the sharded checkpoint as "
            "SOURCE"
        )
    for name, tensor in assembled.tensors.items():
        if tensor.dtype not in CODES:
            raise UserError(
                f"{name} is of {tensor.dtype}, which safetensors cannot store → SOURCE with it in "
                "another dtype"
            )


def _describe_rows(source: Source, assembled: Assembled) -> tuple[str, ...]:
    """A note on tokens without a row of the embedding, if the base has them so.

    Raises UserError if the base does not: training resized the embedding elsewhere, or the
    tokenizer is that of another model.
    """
    pair = find_embedding_pair(assembled.tensors, assembled.config)
    if pair is None or (folder := tokenizer_folder(source)) is None:
        return ()
    rows, home = assembled.tensors[pair.embedding].shape[0], model_home(source)
    ids = token_ids(folder)
    if not (missing := tokens_without_row(ids, rows)):
        return ()
    file, count = folder / "tokenizer.json", max(ids.values()) + 1
    base_ids = ids if folder == home else token_ids(home)
    if missing.items() <= base_ids.items() and embedding_rows(home) == rows:
        return (
            f"{file} has {count} tokens and the embedding {rows} rows, as in {home}: text with "
            f"{brief(min(missing, key=missing.__getitem__))} cannot be used",
        )
    raise UserError(
        f"{file} has {count} tokens, the embedding {rows} rows: the tokenizer belongs to another "
        "model, or the embedding was resized elsewhere; name the tokenizer's model with --base, or "
        "correct the tokenizer's files"
    )
