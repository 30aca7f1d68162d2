"""Where an answer ends in the loss, and what happens to rows that are too long."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema.data import DataConfig
from launcher.data.dataset import TokenizedDataset, load_data
from launcher.data.template import loss_mask
from launcher.data.template.chat_template import ChatTemplate
from launcher.data.template.loss_mask import Tokens, fit, tokenize_segments
from launcher.data.tokenize import RowTokenizer
from launcher.errors import UserError
from launcher.model.tiny import byte_tokenizer

PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ROW = Tokens(list(range(10)), [False] * 4 + [True] * 6)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWAY_CACHE", str(tmp_path / "cache"))


def file_of(tmp_path: Path, *answers: str, **columns: Any) -> str:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "q", "output": answer, **columns} for answer in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, **settings: Any) -> TokenizedDataset:
    return load_data(DataConfig(path=path, **settings), byte_tokenizer())


@pytest.mark.parametrize("too_long", ["cut", "drop", "split"])
def test_a_row_that_fits_stays_as_it_is(too_long: str) -> None:
    assert list(fit(ROW, 10, too_long)) == [ROW]


def test_a_row_that_is_too_long_is_cut_dropped_or_split() -> None:
    (cut,) = fit(ROW, 4, "cut")
    assert (cut.ids, cut.truncated, cut.loss_mask) == ([0, 1, 2, 3], True, [False] * 4)
    (dropped,) = fit(ROW, 4, "drop")
    assert (dropped.ids, dropped.too_long) == ([], True)
    parts = list(fit(ROW, 4, "split"))
    assert [part.ids for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [token for part in parts for token in part.loss_mask] == ROW.loss_mask
    assert [part.split for part in parts] == [True, False, False], "the row is counted once"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "drop"),
        ({"format": "text"}, "split"),
        ({"format": "text", "streaming": True}, "cut"),
        ({"streaming": True}, "drop"),
        ({"too_long": "cut"}, "cut"),
    ],
)
def test_auto_drops_conversations_and_splits_texts(settings: dict[str, Any], expected: str) -> None:
    config = DataConfig(path="x", **{"too_long": "auto", **settings})
    assert RowTokenizer(config, config, byte_tokenizer()).too_long == expected


def test_rows_that_are_too_long_are_counted(tmp_path: Path) -> None:
    path = file_of(tmp_path, "short", "long " * 50)
    dropped = load(path, max_length=100, too_long="auto")
    assert len(dropped.rows) == 1
    assert "1 rows left out: longer than data.max_length" in dropped.describe()
    split = load(path, max_length=100, too_long="split")
    assert "1 rows split at data.max_length" in split.describe()
    assert sum(split.rows.lengths) == sum(load(path).rows.lengths), "no token is lost"
    with pytest.raises(UserError, match=r"longer than data.max_length=8 → .*too_long=cut"):
        load(path, max_length=8, too_long="drop")


def test_a_run_resumes_if_no_row_is_too_long_for_its_settings(tmp_path: Path) -> None:
    """The fingerprint is that of version 0.1.0, which cut rows, unless rows differ from it."""
    path = file_of(tmp_path, "short", "longer " * 10)
    ample = [load(path, max_length=500, too_long=mode) for mode in ("cut", "drop", "split")]
    assert len({data.fingerprint for data in ample}) == 1
    tight = [load(path, max_length=60, too_long=mode) for mode in ("cut", "drop", "split")]
    assert len({data.fingerprint for data in tight}) == 3


def test_settings_of_the_template_change_the_fingerprint_only_if_they_are_set(
    tmp_path: Path,
) -> None:
    path, tokenizer = file_of(tmp_path, "a"), byte_tokenizer()
    tokenizer.chat_template = (
        "{{ strftime_now('%Y') if dated else '' }}{{ 'x' if shout else '' }}" + PLAIN
    )

    def fingerprint(**settings: Any) -> str:
        return load_data(DataConfig(path=path, **settings), tokenizer).fingerprint

    plain = fingerprint()
    changed = {
        fingerprint(template_arguments={"shout": True}),
        fingerprint(template_date="2026-01-01"),
        fingerprint(learn_empty_reasoning=False),
    }
    assert len(changed | {plain}) == 4
    tokenizer.chat_template = PLAIN
    assert fingerprint() == fingerprint(template_date="2026-01-01"), "it writes no date"


def test_a_template_writes_the_date_that_is_set() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }} " + PLAIN
    config = DataConfig(path="x", template_date="2024-07-26")
    batch = RowTokenizer(config, config, tokenizer)([("row", {"instruction": "q", "output": "a"})])
    assert tokenizer.decode(batch.ids).startswith("26 July 2024 user: q")


def test_an_argument_that_the_template_does_not_read_is_refused(tmp_path: Path) -> None:
    path, tokenizer = file_of(tmp_path, "a"), byte_tokenizer()
    tokenizer.chat_template = "{{ 'x' if shout else '' }}" + PLAIN
    config = DataConfig(path=path, template_arguments={"shuot": True})
    with pytest.raises(UserError, match=r"template_arguments.shuot is not read .* reads shout"):
        load_data(config, tokenizer)


def test_answers_that_end_in_nothing_are_counted(tmp_path: Path) -> None:
    path, tokenizer = file_of(tmp_path, "a", "b"), byte_tokenizer()
    assert "do not end with a special token" not in load(path).describe()
    tokenizer.chat_template = PLAIN
    told = load_data(DataConfig(path=path), tokenizer).describe()
    assert "answers do not end with a special token" in told
    assert "(2 of them)" in told


def test_text_after_the_last_special_token_is_learned() -> None:
    """A special token inside of an answer, such as the end of its reasoning, does not end it."""
    tokenizer = byte_tokenizer()
    template = ChatTemplate(tokenizer)
    row = [("prompt", False), ("<|im_start|>thought<|im_start|>answer", True)]
    (tokens,) = tokenize_segments(template, [row])
    learned = [i for i, in_loss in zip(tokens.ids, tokens.loss_mask, strict=True) if in_loss]
    assert tokenizer.decode(learned) == row[1][0]
    assert tokens.unended == 1


def test_columns_without_a_meaning_are_named_once_with_their_rows(tmp_path: Path) -> None:
    told = load(file_of(tmp_path, "a", "b", id="x")).describe()
    assert told.count("column id is ignored (2 rows)") == 1
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a text", "url": "here"}\n' * 3)
    data = load(str(path), format="text", max_length=8)
    assert "column url is ignored (3 rows)" in data.describe()


def test_a_token_without_an_embedding_makes_a_row_bad(tmp_path: Path) -> None:
    path, tokenizer = file_of(tmp_path, "a", "b"), byte_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert len(load_data(DataConfig(path=path), tokenizer, vocabulary_size=size).rows) == 2
    path = file_of(tmp_path, "a", "<new>")
    config = DataConfig(path=path)
    with pytest.raises(UserError, match=rf"rows.jsonl:2 contains <new>, token {size} .*add_tokens"):
        load_data(config, tokenizer, vocabulary_size=size)
    skipped = load_data(replace(config, on_bad_row="skip"), tokenizer, vocabulary_size=size)
    assert len(skipped.rows) == 1
    assert len(load_data(config, tokenizer, vocabulary_size=size + 1).rows) == 2


def test_an_empty_think_block_is_learned_or_read() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' else '' }}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = [("row", {"instruction": "q", "output": "a"})]
    learned = {}
    for learn in (True, False):
        config = DataConfig(path="x", learn_empty_reasoning=learn)
        batch = RowTokenizer(config, config, tokenizer)(rows)
        learned[learn] = tokenizer.decode(batch.ids[batch.loss_mask])
    assert learned == {True: "<think>\n\n</think>\n\na<|im_end|>", False: "a<|im_end|>"}


def test_a_text_on_which_the_tokenizer_gives_up_is_named() -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert loss_mask._encode(tokenizer, ["a", "b"], "") == [[0], [1]]
    with pytest.raises(UserError, match=r"gives up on the text 'aaa.*!': .*retry-limit"):
        loss_mask._encode(tokenizer, ["a", "a" * 40 + "!"], "")
