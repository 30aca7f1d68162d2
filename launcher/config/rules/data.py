"""The rules of `data=`."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from launcher.config import Config
from launcher.config.rules.rule import Example, Rule, World
from launcher.config.schema.data import SourceConfig
from launcher.folders import paths

COLUMNS = (
    *("instruction", "input", "output", "system", "history", "tools", "conversations"),
    *("messages", "prompt", "completion", "text"),
)
TAGS = ("role", "content", "user", "assistant", "system", "observation", "function")
# For the examples.
ROW = '{"instruction": "a question", "output": "an answer"}\n'
ONE_SOURCE = "'+data.sources={a:{path:a.jsonl}}'"
TWO_SOURCES = "'+data.sources={a:{path:a.jsonl},b:{path:b.jsonl,weight:2}}'"


def _evaluation_sets(config: Config) -> list[str]:
    """The overrides that select rows to evaluate on."""
    data = config.data
    settings = {
        "data.eval_path": data.eval_path,
        "data.eval_rows": data.eval_rows,
        "data.eval_fraction": data.eval_fraction,
    }
    return [f"{key}={value}" for key, value in settings.items() if value]


def _missing_paths(config: Config) -> list[str]:
    """The path settings of the sources that have no path."""
    data = config.data
    if data.dataset_info:
        return []
    if not data.sources:
        return [] if data.path else ["data.path"]
    return [f"data.sources.{name}.path" for name, source in data.sources.items() if not source.path]


def _reads_text(config: Config) -> bool:
    """Whether a source is raw text, by its format."""
    data = config.data
    sources = data.sources.values() if data.sources and not data.dataset_info else [data]
    return any(source.format == "text" for source in sources)


def _unknown_names(config: Config) -> list[str]:
    """The overrides of columns and tags that no format has."""
    sources: dict[str, SourceConfig] = {"data": config.data}
    sources |= {f"data.sources.{name}": source for name, source in config.data.sources.items()}
    return [
        f"{prefix}.{setting}.{key}={value}"
        for prefix, source in sources.items()
        for setting, known in (("columns", COLUMNS), ("tags", TAGS))
        for key, value in getattr(source, setting).items()
        if key not in known
    ]


def _ignores_weights(config: Config, world: World) -> bool:
    weights = {source.weight for source in config.data.sources.values()}
    return config.data.mixing == "concatenate" and len(weights) > 1


def _date_is_invalid(config: Config, world: World) -> bool:
    try:
        date.fromisoformat(config.data.template_date or "2000-01-01")
    except ValueError:
        return True
    return False


def _template_is_missing(config: Config, world: World) -> bool:
    name = config.data.template
    if name is None:
        return False
    return not Path(name).is_file() if name.endswith(".jinja") else name not in paths.templates()


DATA_RULES: tuple[Rule, ...] = (
    Rule(
        "data-is-named",
        "every source has a path",
        lambda c, w: bool(_missing_paths(c)),
        lambda c, w: f"{_missing_paths(c)[0]}=null: there are no rows to train on",
        lambda c, w: f"{_missing_paths(c)[0]}=FILE, or data=demo for the bundled rows",
        Example("data.path=null"),
    ),
    Rule(
        "columns-and-tags",
        "the names in data.columns and data.tags are names that a format has",
        lambda c, w: bool(_unknown_names(c)),
        lambda c, w: (
            f"{_unknown_names(c)[0]} has an unknown name; columns: {', '.join(COLUMNS)}; tags: "
            f"{', '.join(TAGS)}"
        ),
        lambda c, w: f"remove {_unknown_names(c)[0].partition('=')[0]}",
        Example("+data.columns.sytem=persona"),
    ),
    Rule(
        "weights-mix",
        "data.sources with different weights need data.mixing=interleave",
        _ignores_weights,
        lambda c, w: "data.sources have weights, but data.mixing=concatenate uses every row once",
        lambda c, w: "data.mixing=interleave",
        Example(
            f"data.format=auto {TWO_SOURCES}", files=dict.fromkeys(("a.jsonl", "b.jsonl"), ROW)
        ),
    ),
    Rule(
        "sources-or-format",
        "data.sources set their own formats",
        lambda c, w: bool(c.data.sources) and c.data.format != "auto" and not c.data.dataset_info,
        lambda c, w: (
            f"data.format={c.data.format} applies to data.path, but data.sources have their own "
            "formats"
        ),
        lambda c, w: "data.format=auto",
        Example(f"data.format=messages {ONE_SOURCE}", files={"a.jsonl": ROW}),
    ),
    Rule(
        "one-evaluation-set",
        "at most one of data.eval_path, data.eval_rows and data.eval_fraction is set",
        lambda c, w: len(_evaluation_sets(c)) > 1,
        lambda c, w: (
            f"{' and '.join(_evaluation_sets(c))}: only one may select the evaluation rows"
        ),
        lambda c, w: "data.eval_rows=0 data.eval_path=null data.eval_fraction=0.1",
        Example("data.eval_path=held_out.jsonl data.eval_rows=32"),
    ),
    Rule(
        "evaluation-needs-rows",
        "training.eval_steps needs rows to evaluate on",
        lambda c, w: c.training.eval_steps is not None and not c.data.evaluates,
        lambda c, w: (
            f"training.eval_steps={c.training.eval_steps}, but there are no rows to evaluate on"
        ),
        lambda c, w: "data.eval_rows=32, or data.eval_path=FILE, or training.eval_steps=null",
        Example("training.eval_steps=50"),
    ),
    Rule(
        "streaming-holds-nothing-out",
        "data.streaming evaluates only on a separate file",
        lambda c, w: c.data.streaming and bool(c.data.eval_rows or c.data.eval_fraction),
        lambda c, w: (
            "data.streaming=true does not know in advance which rows can be used, so it cannot "
            "hold rows out"
        ),
        lambda c, w: "data.eval_rows=0 data.eval_fraction=null, or data.streaming=false",
        Example("data.streaming=true data.eval_rows=32"),
    ),
    Rule(
        "streaming-in-its-own-order",
        "data.streaming does not interleave sources or group by length",
        lambda c, w: c.data.streaming and (c.data.mixing == "interleave" or c.data.group_by_length),
        lambda c, w: (
            "data.streaming=true does not know the lengths of rows and reads its sources one after "
            "the other, so it can neither group by length nor interleave"
        ),
        lambda c, w: "data.mixing=concatenate data.group_by_length=false",
        Example("data.streaming=true data.group_by_length=true"),
    ),
    Rule(
        "streaming-joins-no-texts",
        "data.streaming does not join raw texts",
        lambda c, w: c.data.streaming and _reads_text(c) and c.data.concatenate,
        lambda c, w: (
            "data.streaming=true cannot join texts, because it does not know where a text starts "
            "in a joined row; data.packing needs as little padding"
        ),
        lambda c, w: "data.concatenate=false data.packing=true",
        Example("data=pretrain data.path=a.txt data.streaming=true", files={"a.txt": "a text\n"}),
    ),
    Rule(
        "packing-is-full",
        "data.packing and data.group_by_length are not used together",
        lambda c, w: c.data.packing and c.data.group_by_length,
        lambda c, w: (
            "data.packing=true fills every sequence: data.group_by_length=true has no effect"
        ),
        lambda c, w: "data.group_by_length=false",
        Example("data.packing=true data.group_by_length=true"),
    ),
    Rule(
        "streaming-splits-nothing",
        "data.streaming makes one row of each row of the files",
        lambda c, w: c.data.streaming and c.data.too_long == "split",
        lambda c, w: (
            "data.streaming=true does not know in advance into how many rows data.too_long=split "
            "splits a row"
        ),
        lambda c, w: "data.too_long=auto, or data.streaming=false",
        Example("data.streaming=true data.too_long=split"),
    ),
    Rule(
        "template-date-is-a-date",
        "data.template_date is a date, as YYYY-MM-DD",
        _date_is_invalid,
        lambda c, w: f"data.template_date={c.data.template_date} is not a date",
        lambda c, w: "data.template_date=2026-01-31",
        Example("data.template_date=tomorrow"),
    ),
    Rule(
        "template-is-there",
        "data.template is a file or the name of a bundled template",
        _template_is_missing,
        lambda c, w: (
            f"data.template={c.data.template} is neither a .jinja file nor one of "
            f"{', '.join(paths.templates())}"
        ),
        lambda c, w: "data.template=null",
        Example("data.template=mine.jinja"),
    ),
)
