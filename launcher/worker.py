"""What each rank runs: the frozen configuration → the parts → `fit`.

    torchrun … -m launcher.worker RUN

The parts are imported inside `run`, after the rank's log is open: libraries talk while they load.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from io import TextIOBase
from pathlib import Path
from typing import Any

from launcher import rank_log, run_dir
from launcher.config import Config, store
from launcher.config.data import DataConfig
from launcher.config.training import TrainingConfig
from launcher.errors import UserError
from launcher.run_dir import RunDir

Say = Callable[[str], None]


def main() -> None:
    """Entry of a rank whose run folder stands already."""
    _serve(RunDir(Path(sys.argv[1])), int(os.environ["RANK"]))


def attend(config: Config, argv: list[str]) -> None:
    """Entry of a rank under `torchrun … -m launcher.train`: agree on one run folder, then run.

    Rank 0 makes the folder; every rank composed `config` itself.
    """
    from launcher.distributed import agree, process_group

    rank = int(os.environ["RANK"])
    meeting = process_group.rendezvous()
    try:
        folder = agree.agree_on_run(
            meeting,
            rank,
            int(os.environ["WORLD_SIZE"]),
            store.fingerprint(config),
            create=lambda: run_dir.create(config, argv)[0].path,
        )
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(rank_log.REFUSED)
    if rank == 0:
        print(f"run folder: {folder}", flush=True)
    _serve(RunDir(folder), rank, meeting)


def _serve(run_folder: RunDir, rank: int, meeting: Any = None) -> None:
    """Run with a log of its own, and leave the reason behind if it fails."""
    console = rank_log.open_log(run_folder, rank)
    with rank_log.last_words(run_folder, rank), console:
        run(run_folder, store.load(run_folder.config), console, meeting)


def run(run_folder: RunDir, config: Config, console: TextIOBase, meeting: Any = None) -> None:
    """Build the parts and train. Data before the process group: a rank that waits for the
    tokeniser is not in a collective."""
    import torch
    import torch.distributed as dist

    from launcher.checkpoint.save import save_checkpoint
    from launcher.distributed import process_group
    from launcher.loop import Plan, fit
    from launcher.model.folder import model_folder
    from launcher.model.tokenizer import load_tokenizer
    from launcher.scheduler import build_scheduler
    from launcher.tracking import build_observers

    say = partial(print, file=console, flush=True)
    place, training = process_group.place(), config.training
    source = config.model
    folder = model_folder(source.name_or_path, source.revision, source.trust_remote_code)
    tokenizer = load_tokenizer(folder, source.trust_remote_code)
    learnt, held_out = _loaders(config.data, training, place, tokenizer, say)
    process_group.start(place, meeting or process_group.rendezvous())
    method, strategy = _method_and_strategy(config, folder, place, say)
    total_steps = training.max_steps or (training.epochs or 0) * learnt.steps_per_epoch
    torch.manual_seed(training.seed + place.rank)  # dropout differs from rank to rank
    fit(
        strategy,
        build_scheduler(config.scheduler, strategy.optimizer, total_steps),
        learnt,
        held_out,
        Plan(
            total_steps=total_steps,
            max_grad_norm=training.max_grad_norm,
            eval_steps=training.eval_steps,
            save_steps=config.checkpoint.save_steps,
            log_steps=training.log_steps,
        ),
        list(build_observers(config.tracking, run_folder, console)) if place.is_main else [],
        save=lambda step: save_checkpoint(
            strategy, method, source, run_folder.checkpoints, step, place.is_main
        ),
        device=place.device,
    )
    dist.destroy_process_group()


def _loaders(
    data: DataConfig, training: TrainingConfig, place: Any, tokenizer: Any, say: Say
) -> tuple[Any, Any]:
    """The rows to learn from and those to evaluate on (None without)."""
    from launcher.data.dataset import load_rows, split
    from launcher.data.loader import Loader

    rows = load_rows(Path(data.path), data, tokenizer)
    say(f"data: {rows.describe()}")
    deal = partial(
        Loader,
        rank=place.rank,
        world_size=place.world_size,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        pad_to_multiple_of=data.pad_to_multiple_of,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    chosen, held_out = split(rows, data.eval_rows, training.seed)
    learnt = deal(rows, chosen, seed=training.seed if data.shuffle else None)
    if data.eval_path:
        others = load_rows(Path(data.eval_path), data, tokenizer)
        return learnt, deal(others, range(len(others)), seed=None)
    return learnt, deal(rows, held_out, seed=None) if held_out else None


def _method_and_strategy(config: Config, folder: Path, place: Any, say: Say) -> tuple[Any, Any]:
    """The model, made ready in this order: method, strategy (shards), optimizer."""
    from launcher.method import build_method
    from launcher.method.base import describe
    from launcher.model.load import build_model
    from launcher.optimizer import build_optimizer
    from launcher.precision import PRECISIONS
    from launcher.strategy import build_strategy

    method, precision = build_method(config.method), PRECISIONS[config.precision.name]
    model, weights = build_model(config.model, folder, config.training.seed, precision.compute)
    model = method.prepare(model, config.training.seed)
    say(f"method: {config.method.name}: {describe(model)}")
    strategy = build_strategy(config.strategy, place, precision)
    strategy.setup(model, weights, lambda trained: build_optimizer(config.optimizer, trained))
    say(f"strategy: {strategy.describe()}")
    say(f"precision: {precision.table()}")
    return method, strategy


if __name__ == "__main__":
    main()
