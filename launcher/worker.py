"""What each rank runs: the frozen configuration → the parts → `fit`.

    torchrun … -m launcher.worker RUN ATTEMPT

The parts are imported inside `run`, after the rank's log is open: libraries talk while they load.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from io import TextIOBase
from pathlib import Path
from typing import Any

from launcher import manifest, rank_log, run_dir
from launcher.checkpoint import layout
from launcher.config import Config, store
from launcher.config.data import DataConfig
from launcher.config.scheduler import WarmupConfig
from launcher.config.training import TrainingConfig
from launcher.distributed import nodes
from launcher.distributed.deadline import Deadline
from launcher.distributed.stop import Stop, Stopped
from launcher.errors import UserError
from launcher.run_dir import RunDir

Say = Callable[[str], None]


def main() -> None:
    """Entry of a rank whose run folder stands already."""
    if "SHARDWAY_NODES" in os.environ:
        nodes.spread()
    _serve(RunDir(Path(sys.argv[1]), int(sys.argv[2])), int(os.environ["RANK"]))


def attend(config: Config, argv: list[str]) -> None:
    """Entry of a rank under `torchrun … -m launcher.train`: agree on one run folder, then run.

    Rank 0 makes the folder; every rank composed `config` itself.
    """
    from launcher.distributed import agree, process_group

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = process_group.rendezvous()

    def create() -> RunDir:
        return run_dir.attempt(config, argv, world_size)[0]

    try:
        hashed, shared = store.fingerprint(config), config.launch.shared_disk
        made = agree.agree_on_run(meeting, rank, world_size, hashed, create, shared)
        run_folder = made if shared else _on_this_machine(meeting, made, create)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(rank_log.REFUSED)
    if rank == 0:
        print(f"run folder: {run_folder.path}", flush=True)
    _serve(run_folder, rank, meeting)


def _on_this_machine(meeting: Any, made: RunDir, create: Callable[[], RunDir]) -> RunDir:
    from launcher.distributed import agree

    here = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes, node = int(os.environ["WORLD_SIZE"]) // here, int(os.environ["RANK"]) // here
    first = os.environ["LOCAL_RANK"] == "0"
    return agree.folder_of_machine(meeting, made, node, nodes, create if first else None)


def _serve(run_folder: RunDir, rank: int, meeting: Any = None) -> None:
    """Run with a log of its own, and leave the reason behind if it fails."""
    newer = RunDir(run_folder.path, run_folder.attempt + 1).logs
    stop = Stop(run_folder.stop, newer, Deadline.of(run_folder.job))
    stop.listen()
    console = rank_log.open_log(run_folder, rank)
    with rank_log.last_words(run_folder, rank), console:
        run(run_folder, store.load(run_folder.config), console, stop, meeting)


def run(
    run_folder: RunDir, config: Config, console: TextIOBase, stop: Stop, meeting: Any = None
) -> None:
    """Build the parts and train. Data before the process group: a rank that waits for the
    tokeniser is not in a collective."""
    import torch.distributed as dist

    from launcher.distributed import process_group
    from launcher.distributed.together import any_rank, first_known
    from launcher.model.folder import model_folder
    from launcher.model.tokenizer import load_tokenizer

    say = partial(print, file=console, flush=True)
    place, source = process_group.place(), config.model
    folder = model_folder(source.name_or_path, source.revision, source.trust_remote_code)
    chat = config.data.format != "text"
    tokenizer = load_tokenizer(folder, source.trust_remote_code, chat, config.data.template)
    meeting = meeting or process_group.rendezvous()  # others look for it while rows are tokenised
    loaders: Any = None
    with suppress(Stopped):
        loaders = _loaders(config.data, config.training, place, tokenizer, say, stop)
    process_group.start(place, meeting)
    ended: tuple[int, str | None]
    if any_rank(stop.requested()):
        saved = layout.finished(run_folder.checkpoints)
        ended = saved[0].step if saved else 0, first_known(stop.reason())
    else:
        ended = _train(run_folder, config, folder, tokenizer, loaders, place, console, stop)
    _leave_status(run_folder, place.is_main, *ended, say)
    dist.destroy_process_group()


def _train(
    run_folder: RunDir,
    config: Config,
    folder: Path,
    tokenizer: Any,
    loaders: Any,
    place: Any,
    console: TextIOBase,
    stop: Stop,
) -> tuple[int, str | None]:
    """Begin or go on; the last step done, and why it is not the schedule's last (None if it is)."""
    from launcher.checkpoint import load
    from launcher.checkpoint.save import Saver
    from launcher.data.ahead import Ahead
    from launcher.distributed.together import first_known
    from launcher.faster import keep_faster
    from launcher.loop import fit
    from launcher.meter import Meter
    from launcher.model.packed import check_apart
    from launcher.precision import precision_of
    from launcher.tracking import build_observers

    say = partial(print, file=console, flush=True)
    chosen = load.choose(config, run_folder.checkpoints, place, say)
    plan = _plan(config, loaders.training.steps_per_epoch)
    learner = build_learner(config, folder, place, loaders.fingerprint, plan.total_steps, say)
    if config.data.template is not None:
        learner = replace(learner, tokenizer=tokenizer)
    if config.data.packing:
        words = learner.model.get_input_embeddings().num_embeddings
        check_apart(learner.strategy.model, place.device, words)
    saver = Saver(learner, run_folder, config.checkpoint, config.launch.shared_disk)
    saver.check_space()
    done = load.Progress()
    if chosen is not None:
        done = load.restore(chosen, learner, config.resume_force)
        say(f"resumed from {chosen.path.name}: {done.step} steps, {done.tokens:,} tokens")
    observers = build_observers(config.tracking, run_folder, console) if place.is_main else ()
    compute, stated = precision_of(config.precision).compute, config.tracking.peak_tflops
    meter = Meter.of(place.device, learner.flops, compute, stated, place.world_size, say)
    if config.training.compile == "auto":
        (batch, *_) = loaders.training.window(done.step).micro_batches
        say(f"compile: {keep_faster(learner.strategy, batch, place.device)}")
    stop.training_begins()
    gc.collect()
    gc.freeze()  # what is here stays: a collection in a step need not walk through it
    try:
        last = fit(
            learner.strategy,
            learner.scheduler,
            Ahead(loaders.training, pin_memory=place.device.type == "cuda"),
            loaders.evaluation,
            plan,
            list(observers),
            saver,
            place.device,
            halt=stop.requested,
            done_steps=done.step,
            tokens=done.tokens,
            watch=learner.watch,
            meter=meter,
        )
    except UserError:  # on all ranks alike; what was learnt before it is not lost
        saver.finish()
        raise
    if last < plan.end_step:
        return last, learner.watch.reason() or first_known(stop.reason())
    return last, _planned_end(config, plan)


