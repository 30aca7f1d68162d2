"""`shardway consolidate --evaluate ROWS`: the loss of the result and of its source."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.errors import UserError
from tests.helpers.exports import consolidate, make_adapter

TEXTS = ["What is it?", "A cat. It sleeps, and it is warm."]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """One conversation and one raw text a line, in two files."""
    talks = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": t}]}
             for t in TEXTS]  # fmt: skip
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    return tmp_path


def evaluation(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    consolidate(*words, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["evaluation"]
    return found


def loss_of(model: Any, texts: list[str], tokenizer: Any) -> float:
    """Per token, by transformers' own loss; each text is followed by the end token."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def test_the_losses_are_those_of_the_export_and_of_base_plus_adapter(
    rows: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", noise=0.3)
    words = (adapter, "--evaluate", rows / "texts.jsonl", "--output", tmp_path / "out")
    consolidate(*words, "--json", "--progress-seconds", 0.000001)
    said = capsys.readouterr()
    found = json.loads(said.out)["evaluation"]
    for folder in ("out", tiny.name):
        done = f"evaluating {folder} {found['tokens']} of {found['tokens']} tokens, "
        assert re.search(re.escape(done) + r"[\d,]+ tokens/s, 0 s left", said.err)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype="auto")
    assert found["result"] == pytest.approx(loss_of(exported, TEXTS, tokenizer), rel=1e-4)
    plain = loss_of(base, TEXTS, tokenizer)
    adapted = loss_of(PeftModel.from_pretrained(base, adapter), TEXTS, tokenizer)
    assert found["source"] == pytest.approx(adapted, rel=1e-4)
    assert abs(plain - adapted) > 1e-2, "the adapter matters"
    assert found["compared_with"] == f"{tiny} + {adapter}, not merged"
    assert found["tokens"] > sum(map(len, TEXTS)) / 4


def test_a_chain_of_adapters_is_merged_before_the_last_one(
    rows: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_adapter(tiny, tmp_path / "first", noise=0.3)
    consolidate(first, "--output", tmp_path / "base")
    capsys.readouterr()
    last = make_adapter(tmp_path / "base", tmp_path / "last", noise=0.3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    expected = loss_of(
        PeftModel.from_pretrained(base, last), TEXTS, AutoTokenizer.from_pretrained(tiny)
    )
    settings = json.loads((last / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(first)
    (last / "adapter_config.json").write_text(json.dumps(settings))
    words = (last, "--evaluate", rows / "texts.jsonl", "--output", tmp_path / "out")
    found = evaluation(capsys, *words)
    assert found["source"] == pytest.approx(expected, rel=1e-2)
    assert found["result"] == pytest.approx(expected, rel=1e-2)
    assert found["compared_with"] == f"{tiny} + {first} + {last}, not merged"


def test_conversations_are_read_and_two_adapters_are_summed(
    rows: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_adapter(tiny, tmp_path / "one", target_modules=["q_proj"])
    two = make_adapter(tiny, tmp_path / "two", target_modules=["q_proj", "v_proj"])
    words = (tiny, "--adapter", one, "--adapter", two, "--dtype", "fp32")
    consolidate(*words, "--evaluate", rows / "talks.jsonl", "--output", tmp_path / "out")
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("loss per token")]
    result, source = (float(word.rstrip(";")) for word in line.split()[3:5])
    assert result == pytest.approx(source, rel=2e-2)
    assert line.endswith(f"of {tiny} + {one} + {two}, not merged")


def test_a_sharded_checkpoint_has_no_loss_of_its_own(
    rows: Path, tmp_path: Path, tiny_untied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "dcp"
    shutil.copytree(tiny_untied, source, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype=torch.bfloat16)
    dcp.save({"model": model.state_dict()}, checkpoint_id=source)
    words = (source, "--evaluate", rows / "talks.jsonl", "--output", tmp_path / "out")
    found = evaluation(capsys, *words)
    assert found["source"] is None
    assert "no library loads" in found["compared_with"]


@pytest.mark.parametrize("option", ["--adapter-only", "--dry-run"])
def test_nothing_to_evaluate_is_refused(
    option: str, rows: Path, tmp_path: Path, tiny: Path
) -> None:
    words = (tiny, "--evaluate", rows / "talks.jsonl", "--output", tmp_path / "out", option)
    with pytest.raises(UserError, match=f"--evaluate .* and {option} writes none → one of"):
        consolidate(*words)


def test_bad_rows_are_refused_before_anything_is_written(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": 1}')
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        consolidate(tiny, "--evaluate", tmp_path / "bad.jsonl", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conversations_that_are_too_long_leave_the_export(tmp_path: Path, tiny: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a b " * 2_000}]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": talk}))
    with pytest.raises(UserError, match=r"up to 2,048 tokens .* → shorter rows\. The export in"):
        consolidate(tiny, "--evaluate", tmp_path / "long.jsonl", "--output", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_source_that_cannot_be_loaded_is_a_reason(
    rows: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export renames what PEFT would ignore: here, a tensor that the base has no module for."""
    adapter = make_adapter(tiny, tmp_path / "adapter")
    consolidate(adapter, "--output", tmp_path / "out")
    from launcher.training.folder_loss import Model, data_config, mean_loss, read_rows

    read = read_rows(data_config(str(rows / "talks.jsonl")), tiny)
    file = adapter / "adapter_model.safetensors"
    tensors = {name.replace("layers.1.", "layers.7."): t for name, t in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"adapts model\.layers\.7\..* which its base lacks"):
        mean_loss(Model(tiny, (adapter,)), read, "cpu")


def test_without_the_option_training_is_not_imported() -> None:
    code = "import launcher.commands.consolidate, sys; sys.exit('launcher.training' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
