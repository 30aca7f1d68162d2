"""Activation checkpointing, NEFTune and label smoothing work under every strategy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from launcher.data.collate import IGNORED
from launcher.distributed.process_group import RankInfo
from launcher.model.layers import decoder_layers
from launcher.model.neftune import add_noise
from launcher.training.loss import token_loss
from tests.helpers import parts
from tests.helpers.checkpoints import END, STOP, run_steps
from tests.helpers.parts import Case

CELLS = [
    ("full", "single", 1, "2"),
    ("lora", "ddp", 2, "full"),
    ("full", "fsdp", 2, "full"),
    ("lora", "fsdp", 3, "2"),
    ("full", "zero1", 2, "full"),
    ("lora", "zero3", 2, "full"),
]


def counted_losses(rank_info: RankInfo, case: Case) -> tuple[list[float], list[float], int]:
    """Losses and gradient norms of the steps, and attention forwards per micro-batch."""
    train_state, loader = parts.set_up(rank_info, case)
    calls = []
    for name, module in train_state.model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_hook(lambda *_: calls.append(1))
    recorder = parts.Recorder()
    parts.fit(train_state, loader, parts.plan(case.steps), recorder)
    micro_batches = sum(len(loader.step_batch(step).micro_batches) for step in range(case.steps))
    return recorder.column("loss"), recorder.column("grad_norm"), len(calls) // micro_batches


@pytest.mark.parametrize(("method", "strategy", "world", "choice"), CELLS)
def test_recomputing_activations_is_exact_to_the_bit(
    ranks: Any, tiny: Path, rows_file: Path, method: str, strategy: str, world: int, choice: str
) -> None:
    dropout = {"dropout": 0.1} if method == "lora" else {}
    case = Case(
        tiny, rows_file, method=method, strategy=strategy, method_options=dropout, steps=2,
        scheduler="constant",
    )  # fmt: skip
    layers = len(decoder_layers(parts.plain_model(case)))
    kept = ranks.run(world, counted_losses, case)
    assert {each[2] for each in kept} == {layers}
    again = layers if choice == "full" else math.ceil(layers / int(choice))
    chosen = case.with_training(activation_checkpointing=choice)
    found = ranks.run(world, counted_losses, chosen)
    assert [each[:2] for each in found] == [each[:2] for each in kept]
    assert {each[2] for each in found} == {layers + again}


def saved_bytes(rank_info: RankInfo, case: Case) -> int:
    """Bytes that autograd keeps in a forward, counting each storage once."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy = train_state.strategy
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    strategy.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_loss(strategy.model, loader.step_batch(0).micro_batches[0])
    return sum(kept.values())


def test_recomputing_keeps_fewer_bytes(ranks: Any, tiny: Path, rows_file: Path) -> None:
    case = Case(tiny, rows_file, method="lora", strategy="single", micro_batch_size=6)
    sizes = [
        ranks.run(1, saved_bytes, case.with_training(activation_checkpointing=choice))[0]
        for choice in ("full", "2", "off")
    ]
    assert sizes[0] < sizes[1] < sizes[2]


def noisy_evaluation(rank_info: RankInfo, case: Case) -> tuple[float, float, float]:
    """Evaluation loss, and the training loss of one batch, computed twice."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy = train_state.strategy
    batch = loader.step_batch(0).micro_batches[0]
    strategy.model.train()
    first, second = (token_loss(strategy.model, batch).item() for _ in range(2))
    strategy.model.eval()
    return token_loss(strategy.model, batch).item(), first, second


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("fsdp", 2)])
def test_noise_is_added_only_in_training(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int
) -> None:
    case = Case(tiny, rows_file, strategy=strategy)
    quiet = ranks.run(world, noisy_evaluation, case)
    noisy = ranks.run(world, noisy_evaluation, case.with_training(neftune_alpha=50.0))
    for without, found in zip(quiet, noisy, strict=True):
        assert without[0] == without[1] == without[2]
        assert found[0] == without[0]
        assert len(set(found)) == 3


def test_noise_resumes_where_it_stopped(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    case = Case(tiny, rows_file, strategy="fsdp", steps=END).with_training(neftune_alpha=5.0)
    whole = ranks.run(2, run_steps, case, tmp_path / "whole", 0, END)
    first = ranks.run(2, run_steps, case, tmp_path / "parts", 0, STOP)
    second = ranks.run(2, run_steps, case, tmp_path / "parts", STOP, END)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


def test_noise_has_the_magnitude_from_the_paper(tiny: Path, rows_file: Path) -> None:
    model = parts.plain_model(Case(tiny, rows_file, method="full")).train()
    ids = torch.arange(24).view(2, 12)
    embed = model.get_input_embeddings()
    clean = embed(ids).detach()
    add_noise(model, 5.0)
    noise = embed(ids).detach() - clean
    bound = 5.0 / math.sqrt(12 * clean.shape[-1])
    assert 0.95 * bound < noise.abs().max() <= bound * 1.001
    assert noise.mean().abs() < 0.1 * bound


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothed_loss_equals_torch_for_each_token(
    tiny: Path, rows_file: Path, smoothing: float
) -> None:
    case = Case(tiny, rows_file, method="full")
    model = parts.plain_model(case).eval()
    (batch,) = parts.plain_loader(case).step_batch(0).micro_batches
    logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.target_positions]
    targets = batch.target_ids
    each = cross_entropy(
        logits, targets, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
    )
    found = token_loss(model, batch, smoothing)
    torch.testing.assert_close(found, each.sum())
    chances = log_softmax(logits[targets != IGNORED], dim=-1)
    said = -chances.gather(1, targets[targets != IGNORED].unsqueeze(1)).squeeze(1)
    by_hand = (1 - smoothing) * said - smoothing * chances.mean(dim=1)
    torch.testing.assert_close(found, by_hand.sum())
    assert found > token_loss(model, batch)