def _planned_end(config: Config, plan: Any) -> str | None:
    """Why training ends before its schedule does, by configuration."""
    if plan.end_step == plan.total_steps:
        return None
    return f"training.stop_after_steps={config.training.stop_after_steps}"


def _leave_status(
    run_folder: RunDir, is_main: bool, step: int, reason: str | None, say: Say
) -> None:
    """Say how this attempt ended in a file: exit statuses are lost on the way through torchrun."""
    if not is_main:
        return
    planned = reason is None or reason.startswith("training.")
    status = {
        "state": "finished" if reason is None else "stopped",
        "reason": reason,
        "step": step,
        "exit_code": 0 if planned else rank_log.STOPPED,
    }
    manifest.write_json(run_folder.status, status)
    run_folder.stop.unlink(missing_ok=True)
    if reason is not None:
        further = f" {reason.partition('=')[0]}=null" if planned else ""
        say(
            f"stopped after step {step} ({reason}); go on: shardway train --config-path "
            f"{run_folder.path} --config-name config resume=auto{further}"
        )


def _loaders(
    data: DataConfig, training: TrainingConfig, place: Any, tokenizer: Any, say: Say, stop: Stop
) -> Any:
    """The batches to learn from and those to evaluate on. Raises Stopped."""
    from launcher.data.build import build_loaders
    from launcher.data.loader import Loader

    deal = partial(
        Loader,
        rank=place.rank,
        world_size=place.world_size,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
    )
    return build_loaders(data, tokenizer, training.seed, deal, say, stop.raise_if_requested)


