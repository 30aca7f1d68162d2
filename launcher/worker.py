"""The program of each rank: load the frozen configuration, build the parts and call `fit`.

    torchrun … -m launcher.worker RUN ATTEMPT

The parts are imported after the rank's log is open: libraries print while they are imported, and
torch, transformers and PEFT take seconds.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launcher.config import Config, store
from launcher.distributed import rendezvous
from launcher.errors import StepError, UserError, exit_when_refused, set_step
from launcher.folders.checkpoint import finished_checkpoints
from launcher.folders.run import RunDir
from launcher.io import garbage, open_files
from launcher.run import create, ended, environment, heartbeat, parent, processes, rank_log
from launcher.run.heartbeat import Phase
from launcher.run.outcome import Outcome, write_status, write_superseded
from launcher.run.stop import Stopped, StopRequest

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import PreTrainedTokenizerBase

    from launcher.checkpoint.save import Saver
    from launcher.data.build import Loaders
    from launcher.distributed.process_group import RankInfo
    from launcher.tracking.base import Observer
    from launcher.training.plan import Plan
    from launcher.training.state import Progress, TrainState
    from launcher.training.throughput import ThroughputMeter


@dataclass(frozen=True)
class Run:
    """One attempt of a run, on one rank."""

    folder: RunDir
    config: Config
    console: rank_log.Console  # silent except on rank 0
    stop: StopRequest

    def log(self, line: str) -> None:
        """Print `line` on the console of rank 0."""
        print(line, file=self.console, flush=True)


def main() -> NoReturn:
    """Train in an existing run folder, as one rank, and end the process. Raises UserError if it is
    not started so."""
    if len(sys.argv) != 3 or "RANK" not in os.environ:
        raise UserError("usage: torchrun … -m launcher.worker RUN ATTEMPT")
    parent.die_with_agent()
    path, attempt = sys.argv[1:]
    if "SHARDWAY_NODES" in os.environ:
        rendezvous.set_global_ranks()
    _train_with_log(RunDir.from_logs(Path(path, "logs", f"attempt-{attempt}")))
    rank_log.end_process()


def train_under_torchrun(config: Config, argv: list[str]) -> NoReturn:
    """Agree on one run folder with the other ranks of `torchrun … -m launcher.train`, train, and
    end the process.

    Rank 0 creates the folder. Every rank has composed `config` itself. Raises UserError if they
    cannot agree.
    """
    from launcher.distributed import agreement, run_folder

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    environment.prepare(config.training.deterministic)
    minutes = config.launch.rendezvous_minutes
    key_value_store = rendezvous.open_store(minutes)
    key_value_store = rendezvous.enter_round(key_value_store, rank, world_size, minutes)

    done = agreement.agree(
        *(key_value_store, rank, world_size, "ended", ""),
        decide=lambda said: ended.nothing_to_do(config) or "",
        minutes=minutes,
    )
    if done:
        if rank == 0:
            print(done)
        rank_log.end_process()

    def create_folder() -> RunDir:
        return create.start_attempt(config, argv, world_size)[0]

    fingerprint, shared = store.fingerprint(config), config.launch.shared_disk
    folder = run_folder.agree_on_run(
        key_value_store, rank, world_size, fingerprint, create_folder, shared, minutes
    )
    if not shared:
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        folder = run_folder.run_folder_of_node(
            key_value_store,
            folder,
            node=rank // per_node,
            nodes=world_size // per_node,
            create=create_folder if os.environ["LOCAL_RANK"] == "0" else None,
            minutes=minutes,
        )
    if rank == 0:
        rank_log.say(folder, f"run folder: {folder.path}")
    _train_with_log(folder, key_value_store)
    if rank == 0 or not shared:
        folder.starter.unlink(missing_ok=True)
    rank_log.end_process()


def _train_with_log(folder: RunDir, key_value_store: dist.Store | None = None) -> None:
    """Train with output to this rank's log; if it fails, write the reason to a file."""
    garbage.collect_seldom()
    rank = int(os.environ["RANK"])
    stop = StopRequest(folder)
    stop.listen()
    console = rank_log.open_log(folder, rank)
    record = processes.recorded(folder.rank_process(rank))
    with record, rank_log.report_failure(folder, rank), console, heartbeat.attached():
        config = store.load(folder.config)
        environment.prepare(config.training.deterministic)  # before torch is imported
        prepare_and_train(Run(folder, config, console, stop), key_value_store)


