"""What each rank runs: the frozen configuration → the parts → `fit`.

    torchrun … -m launcher.worker RUN

The parts are imported inside `run`, after the rank's log is open: libraries talk while they load.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import IO, Any

from launcher import rank_log, run_dir
from launcher.config import Config, store
from launcher.errors import UserError
from launcher.run_dir import RunDir


def main() -> None:
    """Entry of a rank whose run folder stands already."""
    run_folder = RunDir(Path(sys.argv[1]))
    rank = int(os.environ["RANK"])
    console = rank_log.open_log(run_folder, rank)
    with rank_log.last_words(run_folder, rank):
        run(run_folder, store.load(run_folder.config), console)
    _leave(console)


def attend(config: Config, argv: list[str]) -> None:
    """Entry of a rank under `torchrun … -m launcher.train`: agree on one run folder, then run.

    Rank 0 makes the folder; every rank composed `config` itself.
    """
    from launcher.distributed import agree, process_group

    rank = int(os.environ["RANK"])
    store_ = process_group.rendezvous()
    try:
        folder = agree.agree_on_run(
            store_,
            rank,
            int(os.environ["WORLD_SIZE"]),
            store.fingerprint(config),
            create=lambda: run_dir.create(config, argv)[0].path,
        )
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(rank_log.REFUSED)
    run_folder = RunDir(folder)
    if rank == 0:
        print(f"run folder: {folder}", flush=True)
    console = rank_log.open_log(run_folder, rank)
    with rank_log.last_words(run_folder, rank):
        run(run_folder, store.load(run_folder.config), console, store_)
    _leave(console)


def run(run_folder: RunDir, config: Config, console: IO[str], store_: Any = None) -> None:
    """Build the parts and train. Method first, strategy second, optimizer third, data last."""
    import torch

    from launcher.checkpoint.save import save_checkpoint
    from launcher.data.dataset import load_rows, split
    from launcher.data.loader import Loader
    from launcher.distributed import process_group
    from launcher.loop import Plan, fit
    from launcher.method import build_method
    from launcher.method.base import describe
    from launcher.model.folder import model_folder
    from launcher.model.load import build_model
    from launcher.model.tokenizer import load_tokenizer
    from launcher.optimizer import build_optimizer
    from launcher.precision import PRECISIONS
    from launcher.scheduler import build_scheduler
    from launcher.strategy import build_strategy
    from launcher.tracking import build_observers

    def say(line: str) -> None:
        print(line, file=console, flush=True)

    place = process_group.place()
    training = config.training
    precision = PRECISIONS[config.precision.name]

    # Before the process group: a rank that waits for the tokeniser is not in a collective.
    source = config.model
    folder = model_folder(source.name_or_path, source.revision, source.trust_remote_code)
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
    rows = load_rows(Path(config.data.path), config.data, tokenizer)
    say(f"data: {rows.describe()}")

    process_group.start(place, store_ or process_group.rendezvous())
    method = build_method(config.method)
    model, weights = build_model(config.model, folder, training.seed)
    model = method.prepare(model, training.seed)
    say(f"method: {config.method.name}: {describe(model)}")
    strategy = build_strategy(config.strategy, place, precision)
    strategy.setup(model, weights, lambda params: build_optimizer(config.optimizer, params))
    say(f"strategy: {strategy.describe()}")
    say(f"precision: {precision.table()}")

    deal = partial(
        Loader,
        rank=place.rank,
        world_size=place.world_size,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        pad_to_multiple_of=config.data.pad_to_multiple_of,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    chosen, held_out = split(rows, config.data.eval_rows, training.seed)
    train_loader = deal(rows, chosen, seed=training.seed if config.data.shuffle else None)
    evaluation = deal(rows, held_out, seed=None) if held_out else None
    if config.data.eval_path:
        eval_rows = load_rows(Path(config.data.eval_path), config.data, tokenizer)
        evaluation = deal(eval_rows, range(len(eval_rows)), seed=None)

    total_steps = training.max_steps or (training.epochs or 0) * train_loader.steps_per_epoch
    scheduler = build_scheduler(config.scheduler, strategy.optimizer, total_steps)
    torch.manual_seed(training.seed + place.rank)  # dropout differs from rank to rank
    fit(
        strategy,
        scheduler,
        train_loader,
        evaluation,
        Plan(
            total_steps=total_steps,
            max_grad_norm=training.max_grad_norm,
            eval_steps=training.eval_steps,
            save_steps=config.checkpoint.save_steps,
            log_steps=training.log_steps,
        ),
        list(build_observers(config.tracking, run_folder, console)) if place.is_main else [],
        save=lambda step: save_checkpoint(
            strategy, method, config.model, run_folder.checkpoints, step, place.is_main
        ),
        device=place.device,
    )


def _leave(console: IO[str]) -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
    console.close()


if __name__ == "__main__":
    main()
