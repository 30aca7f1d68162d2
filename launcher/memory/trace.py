"""Traces: dry runs of a model with few of its layers; `estimate.py` computes the others.

    python -m launcher.memory.trace NODES NPROC_PER_NODE

Reads one request a line, as JSON: {"config": FILE, "more_layers": 0 or 1, "min_layers": N,
"wider_rows": 0 or N}. Answers each with a line of JSON: the fields of Trace, or `refused` with the
reason. One process answers many requests, because starting torch takes longer than a trace.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from launcher.config import Config, store
from launcher.data.loader import StepBatch
from launcher.distributed.collectives import root_cause
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.memory import load_and_save
from launcher.memory.dry_run import (
    PhaseRecorder,
    build_assembled,
    fake_model,
    join_fake_ranks,
    longest_step_batch,
    patched_deepspeed,
)
from launcher.memory.estimate import SEPARATOR, Amounts, Trace
from launcher.memory.fake_weights import FakeWeights, make_parameters_fake
from launcher.memory.mem_tracker import FakeTensors, bytes_of
from launcher.memory.work import WorkTracker
from launcher.memory.zero import (
    gathered_ahead,
    layers_in_a_bucket,
    layers_kept_gathered,
    most_gathered,
    without_prefetch,
)
from launcher.model.layers import decoder_layers
from launcher.model.load import Weights
from launcher.strategy import Strategy
from launcher.strategy.optimizer_state import optimizer_tensors
from launcher.strategy.precision import precision_of
from launcher.training.build import AssembledModel, new_strategy
from launcher.training.loop import train_step

BLOCKS = 3  # a first, a last and one between them


def main() -> None:
    """Answer requests until the input ends."""
    rank_info = join_fake_ranks(*map(int, sys.argv[1:]))
    warnings.simplefilter("ignore")
    gc.disable()  # the tracker collects
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    for line in sys.stdin:
        request = json.loads(line)
        try:
            config = store.load(Path(request["config"]))
            numbers = (request[key] for key in ("more_layers", "min_layers", "wider_rows"))
            found = trace(config, rank_info, *numbers)
            answer = dataclasses.asdict(found)
        except UserError as error:
            answer = {"refused": str(error)}
        except Exception as error:  # an operation that fake tensors lack; others may be answered
            answer = {"refused": f"fake tensors failed: {root_cause(error)}"}
        print(json.dumps(answer), file=answers, flush=True)


def trace(
    config: Config, rank_info: RankInfo, more: int = 0, min_layers: int = 1, wider_rows: int = 0
) -> Trace:
    """Two steps, of two micro-batches and of one, on the first layers of the model: on as few as
    show what each further one adds, and on `more` further repetitions.

    `min_layers`: at least that many. `wider_rows`: another step of one micro-batch has that many
    rows. Raises UserError for a run that cannot be planned.
    """
    precision = precision_of(config.precision)
    with patched_deepspeed(config):
        gc.collect()
        gc.freeze()  # what was imported: DeepSpeed and the tracker collect often
        model = fake_model(config)
        reads_all = load_and_save.reads_whole_model(config, model)
        most, config = most_gathered(model, config), without_prefetch(config)
        all_layers, used = cut_layers(model, config, more, min_layers)
        layers = decoder_layers(model)  # FSDP2 will change their class
        strategy, tracker = new_strategy(config, rank_info), WorkTracker()
        with FakeTensors(), tracker.track():
            make_parameters_fake(model)
            weights = Weights(FakeWeights(model, precision.compute), model)
            config, assembled = build_assembled(config, model, weights, lambda: strategy, rank_info)
            if config.strategy.steps_on_cpu or config.strategy.parameters_on_cpu:
                tracker.exclude_host_tensors(strategy.host_tensors)
            sizes = _sizes(assembled, precision.compute)
            if most:
                ahead = gathered_ahead(strategy.model, most, sizes["working"] / sizes["elements"])
                tracker.ahead = lambda: ahead() if _is_computing(tracker.phase) else 0
            amounts, wider = _train(config, assembled, layers, rank_info, tracker, wider_rows)
    sizes["loading"] = load_and_save.whole_model_bytes(config, model) if reads_all else 0
    sizes["layers"] = used
    found = [each | sizes if each else {} for each in (amounts, wider)]
    return Trace(layers=used, all_layers=all_layers, amounts=found[0], wider=found[1])


def cut_layers(model: nn.Module, config: Config, more: int, min_layers: int) -> tuple[int, int]:
    """Remove all but the first layers. Returns (layers before, layers now).

    Layers repeat with a period, after some that are alone, such as dense ones before experts. What
    is kept is alone, or a repetition. A model whose layers do not repeat keeps all of them.
    """
    layers = decoder_layers(model)
    alone, period = repetition([_kind(layer, model, at) for at, layer in enumerate(layers)])
    every = config.training.activation_checkpointing
    if every.isdigit() and int(every) % period:
        period *= int(every)
    like_others = max(layers_kept_gathered(model, config), layers_in_a_bucket(model, config))
    min_layers = max(min_layers, BLOCKS - 1 + like_others)
    blocks = max(BLOCKS, -(-(min_layers - alone) // period)) + more
    keep = alone + blocks * period
    holders = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    holder = next((each for each in holders if [*each] == layers), None)
    is_whole = (len(layers) - alone) % period != 0
    if keep >= len(layers) or holder is None or is_whole:
        return len(layers), len(layers)
    del holder[keep:]
    return len(layers), keep


def repetition(kinds: Sequence[Any]) -> tuple[int, int]:
    """(number of layers that are alone, period of the others) with the fewest layers in both."""
    count = len(kinds)
    options = (
        (alone, period)
        for total in range(1, count + 1)
        for alone in range(total)
        for period in (total - alone,)
        if all(kinds[at] == kinds[at - period] for at in range(alone + period, count))
    )
    return next(options)


def _kind(layer: nn.Module, model: nn.Module, at: int) -> Any:
    """What distinguishes a layer: shapes of its parameters, and its kind of attention."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)  # type: ignore[union-attr,operator]
    shapes = tuple((name, tuple(each.shape)) for name, each in layer.named_parameters())
    return shapes, kinds[at] if kinds else None