def prepare_and_train(run: Run, key_value_store: dist.Store | None = None) -> None:
    """Prepare the data, start the process group, and train.

    The data comes first, so that ranks which wait for the tokenized data are not in a collective.
    """
    import torch.distributed as dist

    from launcher.distributed import interface, process_group
    from launcher.distributed.collectives import any_rank
    from launcher.export.exportable import check_exportable
    from launcher.machines.preflight import Preflight, run_preflight
    from launcher.model.open import open_model
    from launcher.training import choices

    rank_info, launch = process_group.read_rank_info(), run.config.launch
    open_files.raise_limit(
        rank_info.world_size, groups=2 if run.config.checkpoint.async_save else 1
    )
    # Opened before the model and the rows: other ranks already try to connect to it.
    key_value_store = key_value_store or rendezvous.open_store(launch.rendezvous_minutes)
    links = interface.settle(
        *(key_value_store, rank_info.rank, rank_info.world_size, run.config.cluster.interface),
        minutes=launch.rendezvous_minutes,
        log=run.log,
    )
    if run.config.cluster.preflight:
        link = links[rank_info.rank]
        parts = (run.folder, run.config, rank_info, key_value_store, link, run.log)
        run_preflight(Preflight(*parts))
    config = choices.settle(run.folder, run.config, rank_info, key_value_store, run.log)
    run = replace(run, config=config)
    heartbeat.enter(Phase.PREPARE)
    folder, tokenizer = open_model(run.config, run.log)
    if rank_info.is_main:
        check_exportable(folder, run.config.model.trust_remote_code)
    loaders: Loaders | None = None
    with suppress(Stopped):
        loaders = _build_loaders(run, folder, tokenizer, rank_info)
    heartbeat.enter(Phase.START)  # ranks may wait here for one that still prepares the data
    if not dist.is_initialized():
        process_group.init_process_group(rank_info, key_value_store, launch.collective_minutes)
    if any_rank(run.stop.requested()) or loaders is None:
        saved = finished_checkpoints(run.folder.checkpoints)
        outcome = Outcome(None if saved else 0, _stop_reason(run, rank_info))
    else:
        outcome = _train(run, folder, tokenizer, loaders, rank_info)
    if rank_info.is_main:
        write_status(run.folder, outcome)
        run.log(outcome.message(run.folder))
    dist.destroy_process_group()


def _build_loaders(
    run: Run, model_folder: Path, tokenizer: PreTrainedTokenizerBase, rank_info: RankInfo
) -> Loaders:
    """The batches for training and evaluation. Raises Stopped if a stop is requested meanwhile."""
    from launcher.data.build import build_loaders
    from launcher.folders.vocabulary import embedding_rows

    return build_loaders(
        run.config.data,
        run.config.training,
        tokenizer,
        rank_info.rank,
        rank_info.world_size,
        run.log,
        run.stop.raise_if_requested,
        embedding_rows(model_folder),
    )


