"""The metrics of a step are counted exactly and timed without a wait; counts are independent."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.config.schema.method import METHODS
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.method import build_method
from launcher.model.quantized_linear import QuantizedLinear
from launcher.training import flops, throughput
from launcher.training.throughput import ThroughputMeter, Work
from tests.helpers import conversions, parts
from tests.helpers.parts import CPU, Case, Recorder


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


WORK = Work(targets=30, tokens=80, rows=4, positions=100, pairs=1000)


def steps(
    measured: ThroughputMeter, clock: Clock, seconds: list[float], waits: float = 0.0
) -> None:
    for each in seconds:
        measured.time_data_wait(lambda step: clock.passes(waits), 0)
        clock.passes(each - waits)
        measured.add_step(WORK)


def test_interval_metrics_have_their_documented_values(clock: Clock) -> None:
    measured = ThroughputMeter(CPU, flops.Flops(per_token=50, per_pair=2), peak=10_000.0)
    clock.passes(7)
    measured.restart()  # earlier steps count in no metric
    steps(measured, clock, [1.0, 3.0], waits=0.5)
    figures = measured.read()
    assert figures.pop("peak_memory_bytes") > 1e7
    assert figures == {
        "tokens_per_second": 40.0,
        "target_tokens_per_second": 15.0,
        "samples_per_second": 2.0,
        "step_seconds_p50": 2.0,
        "step_seconds_p95": 2.9,
        "data_wait": 0.25,
        "padding": 0.2,
        "mfu": (50 * 160 + 2 * 2000) / 4 / 10_000,
    }
    steps(measured, clock, [2.0])
    assert measured.read()["tokens_per_second"] == 40.0, "the next interval begins with the reading"


def test_mfu_is_missing_without_a_known_peak(clock: Clock) -> None:
    measured = ThroughputMeter(CPU, flops.Flops(1, 1))
    steps(measured, clock, [1.0])
    assert "mfu" not in measured.read()


def test_percentiles_are_those_of_the_last_hundred_steps(clock: Clock) -> None:
    measured, seconds = ThroughputMeter(CPU), [0.01 * (1 + at * 37 % 101) for at in range(130)]
    steps(measured, clock, seconds)
    figures = measured.read()
    for percent in (50, 95):
        expected = np.percentile(seconds[-100:], percent)
        assert figures[f"step_seconds_p{percent}"] == pytest.approx(expected, abs=1e-6)


def test_on_a_gpu_steps_are_timed_by_events_that_are_read_at_a_flush(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[float] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def elapsed_time(self, end: Any) -> float:
            read.append(end.at - self.at)
            return 1000 * read[-1]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    measured = ThroughputMeter(torch.device("cuda", 0))
    steps(measured, clock, [0.5, 0.5])
    assert read == []
    figures = measured.read()
    assert (figures["step_seconds_p50"], figures["peak_memory_bytes"]) == (0.5, 12345)
    assert read == [0.5, 0.5]


@pytest.mark.parametrize("world", [1, 3])
def test_step_batch_counts_equal_those_of_its_rows(tiny: Path, rows_file: Path, world: int) -> None:
    loaders = [
        Case(tiny, rows_file).loader(rank, world, micro_batch_size=2) for rank in range(world)
    ]
    lengths = [len(loaders[0].rows[row][0]) for row in range(13)]
    total = torch.zeros(5, dtype=torch.int64)
    shapes = 0
    for step in range(loaders[0].steps_per_epoch):
        for loader in loaders:
            step_batch = loader.step_batch(step)
            total += torch.stack(step_batch.counts)
            shapes += sum(batch.input_ids.numel() for batch in step_batch.micro_batches)
    work = Work(*total.tolist())
    assert work[1:] == (
        sum(lengths), 13, shapes, sum(sum(range(1, length + 1)) for length in lengths),
    )  # fmt: skip
    assert work.positions > work.tokens > work.targets


def counted_by_torch(model: nn.Module, length: int) -> tuple[int, int]:
    """(matrix products with weights, attention) of a forward and backward, as torch counts them."""
    ids = torch.randint(0, 200, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    found = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = found.pop("aten.bmm")
    return sum(found.values()), attention


def prepared(folder: Path, method: str, **options: Any) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return build_method(METHODS[method](name=method, **options)).prepare(model, 0)


def test_flops_of_full_training_equal_torch_counts(tiny: Path) -> None:
    model = prepared(tiny, "full")
    counted = flops.count_flops(model)
    products, attention = counted_by_torch(model, 64)
    assert counted.per_token * 64 == products
    # torch counts both halves of the attention matrix, and the rotary angles.
    assert counted.per_pair * 64**2 == pytest.approx(attention, rel=1e-2)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert counted.per_token == 6 * sum(m.in_features * m.out_features for m in linear)


def test_adapter_training_skips_the_flops_of_frozen_weight_gradients(tiny: Path) -> None:
    model = prepared(tiny, "lora", rank=4, dropout=0.0)
    products, attention = counted_by_torch(model, 64)
    counted = flops.count_flops(model)
    # Nothing before the first layer is trained: torch omits the gradient of its input.
    first = model.get_submodule("base_model.model.model.layers.0.self_attn")
    spared = sum(
        each.in_features * each.out_features
        for name, each in first.named_modules()
        if isinstance(each, nn.Linear) and "o_proj" not in name and "lora_B" not in name
    )
    assert (counted.per_token - 2 * spared) * 64 == products
    assert counted.per_pair * 64**2 == pytest.approx(attention, rel=1e-2)


def test_no_backward_flops_are_counted_below_the_first_trained_layer(tiny_untied: Path) -> None:
    model = prepared(tiny_untied, "freeze", layers=1)
    whole, counted = flops.count_flops(prepared(tiny_untied, "full")), flops.count_flops(model)
    products, attention = counted_by_torch(model, 64)
    assert counted.per_token * 64 == pytest.approx(products, rel=0.1)
    assert counted.per_pair * 64**2 == pytest.approx(attention, rel=1e-2)
    assert counted.per_token < 0.75 * whole.per_token


def test_flops_of_a_quantized_layer_depend_on_its_features(tiny: Path) -> None:
    model = prepared(tiny, "lora", rank=4)
    before = flops.count_flops(model)
    name, plain = next(
        (n, m) for n, m in model.named_modules() if n.endswith("base_layer") and "mlp" in n
    )
    parent, _, last = name.rpartition(".")
    packed: Any = torch.zeros(8, 1, dtype=torch.uint8)
    setattr(model.get_submodule(parent), last, QuantizedLinear(plain, packed, None))  # type: ignore[arg-type]
    assert flops.count_flops(model) == before


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("mixtral", {"num_local_experts": 4}, "matrices outside linear layers"),
        ("mistral", {"sliding_window": 16}, "sliding"),
        (
            "gemma3_text",
            {},
            "Gemma3ForCausalLM, whose layers do not all have full attention (full_attention, "
            "sliding_attention)",
        ),
    ],
)
def test_flops_are_missing_for_models_that_the_formula_does_not_cover(
    kind: str, more: dict[str, Any], reason: str
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **more))
    said: list[str] = []
    assert flops.try_count_flops(model, said.append) is None
    assert reason in said[0]
    with pytest.raises(UserError):
        flops.count_flops(model)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 80GB HBM3", torch.float32, 66.9),
        ("NVIDIA H200", torch.float16, 989.4),
        ("NVIDIA H200 NVL", torch.bfloat16, 835.5),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312.0),
        ("NVIDIA L40S", torch.bfloat16, 362.0),
        ("NVIDIA L4", torch.bfloat16, 121.0),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("Tesla V100-SXM2-32GB", torch.float16, None),
    ],
)
def test_a_device_is_matched_by_its_full_name(
    name: str, dtype: torch.dtype, tflops: float | None
) -> None:
    found = flops.peak_flops_by_name(name, dtype)
    assert found == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_the_configured_peak_overrides_that_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    gpu = torch.device("cuda")
    assert flops.peak_flops(gpu, torch.bfloat16, 2.5) == 2.5e12
    assert flops.peak_flops(gpu, torch.bfloat16, None) == pytest.approx(989.4e12)


def test_a_cpu_has_only_a_configured_peak() -> None:
    assert flops.peak_flops(CPU, torch.float32, None) is None
    assert flops.peak_flops(CPU, torch.float32, 2.5) == 2.5e12


def conversions_between_flushes(
    rank_info: RankInfo, case: Case
) -> list[list[conversions.Conversion]]:
    """Tensors converted to Python numbers in each step of `fit` after the first three."""
    train_state, loader = parts.set_up(rank_info, case)
    marks: list[int] = []

    class Marked:
        steps_per_epoch = loader.steps_per_epoch

        def step_batch(self, step: int) -> Any:
            marks.append(len(seen))
            step_batch = loader.step_batch(step)
            del seen[marks[-1] :]  # rows are on the CPU, as the loader is
            return step_batch

    meter = ThroughputMeter(CPU, flops.Flops(1, 1), 1e12)
    with conversions.recorded() as seen:
        parts.fit(train_state, Marked(), parts.plan(9, log_steps=100), Recorder(), meter=meter)
    return [seen[begin:end] for begin, end in pairwise(marks[3:])]


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_between_two_flushes_a_step_reads_only_its_counts(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int
) -> None:
    """Counts are on the CPU on every device."""
    case = Case(tiny, rows_file, strategy=strategy, steps=9)
    for of_steps in ranks.run(world, conversions_between_flushes, case):
        assert of_steps == [[("tolist", torch.int64, (6,))]] * 5
