"""The benchmark against peers: every system gets the same rows, and the figures are correct."""

from __future__ import annotations

import importlib
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from launcher.data.rows.row_formats import to_conversation
from launcher.data.template.chat_template import ChatTemplate
from launcher.data.template.loss_mask import tokenize_segments
from launcher.data.template.segments import render_segments
from launcher.errors import UserError
from launcher.model.tiny import byte_tokenizer

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the tool, by name."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return lambda name: importlib.import_module(f"peers.{name}")


@pytest.fixture
def run_of(peers: Any) -> Any:
    """A run whose nth step takes `seconds[n]` and trains on `trained` of 2 * `trained` tokens."""
    process = peers("process")

    def make(
        arm: str, seconds: list[float], number: int = 0, trained: int = 100, loss: float = 2.0
    ) -> Any:
        ends = [sum(seconds[: at + 1]) for at in range(len(seconds))]
        steps = [
            process.Step(at, loss, 2 * trained, trained, 50.0 + end)
            for at, end in enumerate(ends, start=1)
        ]
        return process.Run(arm, ranks=1, round=number, steps=steps, began=40.0, peak_rss=10**9)

    return make


def test_synthetic_rows_depend_only_on_the_seed(peers: Any) -> None:
    rows = peers("rows")
    made = rows.made_up(50, seed=1)
    assert made == rows.made_up(50, seed=1)
    assert made != rows.made_up(50, seed=2)
    assert made[:20] == rows.made_up(20, seed=1)


def test_synthetic_rows_vary_in_length_like_real_ones(peers: Any) -> None:
    rows = peers("rows")
    words = [len(row["output"].split()) for row in rows.made_up(1000, seed=42)]
    assert 50 <= statistics.median(words) <= 90
    assert statistics.mean(words) > 1.2 * statistics.median(words)  # a long tail
    assert max(words) <= rows.MOST_WORDS


def test_rows_that_a_system_would_truncate_are_left_out(peers: Any) -> None:
    rows, tokenizer = peers("rows"), byte_tokenizer()
    made = rows.made_up(40, seed=3)
    kept, lengths = rows.fitting(made, tokenizer, max_length=400)
    talks = [to_conversation("", row, "alpaca", {}) for row in made]
    template = ChatTemplate(tokenizer)
    rendered = [row for talk in talks for row in render_segments(template, talk, "answers", "")]
    whole = [len(tokens.ids) for tokens in tokenize_segments(template, rendered)]
    assert 0 < len(kept) < len(made)
    assert kept == [row for row, tokens in zip(made, whole, strict=True) if tokens <= 400]
    assert lengths == [tokens for tokens in whole if tokens <= 400]


def test_rows_that_peers_read_differently_are_refused(peers: Any, tmp_path: Path) -> None:
    rows, path = peers("rows"), tmp_path / "rows.json"
    row = {"instruction": "a", "input": "", "output": "b"}
    rows.write([row, {**row, "system": "c"}], path)
    assert rows.of_file(path, 1) == [row]
    with pytest.raises(UserError, match=r"rows\.json\[1\] has system"):
        rows.of_file(path, 2)


def test_peers_get_the_same_questions_as_shardway(peers: Any, tmp_path: Path) -> None:
    rows, path = peers("rows"), tmp_path / "rows.json"
    rows.write([{"instruction": "Add.", "input": "1 2", "output": "3"}], path)
    job = peers("job").Job("", str(path), "", 1, 1, 1, 1, 8, {})
    talk = to_conversation("", json.loads(path.read_text())[0], "alpaca", {})
    (text,) = job.texts()
    assert [text["question"], text["answer"]] == [turn["content"] for turn in talk.messages]


def test_the_rate_excludes_the_warm_up(peers: Any, run_of: Any) -> None:
    figures, run = peers("figures"), run_of("hf", [30.0, 20.0, 2.0, 3.0])
    assert figures.rate(run, "trained_tokens", warm_up=2) == pytest.approx(200 / 5)
    assert figures.rate(run, "tokens", warm_up=2) == pytest.approx(400 / 5)
    assert run.first_step_seconds == pytest.approx(40.0)


def test_a_ratio_is_taken_within_a_round(peers: Any, run_of: Any) -> None:
    """In the second and third round the machine was ten times slower for both systems."""
    figures = peers("figures")
    ours = [run_of("shardway", [9, 9, 1 * slow], at) for at, slow in enumerate((1, 10, 10))]
    theirs = [run_of("hf", [9, 9, 3 * slow], at) for at, slow in enumerate((1, 10, 10))]
    assert figures.ratio([*theirs, *ours], "shardway", "hf", 1, 2) == pytest.approx(3.0)
    assert figures.ratio(ours, "shardway", "hf", 1, 2) is None
    assert figures.ratio([ours[0], theirs[1]], "shardway", "hf", 1, 2) is None


def test_the_table_shows_which_arms_did_not_run(peers: Any, run_of: Any) -> None:
    figures, arms = peers("figures"), {arm.name: arm for arm in peers("arms").ARMS}
    chosen = [arms[name] for name in ("shardway", "hf", "trl", "llamafactory")]
    failed = run_of("hf", [1.0])
    failed.failed = "there/log.txt"
    runs = [run_of("shardway", [1, 1, 2]), failed, run_of("trl", [60])]
    first, *rest = figures.table(runs, chosen, 1, 2).splitlines()[2:]
    assert "| 50.0 | 100.0 | 11.0 s | 1,000 MB | 300 in 3 steps | 2.000 |" in first
    assert [line.split("|")[3].strip() for line in rest] == [
        "failed: there/log.txt",
        "too slow for the time it had",
        "not run",
    ]


def test_losses_and_tokens_of_arms_in_order_are_compared(peers: Any, run_of: Any) -> None:
    figures, arms = peers("figures"), {arm.name: arm for arm in peers("arms").ARMS}
    chosen = [arms[name] for name in ("shardway", "hf", "trl", "trl-packed")]
    packed = run_of("trl-packed", [1, 1], trained=7, loss=9.0)
    runs = [run_of("shardway", [1, 1]), run_of("hf", [1, 1], loss=2.02), packed]
    assert "in all of them" in figures.agreement(runs, chosen, 1)
    assert "hf 1.0e-02" in figures.agreement(runs, chosen, 1)
    runs.append(run_of("trl", [1, 1], trained=101))
    assert "**not** in trl;" in figures.agreement(runs, chosen, 1)


@pytest.mark.parametrize(
    ("tokens", "ranks", "packs"), [(1600, 1, 3), (1600, 2, 4), (100, 2, 2), (1300, 1, 3)]
)
def test_packs_contain_about_the_tokens_of_a_step(
    peers: Any, tokens: int, ranks: int, packs: int
) -> None:
    assert peers("figures").packs(tokens, 512, ranks) == packs


def test_arms_have_unique_names_and_a_known_system(peers: Any) -> None:
    arms = peers("arms")
    names = [arm.name for arm in arms.ARMS]
    assert len(set(names)) == len(names)
    assert {arm.system for arm in arms.ARMS} == set(arms.SYSTEMS)


def test_an_arm_with_an_unknown_setting_is_left_out_with_a_message(peers: Any) -> None:
    arms = peers("arms")
    arm = arms.Arm("new", "shardway", "", {"strategy": "ddp", "data.max_lenght": 8})
    assert arms.missing(arm).startswith("data.max_lenght is not a setting; did you mean")
    assert arms.missing(arms.Arm("old", "shardway", "", {"data.max_length": 8})) is None
    assert arms.missing(arms.Arm("peer", "trl", "", {"packing": True})) is None