def _plan(config: Config, steps_per_epoch: int) -> Any:
    from launcher.loop import Plan

    training = config.training
    total_steps = training.max_steps or (training.epochs or 0) * steps_per_epoch
    scheduler = config.scheduler
    if isinstance(scheduler, WarmupConfig) and scheduler.warmup_steps > total_steps:
        raise UserError(
            f"scheduler.warmup_steps={scheduler.warmup_steps} is more than the {total_steps} steps "
            f"of training.epochs={training.epochs}: the peak rate is never reached "
            f"→ scheduler.warmup_steps={total_steps // 10}, or scheduler.warmup_ratio=0.1"
        )
    return Plan(
        total_steps=total_steps,
        end_step=min(total_steps, training.stop_after_steps or total_steps),
        max_grad_norm=training.max_grad_norm,
        patience=training.skipped_steps,
        eval_steps=training.eval_steps,
        save_steps=config.checkpoint.save_steps,
        log_steps=training.log_steps,
        label_smoothing=training.label_smoothing,
        save_best=config.checkpoint.save_best,
    )


def build_learner(
    config: Config, folder: Path, place: Any, data: str, total_steps: int, say: Say
) -> Any:
    """The model, made ready in this order: method, strategy (shards), optimizer, scheduler.

    `data` is the fingerprint of the rows.
    """
    import torch
    import torch.distributed as dist

    from launcher.checkpoint.learner import Learner
    from launcher.flops import counted
    from launcher.method import build_method
    from launcher.method.fused import fuse_adapters
    from launcher.method.trained import describe
    from launcher.model.compiled import compile_layers
    from launcher.model.head import chunk_loss
    from launcher.model.kernels import use_kernels
    from launcher.model.load import build_model
    from launcher.model.noise import add_noise
    from launcher.model.recompute import recompute_activations
    from launcher.optimizer import build_optimizer, state_dtype
    from launcher.precision import precision_of
    from launcher.scheduler import build_scheduler
    from launcher.strategy import build_strategy
    from launcher.watch import Watch

    method, precision = build_method(config.method), precision_of(config.precision)
    model, weights = build_model(
        config.model, folder, config.training.seed, precision.compute, config.data.packing
    )
    say(f"kernels: {use_kernels(model, config.training.kernels)}")
    model = method.prepare(model, config.training.seed, weights, place.device)
    fuse_adapters(model)
    if done := method.describe():
        say(f"base: {done}")
    say(f"method: {config.method.name}: {describe(model, precision.master, precision.compute)}")
    flops = counted(model, say)
    add_noise(model, config.training.neftune_alpha)
    kept = recompute_activations(model, config.training.activation_checkpointing)
    say(f"activations: {kept}")
    if config.training.compile != "off":
        compile_layers(model)
    say(f"loss: {chunk_loss(model, config.training.loss)}")
    strategy = build_strategy(config.strategy, config.training, place, precision)
    build = partial(build_optimizer, config.optimizer, rate=method.rate)
    strategy.setup(model, weights, build)
    say(f"loading: {weights.describe() if weights else 'this rank has read the whole model'}")
    say(f"strategy: {strategy.describe()}")
    say(f"precision: {precision.table(state_dtype(config.optimizer))}")
    torch.manual_seed(config.training.seed + place.rank)  # dropout differs from rank to rank
    source = config.model
    about = {
        "base": {"name_or_path": source.name_or_path, "revision": source.revision},
        "data": data,
        "ranks": place.world_size,
        "strategy": config.strategy.name,
    }
    scheduler = build_scheduler(config.scheduler, strategy.optimizer, total_steps)
    group = dist.new_group(backend="gloo")
    training = config.training
    watch = Watch(training.early_stopping_patience, training.early_stopping_threshold)
    return Learner(strategy, method, model, scheduler, place, group, about, watch, flops)


if __name__ == "__main__":
    main()
