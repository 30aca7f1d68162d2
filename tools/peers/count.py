"""Counts the tokens in the batches of a peer and times its steps. Runs inside the peer."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from peers.job import ALPHA, LEARNING_RATE, RANK, SEED, Job

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class Count(TrainerCallback):
    """Write one line per step. The loader prefetches, so batches are assigned to steps by their
    order: step n used the nth group of `accumulation` batches."""

    def __init__(self, job: Job) -> None:
        self.accumulation = job.accumulation
        self.lines = job.counts(int(os.environ.get("RANK", "0"))).open("w", buffering=1)
        self.batches: list[tuple[int, int]] = []  # tokens without padding, trained tokens
        self.ended = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        loader = parts["train_dataloader"].base_dataloader  # the loader that accelerate wraps
        loader.collate_fn = self._counted(loader.collate_fn)

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.ended = time.time()

    def on_log(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        loss = parts["logs"].get("loss")
        if loss is None:  # the summary at the end
            return
        step = state.global_step
        mine = self.batches[(step - 1) * self.accumulation : step * self.accumulation]
        tokens, trained = (sum(counts) for counts in zip(*mine, strict=True))
        line = {"step": step, "loss": loss, "tokens": tokens, "trained_tokens": trained}
        self.lines.write(json.dumps({**line, "time": self.ended}) + "\n")

    def _counted(self, collate: Collate) -> Collate:
        def counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
            tokens = sum(_tokens(row) for row in rows)
            batch = collate(rows)
            self.batches.append((tokens, int((batch["labels"] != -100).sum())))
            return batch

        return counted


def _tokens(row: dict[str, Any]) -> int:
    """Tokens without padding: some peers pad a pack before the collator, and mask the padding."""
    if "attention_mask" in row:
        return sum(1 for each in row["attention_mask"] if each)
    return len(row["input_ids"])


def arguments(job: Job) -> dict[str, Any]:
    """The arguments that all arms based on the Trainer of transformers share."""
    return {
        "output_dir": job.folder,
        "max_steps": job.steps,
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.accumulation,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "use_cpu": True,
        "bf16": True,
        "ddp_backend": "gloo" if job.ranks > 1 else None,
    }


def adapter() -> dict[str, Any]:
    """The PEFT arguments for the adapter, which is the same in every arm."""
    return {
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }


def prompt(tokenizer: Any, question: str) -> str:
    """The text of the chat template up to the start of the answer."""
    turn = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return str(text)