def _train(
    config: Config,
    assembled: AssembledModel,
    layers: Sequence[nn.Module],
    rank_info: RankInfo,
    tracker: WorkTracker,
    wider_rows: int,
) -> tuple[Amounts, Amounts]:
    """Run the steps. Returns what they need, and what they would need with `wider_rows`.

    `peak1/…`: memory by phase, loading included, if steps have one micro-batch; `peak2/…`: if they
    have several. The first step has two, because DeepSpeed records in the first micro-batch what it
    keeps in later ones.
    """
    strategy = assembled.strategy

    def run(count: int, rows: int) -> Amounts:
        batch = longest_step_batch(_with_rows(config, rows), rank_info.world_size)
        tracker.peaks.clear()
        before = tracker.current
        work = tracker.flops, tracker.written, tracker.kernels
        recorder = PhaseRecorder(strategy, tracker)
        _step(config, recorder, batch, count, rank_info)
        now = tracker.flops, tracker.written, tracker.kernels
        names = ("flops", "written", "kernels")
        amounts = {n: float(b - a) for n, a, b in zip(names, work, now, strict=True)}
        amounts["kept"], amounts["host"] = (
            recorder.bytes_after_forward - before,
            recorder.host_bytes,
        )
        return amounts | {f"peak{count}/{phase}": peak for phase, peak in tracker.peaks.items()}

    loading = {f"peak{count}/loading": float(tracker.peak) for count in (1, 2)}
    tracker.phase = "forward"
    gc.freeze()  # what a step will not free, so that collecting its garbage takes no time
    before_first = bytes_of(optimizer_tensors(strategy.optimizer))
    with _marks(layers, tracker):
        several = run(2, config.training.micro_batch_size)
        one = run(1, config.training.micro_batch_size)
        wider = run(1, wider_rows) if wider_rows else {}
    optimizer = bytes_of(optimizer_tensors(strategy.optimizer))
    weights = {"optimizer": float(optimizer), "weights": float(tracker.current - optimizer)}
    created = 0 if config.strategy.steps_on_cpu else optimizer - before_first
    added = {}  # what the second of two micro-batches has on top of a single one
    for phase in (name.removeprefix("peak1") for name in one if _is_peak(name)):
        added[phase] = 0.0
        if f"peak2{phase}" in several and not _is_of_optimizer(phase):
            added[phase] = several[f"peak2{phase}"] + created - one[f"peak1{phase}"]

    def both(amounts: Amounts) -> Amounts:
        later = {f"peak2{p}": amounts[f"peak1{p}"] + more for p, more in added.items()}
        return amounts | later | weights | loading

    return both(one), both(wider) if wider else {}


def _is_peak(name: str) -> bool:
    return name.startswith("peak")


def _is_computing(phase: str) -> bool:
    return phase.startswith(("forward", "backward"))


def _is_of_optimizer(name: str) -> bool:
    return name.endswith("optimizer step")


def _with_rows(config: Config, rows: int) -> Config:
    training = dataclasses.replace(config.training, micro_batch_size=rows)
    return dataclasses.replace(config, training=training)


def _step(
    config: Config, recorder: PhaseRecorder, batch: StepBatch, count: int, rank_info: RankInfo
) -> None:
    micro_batches = [batch.micro_batches[0]] * count
    targets = int(batch.target_tokens) * rank_info.world_size
    training = config.training
    train_step(
        cast(Strategy, recorder),
        dataclasses.replace(batch, micro_batches=micro_batches),
        targets,
        training.max_grad_norm,
        rank_info.device,
        training.label_smoothing,
    )


@contextmanager
def _marks(layers: Sequence[nn.Module], tracker: WorkTracker) -> Iterator[None]:
    """Inside, the phase of `tracker` says which of the layers computes: first, middle or last, or
    what is before and behind them. Peaks of each grow linearly with the number of layers."""

    def mark(place: str) -> None:
        tracker.phase = f"{tracker.phase.partition(SEPARATOR)[0]}{SEPARATOR}{place}"

    def on_layer(layer: nn.Module, place: str, is_last: bool) -> list[Any]:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if first.requires_grad:
                first.register_hook(lambda gradient: mark(place))
            if is_last:
                mark("head")

        return [
            layer.register_forward_pre_hook(lambda *_: mark(place), prepend=True),
            layer.register_forward_hook(after, prepend=True),
        ]

    handles: list[Any] = []
    for at, layer in enumerate(layers):
        place = "first" if at == 0 else "last" if at == len(layers) - 1 else "middle"
        handles += on_layer(layer, place, at == len(layers) - 1)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sizes(assembled: AssembledModel, compute: torch.dtype) -> Amounts:
    """Elements and bytes of the whole model, on all ranks together."""
    trained = elements = working = 0
    for parameter in assembled.model.parameters():
        numel = getattr(parameter, "ds_numel", parameter.numel())
        elements += numel
        trained += numel * parameter.requires_grad
        itemsize = compute.itemsize if parameter.is_floating_point() else parameter.element_size()
        working += numel * itemsize
    return {"trained": trained, "elements": elements, "working": working}


if __name__ == "__main__":
    main()
