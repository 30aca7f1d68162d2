"""When FSDP2 gathers which modules, and what it reduces between replicas."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from torch.distributed.tensor import Shard, distribute_tensor

from launcher.distributed.process_group import RankInfo
from launcher.strategy.fsdp_units import describe_padding, split_dim
from launcher.training.loss import token_loss
from tests.helpers import parts
from tests.helpers.parts import Case
from tests.helpers.tiny_models import release


@pytest.mark.parametrize(
    ("shape", "shards", "dim"),
    [
        ((128, 1536, 2048), 64, 0),
        ((8, 28672, 4096), 8, 0),
        ((8, 28672, 4096), 64, 1),
        ((8, 1000, 4096), 64, 2),
        ((8, 1000, 100), 64, 0),  # nothing divides
        ((60, 1408, 2048), 8, 0),  # 64 / 60: little padding
        ((8192, 1, 4), 512, 0),  # a convolution
        ((8, 4096), 64, 0),  # a router
        ((4096,), 8192, 0),
        ((8, 28672, 4096), 1, 0),
    ],
)
def test_rows_are_split_unless_experts_would_be_padded(
    shape: tuple[int, ...], shards: int, dim: int
) -> None:
    assert split_dim(shape, shards) == dim


def padding_of(rank_info: RankInfo, *shapes: tuple[int, ...]) -> str | None:
    mesh = init_device_mesh("cpu", (rank_info.world_size,))
    split = [distribute_tensor(torch.zeros(shape), mesh, [Shard(0)]) for shape in shapes]
    return describe_padding(map(torch.nn.Parameter, split), rank_info.world_size)


def test_what_cannot_be_split_is_named_if_it_is_much_of_the_model(ranks: Any) -> None:
    for message in ranks.run(2, padding_of, (3, 5, 7), (8, 8), (1, 2)):
        assert message.startswith("warning: the fullest rank holds 1.22 times its share")
        assert "0.00 MB too much" in message  # 37 elements of 171, on two ranks
        assert "tensors such as 3×5×7 cannot be split into 2 equal parts" in message
        assert "strategy.shard_size" in message
    assert ranks.run(2, padding_of, (3, 5, 7), (80, 8)) == [None] * 2


def traffic(rank_info: RankInfo, case: Case) -> list[str]:
    """The gathers and reductions of the second micro-batch, by the first parameter of each unit,
    and the decoder layers between them as they run."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy: Any = train_state.strategy
    events: list[str] = []
    for number, layer in enumerate(strategy.model.get_decoder().layers):
        layer.register_forward_pre_hook(lambda *_, number=number: events.append(f"run {number}"))

    def recorded(kind: str, function: Any) -> Any:
        def record(fsdp_params: Any, *args: Any) -> Any:
            name = fsdp_params[0]._param_fqn.removeprefix("model.")
            events.append(f"{kind} {name.split('.self_attn')[0].removesuffix('.weight')}")
            return function(fsdp_params, *args)

        return record

    (batch, *_) = loader.step_batch(0).micro_batches
    strategy.set_last_micro_batch(last=True)
    strategy.backward(token_loss(strategy.model, batch))
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in (("gather", "foreach_all_gather"), ("reduce", "foreach_reduce")):
            patch.setattr(param_group, name, recorded(kind, getattr(param_group, name)))
        events.clear()
        strategy.backward(token_loss(strategy.model, batch))
    return events


