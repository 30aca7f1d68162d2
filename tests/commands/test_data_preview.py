"""`shardway data preview` shows what a run would train on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from launcher.commands import data_preview
from launcher.model.tiny import byte_tokenizer
from tests.helpers.commands import shardway


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Thirty rows: one is too long, one has no answer within the limit, and one is invalid."""
    path = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"q{n}", "output": "a" * (1 + n * 2)} for n in range(28)]
    lines += [{"instruction": "q" * 500, "output": "a"}, {"instruction": "q", "output": ""}]
    lines += [{"instruction": "q", "output": "a" * 500}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def look(rows: Path, *words: str) -> list[str]:
    done = shardway(
        "data", "preview", "model=tiny", f"data.path={rows}", "data.format=alpaca",
        "data.max_length=128", "data.too_long=cut", "data.on_bad_row=skip",
        "data.pad_to_multiple_of=1", *words, cwd=rows.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_preview_shows_rows_lengths_padding_and_lost_rows(rows: Path, tiny: Path) -> None:
    lines = look(rows, "--rows", "1", "training.micro_batch_size=4")
    text = "\n".join(lines)
    assert lines[0].startswith("data: 29 rows, ")
    assert "2 rows cut at data.max_length" in lines[0]
    assert "1 rows left out" in lines[0]
    assert f"1 bad rows skipped, the first: {rows}:30: output is empty" in lines[0]
    assert "q0<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧" in text
    assert "row 1:" not in text
    assert sum(int(line.split()[-1]) for line in lines if "█" in line) == 29
    shares = [float(line.split("%")[0].split()[-1]) for line in lines if "steps per epoch" in line]
    plain, grouped, packed = shares
    assert plain < grouped < packed <= 100
    (configured,) = (line for line in lines if "as configured" in line)
    assert "no packing or grouping" in configured
    assert (rows.parent / "lengths.png").stat().st_size > 5_000


def test_configured_packing_is_shown_and_no_picture_is_written(rows: Path, tiny: Path) -> None:
    lines = look(rows, "--no-picture", "data.packing=true")
    (configured,) = (line for line in lines if "as configured" in line)
    assert "data.packing=true" in configured
    (said,) = (line for line in lines if line.startswith("packing:"))
    assert "29 rows in" in said
    assert not (rows.parent / "lengths.png").exists()


def test_target_tokens_are_green_in_a_terminal() -> None:
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer("abc")["input_ids"])
    trained = np.array([False, True, True])
    assert data_preview.colored(tokenizer, (ids, trained), True) == "a\033[32mbc\033[0m"


def test_data_cannot_send_control_codes_to_the_terminal() -> None:
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer("a\x1b[2Jb\n\u202ec")["input_ids"])
    shown = data_preview.colored(tokenizer, (ids, np.zeros(len(ids), bool)), True)
    assert shown == "a\\x1b[2Jb\n\\u202ec"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("data.path=none.jsonl",), "data.path=none.jsonl cannot be read"),
        (("--row", "999"), "--row 999: there are 166 rows"),
        (("--row", "-1"), "--row -1: there are 166 rows"),
        (("--rows", "-1"), "--rows -1 is negative"),
        (("--output", "a.xyz"), "--output a.xyz is not a picture"),
        (("data.template=nine",), "data.template=nine is neither"),
        (("--output", "gone/a.png"), "the folder of --output gone/a.png does not exist"),
    ],
)
def test_bad_input_gets_a_clear_message(
    tmp_path: Path, tiny: Path, words: tuple[str, ...], sentence: str
) -> None:
    done = shardway("data", "preview", "model=tiny", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_template_that_never_ends_is_named_with_its_row(tmp_path: Path, tiny: Path) -> None:
    rows, template = tmp_path / "rows.jsonl", tmp_path / "endless.jinja"
    rows.write_text('{"instruction": "forever", "output": "a"}\n')
    template.write_text(
        "{% for m in messages %}{% if m.content == 'forever' %}{% for a in range(99999) %}"
        "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    done = shardway(
        "data", "preview", "model=tiny", f"data.path={rows}", "data.format=alpaca",
        f"data.template={template}", "data.row_seconds=0.5", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{rows}:1: the chat template takes more than 0.5 s for this row" in done.stderr
    assert "Traceback" not in done.stderr
