"""Schema of `data=`: what is learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from launcher.config.setting import setting

HUB = "hub:"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """Where rows come from, and what they look like."""

    path: str | None = setting(
        None,
        "a .json, .jsonl, .csv, .parquet or .arrow file, a folder or a glob of them, or "
        "hub:OWNER/NAME; of raw text also .txt",
    )
    format: str = setting(
        "auto",
        "how a row is read; auto looks at the fields; text is raw text for pre-training",
        choices=("auto", "alpaca", "sharegpt", "messages", "completion", "text"),
    )
    columns: dict[str, str] = setting(
        {}, "field of the format: the column of the file that holds it"
    )
    tags: dict[str, str] = setting(
        {},
        "other words in turns: role and content (fields), user, assistant, system, observation, "
        "function (roles)",
    )
    max_rows: int | None = setting(None, "take the first so many rows alone", minimum=1)
    subset: str | None = setting(None, "of a hub data set: its configuration")
    split: str = setting("train", "of a hub data set: which part of it")
    revision: str | None = setting(None, "of a hub data set: branch, tag or commit")
    weight: float = setting(
        1.0, "of data.mixing=interleave: how often a row is drawn from here", above=0, maximum=1e6
    )


@dataclass(kw_only=True, slots=True)
class DataConfig(SourceConfig):
    name: str = setting("data", "names the data set in logs; of data.dataset_info which: a,b")
    sources: dict[str, SourceConfig] = setting(
        {}, "several instead of data.path: a name, and each setting up to weight of this one"
    )
    dataset_info: str | None = setting(
        None, "LLaMA-Factory's dataset_info.json instead of data.path; data.name names sets in it"
    )
    mixing: str = setting(
        "concatenate",
        "of several sources: concatenate takes every row once, interleave draws by weight",
        choices=("concatenate", "interleave"),
    )
    stopping: str = setting(
        "first_exhausted",
        "of interleave: an epoch ends when a source is used up, or when all are (others repeat)",
        choices=("first_exhausted", "all_exhausted"),
    )
    template: str | None = setting(
        None, "another chat template than the tokenizer's: a name (docs/data.md) or a .jinja file"
    )
    train_on: str = setting(
        "answers",
        "which tokens of a conversation are learnt: answers, last_answer, or all",
        choices=("answers", "last_answer", "all"),
    )
    concatenate: bool = setting(
        True,
        "of format=text: texts end to end, cut into rows of data.max_length; false: a row each "
        "(of a .txt file each line)",
    )
    max_length: int = setting(2048, "tokens a row keeps; what is beyond is cut off", minimum=8)
    on_bad_row: str = setting(
        "fail",
        "a row that cannot be learnt from ends the run, or is skipped and counted",
        choices=("fail", "skip"),
    )
    packing: bool = setting(
        False,
        "several rows in a sequence of data.max_length, none of which sees another; a batch then "
        "counts sequences",
    )
    group_by_length: bool = setting(
        False, "steps of rows of like length: less padding, an order less random"
    )
    pad_to_multiple_of: int = setting(
        32, "batch lengths are rounded up to this; few shapes keep the CPU fast", minimum=1
    )
    shuffle: bool = setting(True, "a new order every epoch, drawn from training.seed")
    streaming: bool = setting(
        False, "tokenise while training, for data too large to be tokenised before"
    )
    workers: int | None = setting(
        None, "processes that tokenise; null: every core for large data, one for small", minimum=1
    )
    eval_path: str | None = setting(None, "a file of its own to evaluate on")
    eval_rows: int = setting(0, "or: rows held out of training to evaluate on", minimum=0)
    eval_fraction: float | None = setting(
        None, "or: this share of the rows held out", above=0, maximum=0.9
    )

    def __post_init__(self) -> None:
        self.sources = {
            name: source if isinstance(source, SourceConfig) else SourceConfig(**source)
            for name, source in self.sources.items()
        }

    def with_paths(self, change: Callable[[str], str]) -> DataConfig:
        """This, every file it names by another path."""

        def changed(source: Any, *names: str) -> Any:
            values = {name: getattr(source, name) for name in names}
            return replace(source, **{name: v and change(v) for name, v in values.items()})

        found: DataConfig = changed(self, "path", "eval_path", "dataset_info", "template")
        sources = {name: changed(source, "path") for name, source in self.sources.items()}
        return replace(found, sources=sources)

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.eval_path or self.eval_rows or self.eval_fraction)