UNTIED = """
gather embed_tokens
gather layers.0
gather layers.1
run 0
gather norm
run 1
gather layers.1
reduce norm
gather layers.0
reduce layers.1
reduce layers.0
reduce embed_tokens
"""
TIED = """
gather embed_tokens
gather layers.0
gather layers.1
run 0
run 1
gather layers.1
gather layers.0
reduce layers.1
reduce layers.0
reduce embed_tokens
"""


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_units_are_gathered_ahead_and_the_last_is_kept(
    ranks: Any, tiny: Path, tiny_untied: Path, rows_file: Path, is_tied: bool
) -> None:
    """A layer is gathered before its predecessor runs; the head and its norm once; the embedding
    not in backward."""
    model, expected = (tiny, TIED) if is_tied else (tiny_untied, UNTIED)
    case = Case(model, rows_file, method="full")
    for events in ranks.run(2, traffic, case):
        assert events == expected.strip().split("\n")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("lora", {"modules_to_save": ["norm"]}),
        ("freeze", {"layers": -1, "extra_modules": ["embed_tokens"]}),
        ("freeze", {"layers": 0, "extra_modules": ["lm_head"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_wrapped_and_trained_ends_have_the_losses_of_a_plain_loop(
    ranks: Any, tiny_untied: Path, rows_file: Path, method: str, options: dict[str, Any]
) -> None:
    plain = Case(tiny_untied, rows_file, method=method, method_options=options, steps=5)
    expected = parts.expected_losses(plain)
    for sync in ("every", "last"):
        case = dataclasses.replace(plain, strategy_options={"gradient_sync": sync})
        for found in ranks.run(2, parts.losses, case):
            assert found == pytest.approx(expected, rel=1e-5)


def evaluated(rank_info: RankInfo, case: Case, every: int | None) -> tuple[Any, Any]:
    """The losses of training, and those of an evaluation after each `every` steps."""
    train_state, loader = parts.set_up(rank_info, case)
    recorder, plan = parts.Recorder(), parts.plan(case.steps, eval_steps=every)
    parts.fit(train_state, loader, plan, recorder, evaluation=loader if every else None)
    return recorder.column("loss"), [record["eval_loss"] for record in recorder.evaluations]


def test_a_head_that_is_kept_after_an_evaluation_is_the_next_steps(
    ranks: Any, tiny_untied: Path, rows_file: Path
) -> None:
    case = Case(tiny_untied, rows_file, method="full", steps=4)
    ((losses, found),) = ranks.run(1, evaluated, dataclasses.replace(case, strategy="single"), 1)
    for kept in ranks.run(2, evaluated, case, 1):
        assert kept[0] == pytest.approx(losses, rel=1e-5)
        assert kept[1] == pytest.approx(found, rel=1e-5)
    assert ranks.run(2, evaluated, case, None)[0][0] == kept[0], "to the bit"


def sums_between_replicas(rank_info: RankInfo, case: Case) -> tuple[int, int, int]:
    """The all-reduces over the replicas of a rank's shards in one step, the micro-batches of the
    step, and the units."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy: Any = train_state.strategy
    replicas = strategy.mesh["replicate"].get_group()
    calls: list[Any] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        calls.append(group)
        return all_reduce(tensor, op=op, group=group)

    step_batch = loader.step_batch(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        parts.train_step(strategy, step_batch)
    modules = [each for each in strategy.model.modules() if isinstance(each, FSDPModule)]
    units = {each._get_fsdp_state() for each in modules}
    return calls.count(replicas), len(step_batch.micro_batches), len(units)


@pytest.mark.parametrize("sync", ["every", "last"])
def test_hsdp_sums_over_replicas_once_a_step(
    ranks: Any, tiny: Path, rows_file: Path, sync: str
) -> None:
    options = {"shard_size": 2, "gradient_sync": sync}
    case = Case(
        tiny, rows_file, method="full", strategy="hsdp", strategy_options=options,
        global_batch_size=12,
    )  # fmt: skip
    for sums, micro_batches, units in ranks.run(4, sums_between_replicas, case):
        assert micro_batches == 3
        assert sums == units == 3, "two layers and the rest, of a tied model"


@pytest.mark.parametrize(
    ("model_type", "method", "recomputed"),
    [
        ("inkling_text", "full", "off"),
        ("roberta-prelayernorm", "full", "off"),
        ("roberta-prelayernorm", "lora", "full"),
        ("zamba", "full", "full"),
    ],
)
def test_shared_parameters_and_a_normed_embedding_have_the_losses_of_a_plain_loop(
    ranks: Any, rows_file: Path, tmp_path: Path, model_type: str, method: str, recomputed: str
) -> None:
    """A norm inside the embedding, a bias that the head and its parent have, an attention block
    that two layers have."""
    release(model_type, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {key: 0.0 for key in settings if "dropout" in key}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    case = Case(tmp_path, rows_file, method=method, steps=3)
    expected = parts.expected_losses(case)
    for found in ranks.run(
        2, parts.losses, case.with_training(activation_checkpointing=recomputed)
    ):
        assert found == pytest.approx(expected, rel=1e-4)
