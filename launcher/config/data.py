"""Schema of `data=`: what is learnt."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.setting import setting


@dataclass(kw_only=True, slots=True)
class DataConfig:
    name: str = setting("data", "names the data set in logs")
    path: str = setting(help="a .json or .jsonl file; of raw text also .txt")
    format: str = setting(
        "auto",
        "how a row is read; auto looks at the keys; text is raw text for pre-training",
        choices=("auto", "alpaca", "messages", "text"),
    )
    concatenate: bool = setting(
        True,
        "of format=text: texts end to end, cut into rows of data.max_length; false: a row each "
        "(of a .txt file each line)",
    )
    max_length: int = setting(2048, "tokens a row keeps; what is beyond is cut off", minimum=8)
    pad_to_multiple_of: int = setting(
        32, "batch lengths are rounded up to this; few shapes keep the CPU fast", minimum=1
    )
    shuffle: bool = setting(True, "a new order every epoch, drawn from training.seed")
    eval_path: str | None = setting(None, "a file of its own to evaluate on")
    eval_rows: int = setting(0, "or: rows held out of data.path to evaluate on", minimum=0)
