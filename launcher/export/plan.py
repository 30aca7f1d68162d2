"""What will be written: every output tensor, where its bytes come from, and its shard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from launcher import versions
from launcher.errors import UserError
from launcher.export.assemble import assemble
from launcher.export.gathered import Assembled, Options
from launcher.export.merge.ties import find_ends
from launcher.export.modelfile import modelfile
from launcher.export.readers.safetensors_file import CODES
from launcher.export.shards import assign, natural
from launcher.export.source import Source, read_json, tokenizer_folder
from launcher.export.tensor import Tensor


@dataclass(frozen=True)
class Plan:
    source: Source
    options: Options
    config: dict[str, Any]  # config.json of the result, adapter_config.json of an adapter alone
    shards: list[list[Tensor]]
    actions: dict[str, str]  # name → copied | cast | gathered | merged … | replaced
    notes: tuple[str, ...]
    extras: dict[str, str]  # further text files of the folder: name → content

    @property
    def tensors(self) -> Iterator[Tensor]:
        return (tensor for shard in self.shards for tensor in shard)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def file_name(self, shard: int) -> str:
        stem, count = "adapter_model" if self.options.adapter_only else "model", len(self.shards)
        if count == 1:
            return f"{stem}.safetensors"
        return f"{stem}-{shard + 1:05d}-of-{count:05d}.safetensors"

    def sources(self) -> list[Path]:
        """Every file that is read, once."""
        return sorted({file for tensor in self.tensors for file in tensor.files()})

    def identity(self) -> str:
        """A hash of all that decides the bytes: what a resumed export must agree on."""
        stats = [
            (str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.sources()
        ]
        layout = [
            (self.file_name(number), tensor.name, str(tensor.dtype), tensor.shape)
            for number, shard in enumerate(self.shards)
            for tensor in shard
        ]
        options = {key: str(value) for key, value in asdict(self.options).items()}
        version = versions.installed()["shardway"]
        text = json.dumps([stats, layout, self.actions, options, self.config, version])
        return xxhash.xxh3_128_hexdigest(text.encode())

    def describe(self) -> str:
        counts = Counter(self.actions.values())
        done = ", ".join(f"{count} {action}" for action, count in sorted(counts.items()))
        return (
            f"{len(self.actions)} tensors ({done}), {self.nbytes / 1e6:,.1f} MB in "
            f"{len(self.shards)} file(s) of at most {self.options.max_shard_bytes / 1e6:,.1f} MB"
        )

    def table(self) -> Iterator[str]:
        """One line a tensor."""
        for number, shard in enumerate(self.shards):
            for tensor in shard:
                dtype = str(tensor.dtype).removeprefix("torch.")
                yield (
                    f"{self.file_name(number)}  {tensor.name}  {self.actions[tensor.name]}  "
                    f"{dtype} {list(tensor.shape)}  {tensor.nbytes:,} bytes"
                )


def make_plan(source: Source, options: Options | None = None) -> Plan:
    """Decide everything before the first byte is written. Raises UserError for what cannot be."""
    options = options or Options()
    assembled = assemble(source, options)
    _check(source, assembled, options)
    ordered = [
        tensor.called(name)
        for name, tensor in sorted(assembled.tensors.items(), key=lambda each: natural(each[0]))
    ]
    cap = sum(each.nbytes for each in ordered) if options.adapter_only else options.max_shard_bytes
    folder, notes, extras = tokenizer_folder(source), assembled.notes, {}
    if folder is None and not options.adapter_only:
        notes = (*notes, "no tokenizer is known: add its files to the folder before it is served")
    if options.modelfile:
        extras["Modelfile"] = modelfile(folder, assembled.config)
    shards = assign(ordered, cap)
    return Plan(source, options, assembled.config, shards, assembled.actions, notes, extras)


def _check(source: Source, assembled: Assembled, options: Options) -> None:
    if not assembled.tensors:
        raise UserError(f"SOURCE {source.path} holds no tensor")
    if empty := [name for name, tensor in assembled.tensors.items() if tensor.shape == (0,)]:
        raise UserError(
            f"{empty[0]} ({len(empty)} tensor(s)) has no element: its values are elsewhere, as in "
            "a file saved under ZeRO-3 without gathering; name the sharded checkpoint as SOURCE"
        )
    for name, tensor in assembled.tensors.items():
        if tensor.dtype not in CODES:
            raise UserError(f"{name} is of {tensor.dtype}, which safetensors cannot hold")
    ends, folder = find_ends(assembled.tensors, assembled.config), tokenizer_folder(source)
    if options.adapter_only or ends is None or folder is None:
        return
    rows = assembled.tensors[ends.embedding].shape[0]
    if (tokens := _longest_id(folder / "tokenizer.json") + 1) > rows:
        raise UserError(
            f"{folder}/tokenizer.json has {tokens} tokens, the embedding {rows} rows: the "
            "tokenizer is another model's, or the embedding was resized elsewhere; name the model "
            "it belongs to with --base, or correct the tokenizer's files"
        )


def _longest_id(path: Path) -> int:
    """The largest token id of a tokenizer.json; -1 where there is none."""
    if not path.is_file():
        return -1
    content = read_json(path)
    vocabulary = content.get("model", {}).get("vocab", {})
    listed = len(vocabulary) - 1 if isinstance(vocabulary, list) else -1
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    added = (int(token["id"]) for token in content.get("added_tokens", ()))
    return max([listed, *map(int, ids), *added])
