"""Tokenised rows, made once and kept by content.

The store is one safetensors file a data set: all ids end to end, the mask, and where rows begin.
It is memory-mapped, so ranks of one machine share its pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from filelock import FileLock
from safetensors.torch import load_file, save
from transformers import PreTrainedTokenizerBase

from launcher import paths
from launcher.config.data import DataConfig
from launcher.data import source
from launcher.data.chat import Tokens, tokenize
from launcher.data.text import tokenize_texts
from launcher.errors import UserError

FORMAT = "2"  # part of the key: raise it when tokenising changes


@dataclass(frozen=True)
class Rows:
    """Rows of token ids. `len`, and `rows[i]` → (ids [n] int32, trained [n] bool)."""

    ids: torch.Tensor  # [total] int32
    trained: torch.Tensor  # [total] bool
    starts: torch.Tensor  # [rows + 1] int64
    dropped: int  # rows of which nothing to learn was left within max_length
    truncated: int  # rows that were cut at max_length
    fingerprint: str  # of the content of file, tokenizer and options

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin, end = int(self.starts[row]), int(self.starts[row + 1])
        return self.ids[begin:end], self.trained[begin:end]

    def describe(self) -> str:
        tokens, learnt = int(self.starts[-1]), int(self.trained.sum())
        text = f"{len(self):,} rows, {tokens:,} tokens, {learnt:,} of them learnt"
        if self.truncated:
            text += f"; {self.truncated:,} rows cut at data.max_length"
        if self.dropped:
            text += f"; {self.dropped:,} rows left out: no answer within data.max_length"
        return text


def load_rows(
    path: Path,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    on_row: Callable[[], None] = lambda: None,
) -> Rows:
    """Tokenise `path`, or take it from the cache when the same was tokenised before.

    The key is the content of file, tokenizer and template and the options, so a changed file is
    noticed. One process tokenises; others on the machine wait for its lock. `on_row` is called
    before each row that is tokenised; what it raises ends the work and nothing is kept.
    """
    key = _key(path, config, tokenizer)
    store = paths.cache() / "tokens" / f"{key}.safetensors"
    if not store.is_file():
        try:
            _fill_cache(store, lambda: _tokenize_file(path, config, tokenizer, on_row))
        except OSError as error:
            raise UserError(
                f"the token cache {store.parent} cannot be written: {error.strerror}; "
                "set SHARDWAY_CACHE to a folder of yours"
            ) from error
    tensors = load_file(store)
    counts = tensors.pop("counts").tolist()
    rows = Rows(**tensors, dropped=counts[0], truncated=counts[1], fingerprint=key)
    if not len(rows):
        raise UserError(
            f"data.path={path}: no answer lies within data.max_length={config.max_length}; raise it"
        )
    return rows


def split(rows: Rows, eval_rows: int, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """(training, evaluation) row numbers; the same for the same seed and file."""
    if eval_rows >= len(rows):
        raise UserError(
            f"data.eval_rows={eval_rows} leaves nothing to train on: data.path has {len(rows)} rows"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = sorted(order[:eval_rows])
    return sorted(order[eval_rows:]), held_out


def _fill_cache(store: Path, make: Callable[[], dict[str, torch.Tensor]]) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(store.with_suffix(".lock")):
        if not store.is_file():  # else another rank has made it meanwhile
            aside = store.with_suffix(".partial")
            aside.write_bytes(save(make()))
            aside.replace(store)


def _tokenize_file(
    path: Path,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    on_row: Callable[[], None],
) -> dict[str, torch.Tensor]:
    ids: list[int] = []
    trained: list[bool] = []
    starts, dropped, truncated = [0], 0, 0
    for tokens in _tokenized(path, config, tokenizer, on_row):
        truncated += tokens.cut
        if not any(tokens.trained[1:]):  # the first token is never predicted
            dropped += 1
            continue
        ids += tokens.ids
        trained += tokens.trained
        starts.append(len(ids))
    return {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "trained": torch.tensor(trained, dtype=torch.bool),
        "starts": torch.tensor(starts, dtype=torch.int64),
        "counts": torch.tensor([dropped, truncated]),
    }


def _tokenized(
    path: Path,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    on_row: Callable[[], None],
) -> Iterator[Tokens]:
    def texts() -> Iterator[str]:
        for _, text in source.read_texts(path, by_line=not config.concatenate):
            on_row()
            yield text

    if config.format == "text":
        yield from tokenize_texts(tokenizer, texts(), config.max_length, config.concatenate)
        return
    for place, messages in source.read_messages(path, config.format):
        on_row()
        yield tokenize(tokenizer, messages, config.max_length, place)


def _key(path: Path, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    special = sorted(tokenizer.special_tokens_map.items())  # templates and the mask use them
    options = (FORMAT, config.format, config.max_length, tokenizer.chat_template, backend, special)
    digest.update(repr(options).encode())
    if config.format == "text":
        digest.update(f"{path.suffix} {config.concatenate}".encode())
    return digest.hexdigest()
