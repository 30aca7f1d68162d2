"""Schema of `data=`: the rows to train and evaluate on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from launcher.config.schema.setting import setting

HUB = "hub:"
UTF_8 = "utf-8"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """Where rows come from, and how to read them."""

    path: str | None = setting(
        None,
        "a .json, .jsonl, .csv, .tsv, .parquet or .arrow file, a folder or a glob of them, or "
        "hub:OWNER/NAME; for raw text also .txt; text may be compressed (.gz, .bz2, .xz, .zst)",
    )
    format: str = setting(
        "auto",
        "how a row is read; auto: by its fields; text: raw text for pre-training",
        choices=("auto", "alpaca", "sharegpt", "messages", "completion", "text"),
    )
    columns: dict[str, str] = setting(
        {}, "field of the format: the column of the file that contains it"
    )
    tags: dict[str, str] = setting(
        {},
        "other names in conversations: role and content (fields), user, assistant, system, "
        "observation, function (roles)",
    )
    max_rows: int | None = setting(None, "use only the first N rows", minimum=1)
    encoding: str = setting(
        UTF_8, "encoding of text files, for example latin-1, cp1252, utf-16 or gb18030"
    )
    subset: str | None = setting(
        None,
        "configuration of a hub dataset; in a folder: a configuration that its README.md lists, or "
        "a folder in it",
    )
    split: str = setting("train", "split of a hub dataset, or of a folder that has splits")
    revision: str | None = setting(None, "branch, tag or commit of a hub dataset")
    weight: float = setting(
        1.0,
        "with data.mixing=interleave: how often rows of this source are drawn, relative to others",
        above=0,
        maximum=1e6,
    )


@dataclass(kw_only=True, slots=True)
class DataConfig(SourceConfig):
    """The dataset: one source or several, and how its rows become batches."""

    name: str = setting(
        "data", "name of the dataset in logs; with data.dataset_info: the datasets to use, as a,b"
    )
    sources: dict[str, SourceConfig] = setting(
        {},
        "several sources instead of data.path: a name for each, with its own settings (path to "
        "weight)",
    )
    dataset_info: str | None = setting(
        None,
        "LLaMA-Factory's dataset_info.json instead of data.path; data.name selects its datasets",
    )
    mixing: str = setting(
        "concatenate",
        "with several sources: concatenate uses every row once, interleave draws by weight",
        choices=("concatenate", "interleave"),
    )
    stopping: str = setting(
        "first_exhausted",
        "with interleave: an epoch ends when the first source is exhausted, or when all are "
        "(the others repeat)",
        choices=("first_exhausted", "all_exhausted"),
    )
    template: str | None = setting(
        None, "chat template instead of the tokenizer's: a name (docs/data.md) or a .jinja file"
    )
    template_arguments: dict[str, Any] = setting(
        {}, "values of the chat template's own variables, such as enable_thinking: false"
    )
    template_date: str | None = setting(
        None,
        "the date that a chat template writes, YYYY-MM-DD; null: the day of the launch, which "
        "config.yaml keeps",
    )
    learn_empty_reasoning: bool = setting(
        True,
        "whether the empty <think></think> that a template writes before an answer without "
        "reasoning is in the loss",
    )
    train_on: str = setting(
        "answers",
        "which tokens of a conversation are in the loss: answers, last_answer or all",
        choices=("answers", "last_answer", "all"),
    )
    concatenate: bool = setting(
        True,
        "with format=text: join the texts and cut them into rows of data.max_length; false: one "
        "row per text (per line of a .txt file)",
    )
    max_length: int = setting(2048, "maximum tokens per row", minimum=8)
    too_long: str = setting(
        "cut",  # as in version 0.1.0, whose frozen configurations do not have this setting
        "what happens to longer rows: auto (conf/data/base.yaml sets it: drop conversations, split "
        "raw texts), cut (an answer then has no end), drop (leave out and count) or split",
        choices=("auto", "cut", "drop", "split"),
    )
    on_bad_row: str = setting(
        "fail",
        "a row that cannot be used for training: fail ends the run, skip skips and counts it",
        choices=("fail", "skip"),
    )
    row_seconds: float = setting(
        30.0,
        "seconds of CPU time that a row may take in the chat template, and up to four times as "
        "many if it has more than 400,000 characters; one that takes longer is a bad row",
        above=0,
    )
    packing: bool = setting(
        False,
        "pack several rows into a sequence of data.max_length; attention stays within each row; "
        "batch sizes then count sequences",
    )
    group_by_length: bool = setting(
        False, "group rows of similar length into steps: less padding, a less random order"
    )
    pad_to_multiple_of: int = setting(
        32,
        "round batch lengths up to a multiple of this; fewer shapes are faster on CPU",
        minimum=1,
    )
    shuffle: bool = setting(True, "use a new order every epoch, seeded by training.seed")
    streaming: bool = setting(
        False, "tokenize during training, for data that is too large to tokenize before it"
    )
    workers: int | None = setting(
        None, "tokenizer processes; null: all cores for large data, one for small data", minimum=1
    )
    eval_path: str | None = setting(
        None,
        "a separate file to evaluate on, or a folder or hub:OWNER/NAME: its validation split, "
        "otherwise its test split",
    )
    eval_rows: int = setting(0, "or: number of rows held out of training to evaluate on", minimum=0)
    eval_fraction: float | None = setting(
        None, "or: fraction of the rows held out to evaluate on", above=0, maximum=0.9
    )

    def __post_init__(self) -> None:
        self.sources = {
            name: source if isinstance(source, SourceConfig) else SourceConfig(**source)
            for name, source in self.sources.items()
        }

    def with_paths(self, change: Callable[[str], str]) -> DataConfig:
        """A copy in which `change` is applied to the path of every file."""

        def changed(path: str | None) -> str | None:
            return path and change(path)

        return replace(
            self,
            path=changed(self.path),
            eval_path=changed(self.eval_path),
            dataset_info=changed(self.dataset_info),
            template=changed(self.template),
            sources={
                name: replace(source, path=changed(source.path))
                for name, source in self.sources.items()
            },
        )

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.eval_path or self.eval_rows or self.eval_fraction)
