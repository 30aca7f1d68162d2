"""Searches the configurations that fit, and estimates which is the fastest. Imports no torch.

What is typed stays as it is. What is not is tried: strategy, micro-batch, recomputation and
precision; offloading, and precision=pure_bf16 for a method that trains weights, only where nothing
else fits, because they cost time or accuracy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.cluster.gpu_specs import GpuSpec
from launcher.config import Config, store
from launcher.config.rules.rule import World
from launcher.config.rules.table import broken_rules
from launcher.config.schema.method import FreezeConfig, LoraConfig
from launcher.config.schema.precision import PRECISIONS
from launcher.config.schema.strategy import STRATEGIES, FsdpConfig
from launcher.errors import UserError
from launcher.memory.estimate import (
    Amounts,
    Estimate,
    Trace,
    at_all_layers,
    at_micro_batch,
    moved,
    partly_recomputed,
)
from launcher.memory.planning import RULES, Memory
from launcher.memory.roofline import step_time
from launcher.memory.tracers import Request, Tracers

ON_GPU = ("single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
OFFLOADED = ("fsdp_offload", "zero2_offload", "zero3_offload")
REFERENCE = "fsdp"  # the strategy under which rows and recomputation are varied
RECOMPUTED = ("off", "2", "full")  # training.activation_checkpointing
STRATEGY, PRECISION = "strategy", "precision"
ROWS, RECOMPUTE = "training.micro_batch_size", "training.activation_checkpointing"
Point = tuple[str, int]  # recomputation, rows of a micro-batch


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """A configuration that fits. Sizes are bytes of the fullest rank, except `host`."""

    overrides: list[str]  # to type, beside those that were
    tokens_per_second: float  # of all ranks, estimated
    step_seconds: float
    weights: int
    optimizer: int
    activations: int
    peak: int
    phase: str
    host: int  # of a machine
    verdict: str


class Search:
    """The search for one configuration. `typed`: the settings that stay as they are."""

    def __init__(
        self, config: Config, typed: Iterable[str], world: World, memory: Memory, tracers: Tracers
    ) -> None:
        self.config, self.world, self.memory, self.tracers = config, world, memory, tracers
        self.typed = set(typed)
        self.notes: list[str] = []
        # The amounts under one strategy, at the corners of recomputation and rows.
        self._corners: dict[Point, Amounts] = {}
        self._are_allowed = False  # some configurations, by the rules
        self._problems: dict[str, None] = {}  # what the rules say about the others
        self._trace_errors: dict[str, None] = {}  # why strategies are left out

    def run(self, gpu: GpuSpec) -> list[FoundRun]:
        """The configurations that fit, the fastest first; the first of equals is the one that
        leaves more memory. Raises ConfigError if the rules refuse all of them."""
        found: list[FoundRun] = []
        for strategies, precision in self._tiers():
            found = list(self._tier(strategies, precision, gpu))
            if found:
                break
        if not self._are_allowed:
            raise store.ConfigError([*self._problems])
        return sorted(found, key=lambda run: (-run.tokens_per_second, run.peak, run.overrides))

    def _tiers(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Strategies and precision to try, until some fit."""
        precisions = (
            ["bf16"] if isinstance(self.config.method, LoraConfig) else ["bf16", "pure_bf16"]
        )
        if self._is_typed(PRECISION):
            precisions = [self.config.precision.name]
        groups: tuple[tuple[str, ...], ...] = (ON_GPU, OFFLOADED)
        if self._is_typed(STRATEGY):
            groups = ((self.config.strategy.name,),)
        yield from ((strategies, precision) for strategies in groups for precision in precisions)

    def _is_typed(self, key: str) -> bool:
        return any(each == key or each.startswith(f"{key}.") for each in self.typed)

    def _tier(self, strategies: Sequence[str], precision: str, gpu: GpuSpec) -> Iterator[FoundRun]:
        rows, recomputed = self._rows(), self._recomputed()
        least = (recomputed[-1], rows[0])
        configs = [self._varied(name, precision, least) for name in strategies]
        configs = [config for config in configs if self._is_allowed(config)]
        bases = self._bases(configs, least, precision)
        for config, base in zip(configs, bases, strict=True):
            if base is None or not self._fits(self._estimate(config, base)):
                continue
            for recompute in recomputed:
                for count in rows:
                    tried = self._varied(config.strategy.name, precision, (recompute, count))
                    amounts = moved(base, self._corners[least], self._at(recompute, count))
                    estimate = self._estimate(tried, amounts)
                    if self._fits(estimate) and self._is_allowed(tried):
                        yield self._found(tried, estimate, gpu)

    def _rows(self) -> list[int]:
        """Micro-batches: powers of two that divide the global batch."""
        training = self.config.training
        if self._is_typed(ROWS):
            return [training.micro_batch_size]
        share, rest = divmod(training.global_batch_size, self.world.size)
        if rest:
            raise UserError(
                f"training.global_batch_size={training.global_batch_size} is not a multiple of "
                f"{self.world.size} ranks → training.global_batch_size="
                f"{(share + 1) * self.world.size}"
            )
        return [1 << power for power in range(share.bit_length()) if share % (1 << power) == 0]

    def _recomputed(self) -> Sequence[str]:
        """Choices of recomputation, the one that needs the least memory last."""
        if self._is_typed(RECOMPUTE):
            return (self.config.training.activation_checkpointing,)
        if isinstance(self.config.method, FreezeConfig):  # it keeps activations of few layers
            return (RECOMPUTED[0], RECOMPUTED[-1])
        return RECOMPUTED

    def _varied(self, strategy: str, precision: str, point: Point) -> Config:
        recompute, rows = point
        config, training = self.config, self.config.training
        changes: dict[str, Any] = {
            "training": dataclasses.replace(
                training, activation_checkpointing=recompute, micro_batch_size=rows
            )
        }
        if not self._is_typed(STRATEGY):
            changes["strategy"] = STRATEGIES[strategy](name=strategy)
        if not self._is_typed(PRECISION):
            changes["precision"] = PRECISIONS[precision](name=precision)
        return dataclasses.replace(config, **changes)

    def _is_allowed(self, config: Config) -> bool:
        """Whether the rules allow it, and it is not another spelling of a simpler one."""
        world, name = self.world, config.strategy.name
        if not self._is_typed(STRATEGY):
            if name in ON_GPU and (world.size == 1) != (name == "single"):
                return False  # one rank is single, and several are not
            if world.nodes == 1 and name == "hsdp":
                return False  # fsdp
        problems = broken_rules(config, world, RULES)
        self._problems |= dict.fromkeys(problems)
        self._are_allowed |= not problems
        return not problems

    def _estimate(self, config: Config, amounts: Amounts) -> Estimate:
        rows = self.world.size * config.training.micro_batch_size
        return Estimate(amounts=amounts, accumulates=config.training.global_batch_size > rows)

    def _fits(self, estimate: Estimate) -> bool:
        return bool(self.memory.fits(estimate.peak, self._host_peak(estimate)))

    def _host_peak(self, estimate: Estimate) -> int:
        """Bytes that all ranks of a machine need in host memory: to load, or to train."""
        each = max(estimate.amounts["loading"], estimate.amounts["host"])
        return round(each) * self.world.nproc_per_node

    def _found(self, config: Config, estimate: Estimate, gpu: GpuSpec) -> FoundRun:
        training, amounts = config.training, estimate.amounts
        seconds = step_time(config, self.world, amounts, gpu).total
        values = {
            STRATEGY: config.strategy.name,
            PRECISION: config.precision.name,
            ROWS: training.micro_batch_size,
            RECOMPUTE: training.activation_checkpointing,
        }
        return FoundRun(
            overrides=[f"{k}={v}" for k, v in values.items() if not self._is_typed(k)],
            tokens_per_second=training.global_batch_size * config.data.max_length / seconds,
            step_seconds=seconds,
            weights=round(amounts["weights"]),
            optimizer=round(amounts["optimizer"]),
            activations=round(amounts["kept"]),
            peak=estimate.peak,
            phase=estimate.phase,
            host=self._host_peak(estimate),
            verdict=self.memory.verdict(estimate.peak, self._host_peak(estimate)),
        )

    def _bases(
        self, configs: Sequence[Config], least: Point, precision: str
    ) -> list[Amounts | None]:
        """The amounts of each configuration; those of the corners are traced with the first."""
        names = [config.strategy.name for config in configs]
        if self._corners or not names:
            return [pair and pair[0] for pair in self._whole(configs, [0] * len(configs))]
        reference = REFERENCE if REFERENCE in names else names[0]
        rows, recomputed = self._rows(), self._recomputed()
        wider = rows[1] if len(rows) > 1 else 0
        choices = [each for each in recomputed[:1] if each != least[0]]
        corners = [self._varied(reference, precision, (each, rows[0])) for each in choices]
        wanted = [wider if name == reference else 0 for name in names] + [wider] * len(corners)
        found = self._whole([*configs, *corners], wanted)
        known = [found[names.index(reference)], *found[len(configs) :]]
        for choice, pair in zip([least[0], *choices], known, strict=True):
            if pair is None:  # mostly for the same reason under every strategy
                raise UserError("\n".join(self._trace_errors))
            self._corners[choice, rows[0]] = pair[0]
            if wider:
                self._corners[choice, wider] = pair[1]
        return [pair and pair[0] for pair in found[: len(configs)]]

    def _at(self, recompute: str, count: int) -> Amounts:
        """The amounts at any recomputation and rows, under the strategy of the corners."""
        rows = self._rows()
        low, high = rows[0], rows[min(1, len(rows) - 1)]

        def along(choice: str) -> Amounts:
            first, second = self._corners[choice, low], self._corners[choice, high]
            return at_micro_batch((low, first), (high, second), count)

        if (recompute, low) in self._corners:
            return along(recompute)
        return partly_recomputed(along("full"), along("off"), int(recompute))

    def _whole(
        self, configs: Sequence[Config], wider: Sequence[int]
    ) -> list[tuple[Amounts, Amounts] | None]:
        """The amounts of the whole model for each configuration, as it is and with `wider` rows;
        None, and a note, where tracing failed."""
        pairs = self._trace_pairs(configs, wider)
        wrong = {
            at: sync
            for at, (config, pair) in enumerate(zip(configs, pairs, strict=True))
            if pair is not None and (sync := _other_sync(config, *pair)) is not None
        }
        again = [
            dataclasses.replace(
                configs[at],
                strategy=dataclasses.replace(configs[at].strategy, gradient_sync=sync),  # type: ignore[call-arg]
            )
            for at, sync in wrong.items()
        ]
        retraced = self._trace_pairs(again, [wider[at] for at in wrong])
        for at, pair in zip(wrong, retraced, strict=True):
            pairs[at] = pair
        return [None if pair is None else at_all_layers(*pair) for pair in pairs]

    def _trace_pairs(
        self, configs: Sequence[Config], wider: Sequence[int]
    ) -> list[tuple[Trace, Trace] | None]:
        """For each configuration two traces, the second one with more layers."""
        requests = [
            Request(config=config, more=more, min_layers=_min_layers(config), wider_rows=rows)
            for config, rows in zip(configs, wider, strict=True)
            for more in (0, 1)
        ]
        answers = self.tracers.answer(requests)
        pairs: list[tuple[Trace, Trace] | None] = []
        for config, few, more in zip(configs, answers[::2], answers[1::2], strict=True):
            if isinstance(few, Trace) and isinstance(more, Trace):
                pairs.append((few, more))
            else:
                error = few if isinstance(few, UserError) else more
                self._trace_errors[str(error)] = None
                self.notes.append(f"strategy={config.strategy.name} is left out: {error}")
                pairs.append(None)
        return pairs


def _min_layers(config: Config) -> int:
    """Layers that a trace must have, so that further ones are like each other."""
    return abs(config.method.layers) + 2 if isinstance(config.method, FreezeConfig) else 1


def _other_sync(config: Config, few: Trace, more: Trace) -> str | None:
    """`last` or `every`, if that is what gradient_sync=auto means for the whole model, but meant
    another for a trace of it; otherwise None."""
    strategy = config.strategy
    if not isinstance(strategy, FsdpConfig) or strategy.gradient_sync != "auto":
        return None

    def choice(amounts: Amounts) -> str:
        return "last" if 10 * amounts["trained"] < amounts["elements"] else "every"

    right = choice(at_all_layers(few, more)[0])
    return None if {choice(few.amounts), choice(more.amounts)} == {right} else right
