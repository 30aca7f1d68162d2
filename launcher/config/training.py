"""Schema of the sections that have no group: `training`, `checkpoint`, `launch`."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.setting import setting

MANY = 10**9  # more is a slip of the finger


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    max_steps: int | None = setting(
        None, "optimizer steps; or say training.epochs", minimum=1, maximum=MANY
    )
    epochs: int | None = setting(
        None, "passes over the data; or say training.max_steps", minimum=1, maximum=MANY
    )
    stop_after_steps: int | None = setting(
        None, "end here with a checkpoint; the schedule is that of the whole training", minimum=1
    )
    micro_batch_size: int = setting(1, "rows per rank and forward", minimum=1, maximum=MANY)
    global_batch_size: int = setting(
        8, "rows per optimizer step over all ranks", minimum=1, maximum=MANY
    )
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", above=0)
    activation_checkpointing: str = setting(
        "off",
        "layers whose activations are computed again in backward instead of kept: off, full (all) "
        "or N (the first of every N)",
    )
    loss: str = setting(
        "chunked",
        "chunked: the output head sums the loss over parts of the positions and keeps no logits, "
        "where the model allows it; liger: so by Liger's Triton kernel; whole: over all logits",
        choices=("chunked", "liger", "whole"),
    )
    kernels: str = setting(
        "torch",
        "what computes RMSNorm, the gated MLP's product and rotary positions: torch, or liger "
        "(Liger's Triton kernels, where it knows the architecture)",
        choices=("torch", "liger"),
    )
    compile: str = setting(
        "off",
        "each layer's forward and backward as compiled functions (torch.compile): off, on, or auto "
        "(try both at the start and keep the faster)",
        choices=("off", "on", "auto"),
    )
    neftune_alpha: float | None = setting(
        None, "size of the noise on embeddings while training (NEFTune)", above=0
    )
    label_smoothing: float = setting(
        0.0, "share of the target's probability dealt to all tokens", minimum=0, maximum=1
    )
    skipped_steps: int = setting(
        20, "so many steps in a row without a finite gradient end the run", minimum=1
    )
    eval_steps: int | None = setting(
        None, "evaluate every so many steps; the end always", minimum=1
    )
    early_stopping_patience: int | None = setting(
        None, "end after so many evaluations in a row without a lower eval_loss", minimum=1
    )
    early_stopping_threshold: float = setting(
        0.0, "of early stopping: only a loss lower by more than this counts as lower", minimum=0
    )
    log_steps: int = setting(1, "write metrics every so many steps, all lines at once", minimum=1)
    seed: int = setting(
        42, "of the data order, the adapters' start and dropout", minimum=0, maximum=2**31
    )


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    save_steps: int | None = setting(
        None, "save every so many steps; the end is always saved", minimum=1
    )
    keep_last: int | None = setting(
        None, "keep so many checkpoints and the best by eval_loss; null keeps all", minimum=1
    )
    save_best: bool = setting(
        False, "save after every evaluation that is the best so far, besides save_steps"
    )
    content: str = setting(
        "all", "all can be resumed; weights can only be exported", choices=("all", "weights")
    )
    async_save: bool = setting(
        False, "write while training goes on, from a copy of each rank's shards in host memory"
    )


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    dry_run: bool = setting(False, "check and show what would run, and touch nothing")
    shared_disk: bool = setting(
        True,
        "all machines see the run folder; false (torchrun on each): each has one of its own, and "
        "the checkpoints are in that of rank 0's machine",
    )
