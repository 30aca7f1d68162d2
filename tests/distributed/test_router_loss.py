"""The routers' auxiliary loss counts by tokens: of ranks, of micro-batches, without padding."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from launcher.distributed.process_group import RankInfo
from tests.helpers import parts
from tests.helpers.experts import make_experts
from tests.helpers.parts import Case

COEFFICIENT = 0.5  # so that it matters


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, rows_file: Path) -> Case:
    folder = make_experts(tmp_path_factory.mktemp("routers"), 6)
    return Case(
        folder, rows_file, method="full", steps=2, global_batch_size=4,
        training_options={"router_aux_loss": str(COEFFICIENT)},
    )  # fmt: skip


def records(rank_info: RankInfo, case: Case) -> list[tuple[float, float, float]]:
    """(loss, auxiliary loss, gradient norm) of each step."""
    train_state, loader = parts.set_up(rank_info, case)
    recorder = parts.Recorder()
    parts.fit(train_state, loader, parts.plan(case.steps), recorder)
    return [(each["loss"], each["aux_loss"], each["grad_norm"]) for each in recorder.steps]


@cache
def plain_records(case: Case) -> list[tuple[float, float, float]]:
    """The same by a plain loop over single rows, each without padding."""
    model = parts.plain_model(case).train()
    optimizer = torch.optim.AdamW(
        parts.decayed_and_not(list(model.parameters()), case.weight_decay),
        lr=case.learning_rate, fused=False, foreach=False,
    )  # fmt: skip
    scheduler, loader = case.build_scheduler(optimizer), case.loader()
    found = []
    for step in range(case.steps):
        batch = loader.step_batch(step)
        total_loss = total_aux = 0.0
        for row in batch.micro_batches:
            (length,) = row.lengths.tolist()  # type: ignore[union-attr]
            output = model(input_ids=row.input_ids[:, :length], output_router_logits=True)
            aux = load_balancing_loss_func(output.router_logits, 6, 2)
            real = row.target_ids >= 0
            loss = torch.nn.functional.cross_entropy(
                output.logits[0, row.target_positions[real]], row.target_ids[real], reduction="sum"
            ) / int(batch.target_tokens)
            aux = aux * length / int(batch.tokens)
            (loss + COEFFICIENT * aux).backward()
            total_loss, total_aux = total_loss + loss.item(), total_aux + aux.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), parts.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        found.append((total_loss, total_aux, norm.item()))
    return found


@pytest.mark.parametrize(
    ("strategy", "world", "options"),
    [
        ("fsdp", 2, {}),
        ("zero3", 2, {}),
        ("ddp", 2, {"activation_checkpointing": "full", "loss": "whole"}),
    ],
)
def test_losses_equal_a_plain_loop(
    ranks: Any, case: Case, strategy: str, world: int, options: dict[str, Any]
) -> None:
    expected = plain_records(case)
    case = dataclasses.replace(case, strategy=strategy).with_training(**options)
    for found in ranks.run(world, records, case):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