def _train(
    run: Run,
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    loaders: Loaders,
    rank_info: RankInfo,
) -> Outcome:
    """Build the train state, resume from a checkpoint, and train to the planned end or a stop."""
    from launcher.checkpoint import load
    from launcher.checkpoint.save import Saver
    from launcher.io.answer_end import end_tokens
    from launcher.model.open import files_to_save
    from launcher.strategy.precision import precision_of
    from launcher.training.build import build_train_state
    from launcher.training.compile_auto import choose_compile
    from launcher.training.model_checks import check_model
    from launcher.training.plan import Plan
    from launcher.training.state import Progress

    config, device = run.config, rank_info.device
    heartbeat.enter(Phase.LOAD)
    checkpoint = load.choose_checkpoint(config, run.folder.checkpoints, rank_info, run.log)
    plan = Plan.from_config(
        config.training, config.checkpoint, config.scheduler, loaders.training.steps_per_epoch
    )
    state = build_train_state(
        config, model_folder, rank_info, loaders.fingerprint, plan.total_steps, run.log
    )
    state.tokenizer_files = files_to_save(config, model_folder, tokenizer)
    if config.data.format != "text":
        state.end_tokens = end_tokens(tokenizer)
    check_model(state, config.data.packing, precision_of(config.precision).compute)
    saver = Saver(state, run.folder, config.checkpoint, config.launch)
    saver.check_space()
    done = Progress()
    if checkpoint is not None:
        done = load.restore(checkpoint, state, config.resume_force)
        run.log(f"resumed from {checkpoint.path.name}: {done.step} steps, {done.tokens:,} tokens")
        if frozen := load.describe_frozen_since(checkpoint, state):
            run.log(frozen)
    if config.training.compile == "auto":
        (batch, *_) = loaders.training.step_batch(done.step).micro_batches
        run.log(f"compile: {choose_compile(state.strategy, batch, device)}")
    last = _fit(run, state, loaders, plan, saver, done)
    evaluates_end = loaders.evaluation is not None and plan.is_scheduled_evaluation(last)
    missing = evaluates_end and not state.early_stopping.has_evaluated(last)  # stopped during it
    if last < plan.end_step or missing:
        return Outcome(last, state.early_stopping.reason() or _stop_reason(run, rank_info))
    if last < plan.total_steps:
        return Outcome(last, f"training.stop_after_steps={config.training.stop_after_steps}")
    return Outcome(last, None)


def _stop_reason(run: Run, rank_info: RankInfo) -> str:
    """Why training ends before its planned step. Collective.

    Raises UserError if a newer attempt has started: this one is not to be resumed.
    """
    from launcher.distributed.collectives import first_not_none

    newer = first_not_none(run.stop.superseded_by())
    if newer is not None:
        started = f"attempt {newer} of {run.folder.path} has started"
        if rank_info.is_main:
            write_superseded(run.folder, started)
        raise UserError(f"{started}: attempt {run.folder.attempt} is superseded and has ended")
    reason = first_not_none(run.stop.reason())
    if reason is None:
        raise RuntimeError("training ended before its planned step, and no rank knows the reason")
    return reason


def _fit(
    run: Run, state: TrainState, loaders: Loaders, plan: Plan, saver: Saver, done: Progress
) -> int:
    """Run the training loop from `done`; return the last step. Collective.

    With training.on_spike=rewind, training goes on from a checkpoint when a step has spoiled it.
    """
    from launcher.checkpoint.rewind import rewind
    from launcher.strategy.precision import precision_of
    from launcher.training.throughput import ThroughputMeter

    config, rank_info = run.config, state.rank_info
    meter = ThroughputMeter.create(
        rank_info.device,
        state.flops,
        precision_of(config.precision).compute,
        config.tracking.peak_tflops,
        rank_info.world_size,
        run.log,
    )
    garbage.collect_as_usual()
    while True:
        try:
            return _fit_from(done, run, state, loaders, plan, saver, meter)
        except StepError as error:
            if config.training.on_spike != "rewind":
                raise
            done = rewind(error, state, run.folder, config, run.log)


def _fit_from(
    done: Progress,
    run: Run,
    state: TrainState,
    loaders: Loaders,
    plan: Plan,
    saver: Saver,
    meter: ThroughputMeter,
) -> int:
    """Run the training loop from `done`, without the batches that are left out; return the last
    step."""
    from launcher.data.prefetch import Prefetcher
    from launcher.tracking import build_observers
    from launcher.training.loop import StepLoaders, fit

    training = replace(loaders.training, left_out=tuple(state.spikes.left_out))
    data = StepLoaders(Prefetcher(training, state.rank_info.device), loaders.evaluation)
    observers: list[Observer] = []
    if state.rank_info.is_main:
        observers = build_observers(run.config.tracking, run.folder, run.console)
    run.stop.on_train_begin()
    try:
        return fit(state, data, plan, observers, saver, run.stop.requested, done, meter)
    except Exception as error:
        if state.step:
            set_step(error, state.step, training.rows_of)
        if isinstance(error, StepError):
            for observer in observers:
                observer.finish()
        if isinstance(error, UserError):  # raised on all ranks; earlier saves are completed
            saver.finish()
        raise


if __name__ == "__main__":
    with exit_when_refused():
        main()
