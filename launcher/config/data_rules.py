"""The rules of `data=`."""

from __future__ import annotations

from pathlib import Path

from launcher import paths
from launcher.config import Config
from launcher.config.data import SourceConfig
from launcher.config.rule import Example, Rule, World

FIELDS = (
    *("instruction", "input", "output", "system", "history", "tools", "conversations"),
    *("messages", "prompt", "completion", "text"),
)
TAGS = ("role", "content", "user", "assistant", "system", "observation", "function")
ROW = '{"instruction": "a question", "output": "an answer"}\n'
ONE = "'+data.sources={a:{path:a.jsonl}}'"
TWO = "'+data.sources={a:{path:a.jsonl},b:{path:b.jsonl,weight:2}}'"


def _evaluation_sets(config: Config) -> list[str]:
    """The settings that name rows to evaluate on."""
    data = config.data
    named = {
        "data.eval_path": data.eval_path,
        "data.eval_rows": data.eval_rows,
        "data.eval_fraction": data.eval_fraction,
    }
    return [f"{key}={value}" for key, value in named.items() if value]


def _nowhere(config: Config) -> list[str]:
    """The sources that say not where their rows are."""
    data = config.data
    if data.dataset_info:
        return []
    if not data.sources:
        return [] if data.path else ["data.path"]
    return [f"data.sources.{name}.path" for name, each in data.sources.items() if not each.path]


def _reads_text(config: Config) -> bool:
    """Whether a source is raw text."""
    data = config.data
    sources = data.sources.values() if data.sources and not data.dataset_info else [data]
    return any(source.format == "text" for source in sources)


def _unknown_names(config: Config) -> list[str]:
    """Settings of columns and tags that no format has."""
    places: dict[str, SourceConfig] = {"data": config.data}
    places |= {f"data.sources.{name}": each for name, each in config.data.sources.items()}
    return [
        f"{place}.{setting}.{key}={value}"
        for place, source in places.items()
        for setting, known in (("columns", FIELDS), ("tags", TAGS))
        for key, value in getattr(source, setting).items()
        if key not in known
    ]


def _weighted(config: Config, world: World) -> bool:
    weights = {source.weight for source in config.data.sources.values()}
    return config.data.mixing == "concatenate" and len(weights) > 1


def _no_template(config: Config, world: World) -> bool:
    name = config.data.template
    if name is None:
        return False
    return not Path(name).is_file() if name.endswith(".jinja") else name not in paths.templates()


DATA_RULES: tuple[Rule, ...] = (
    Rule(
        "data-is-named",
        "every source says where its rows are",
        lambda c, w: bool(_nowhere(c)),
        lambda c, w: f"{_nowhere(c)[0]}=null: nothing says which rows are to be learnt",
        lambda c, w: f"{_nowhere(c)[0]}=FILE, or data=demo for the bundled rows",
        Example("data.path=null"),
    ),
    Rule(
        "columns-and-tags",
        "data.columns and data.tags name fields and speakers that a format has",
        lambda c, w: bool(_unknown_names(c)),
        lambda c, w: (
            f"{_unknown_names(c)[0]}: columns are of {', '.join(FIELDS)}; tags of {', '.join(TAGS)}"
        ),
        lambda c, w: f"leave {_unknown_names(c)[0].partition('=')[0]} out",
        Example("+data.columns.sytem=persona"),
    ),
    Rule(
        "weights-mix",
        "data.sources with weights are interleaved",
        _weighted,
        lambda c, w: "data.sources have weights, and data.mixing=concatenate takes each row once",
        lambda c, w: "data.mixing=interleave",
        Example(f"data.format=auto {TWO}", files=dict.fromkeys(("a.jsonl", "b.jsonl"), ROW)),
    ),
    Rule(
        "sources-or-format",
        "data.sources say their own format",
        lambda c, w: bool(c.data.sources) and c.data.format != "auto" and not c.data.dataset_info,
        lambda c, w: (
            f"data.format={c.data.format} is that of data.path, and data.sources have formats of "
            "their own"
        ),
        lambda c, w: "data.format=auto",
        Example(f"data.format=messages {ONE}", files={"a.jsonl": ROW}),
    ),
    Rule(
        "one-evaluation-set",
        "at most one of data.eval_path, data.eval_rows and data.eval_fraction names the "
        "evaluation rows",
        lambda c, w: len(_evaluation_sets(c)) > 1,
        lambda c, w: f"{' and '.join(_evaluation_sets(c))} name the rows to evaluate on",
        lambda c, w: "data.eval_rows=0 data.eval_path=null data.eval_fraction=0.1",
        Example("data.eval_path=held_out.jsonl data.eval_rows=32"),
    ),
    Rule(
        "evaluation-needs-rows",
        "training.eval_steps comes with rows to evaluate on",
        lambda c, w: c.training.eval_steps is not None and not c.data.evaluates,
        lambda c, w: f"training.eval_steps={c.training.eval_steps}, and no rows to evaluate on",
        lambda c, w: "data.eval_rows=32, or data.eval_path=FILE, or training.eval_steps=null",
        Example("training.eval_steps=50"),
    ),
    Rule(
        "streaming-holds-nothing-out",
        "data.streaming comes with a file of its own to evaluate on",
        lambda c, w: c.data.streaming and bool(c.data.eval_rows or c.data.eval_fraction),
        lambda c, w: (
            "data.streaming=true does not know which rows can be learnt from before it comes to "
            "them, so none are held out"
        ),
        lambda c, w: "data.eval_rows=0 data.eval_fraction=null, or data.streaming=false",
        Example("data.streaming=true data.eval_rows=32"),
    ),
    Rule(
        "streaming-in-its-own-order",
        "data.streaming neither interleaves nor groups by length",
        lambda c, w: c.data.streaming and (c.data.mixing == "interleave" or c.data.group_by_length),
        lambda c, w: (
            "data.streaming=true knows no lengths and reads its sources one behind the other: "
            "nothing to group by, and no drawing among them"
        ),
        lambda c, w: "data.mixing=concatenate data.group_by_length=false",
        Example("data.streaming=true data.group_by_length=true"),
    ),
    Rule(
        "streaming-joins-no-texts",
        "data.streaming does not join texts over the ends of steps",
        lambda c, w: c.data.streaming and _reads_text(c) and c.data.concatenate,
        lambda c, w: (
            "data.streaming=true does not know where a text begins in a row of several; packing "
            "wastes as little"
        ),
        lambda c, w: "data.concatenate=false data.packing=true",
        Example("data=pretrain data.path=a.txt data.streaming=true", files={"a.txt": "a text\n"}),
    ),
    Rule(
        "packing-is-full",
        "data.packing leaves no lengths to group by",
        lambda c, w: c.data.packing and c.data.group_by_length,
        lambda c, w: "data.packing=true fills every sequence, and data.group_by_length=true too",
        lambda c, w: "data.group_by_length=false",
        Example("data.packing=true data.group_by_length=true"),
    ),
    Rule(
        "template-is-there",
        "data.template is a file, or the name of one that Shardway has",
        _no_template,
        lambda c, w: (
            f"data.template={c.data.template} is neither a .jinja file nor one of "
            f"{', '.join(paths.templates())}"
        ),
        lambda c, w: "data.template=null",
        Example("data.template=mine.jinja"),
    ),
)
