"""New tokens from the command line to a model that writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.folders.extended_model import extended_folder
from tests.helpers.commands import TRAIN_TINY, shardway

TOKENS = ["<|tool|>", "<note>"]
ROWS = 259  # of the tiny model
TWO_STEPS = ("training.epochs=null", "training.max_steps=2")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations with the new tokens."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    messages = [
        {"role": "user", "content": "call <|tool|>"},
        {"role": "assistant", "content": "<|tool|> said <note>x<note>"},
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(16)))
    return path


@pytest.mark.parametrize(
    ("method", "strategy", "tied"),
    [
        pytest.param("full", "fsdp", True, marks=pytest.mark.whole),
        ("lora", "zero3", False),
        pytest.param("lora", "fsdp", True, marks=pytest.mark.whole),
    ],
)
def test_new_tokens_are_trained_saved_and_written(
    tiny: Path,
    tiny_untied: Path,
    rows: Path,
    tmp_path: Path,
    method: str,
    strategy: str,
    tied: bool,
) -> None:
    base = tiny if tied else tiny_untied
    words = (
        *(*TRAIN_TINY, f"model.name_or_path={base}", f"data.path={rows}"),
        *(f"method={method}", f"strategy={strategy}", "cluster.nproc_per_node=2"),
        *(f"model.add_tokens={json.dumps(TOKENS)}", "optimizer.learning_rate=0.01"),
        *("training.global_batch_size=4", "run_dir=run", *TWO_STEPS),
    )
    done = shardway(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "new tokens: 2 added (<|tool|>, <note>); embedding: 259 → 320 rows" in done.stdout
    assert "new tokens: the embedding and the output head are trained:" in done.stdout
    done = shardway("consolidate", "run", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    before = load_file(extended_folder(base, TOKENS) / "model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    assert ("lm_head.weight" in after) is (not tied)
    for name in ("model.embed_tokens.weight", *["lm_head.weight"] * (not tied)):
        changed = (before[name] != after[name]).any(dim=1)
        assert len(changed) == 320
        assert changed[[ROWS, ROWS + 1]].all(), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("<|tool|>", return_tensors="pt", add_special_tokens=False)
    assert prompt["input_ids"].tolist() == [[ROWS]]
    answer = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape == (1, 4)
