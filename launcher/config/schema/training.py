"""Schema of the sections that have no group: `training`, `checkpoint`, `launch`."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.setting import setting

MAX_COUNT = 10**9  # a larger number is a typing error
MAX_MINUTES = 7 * 24 * 60


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Length of the training, batches, loss and evaluation."""

    max_steps: int | None = setting(
        None, "optimizer steps; alternative to training.epochs", minimum=1, maximum=MAX_COUNT
    )
    epochs: int | None = setting(
        None,
        "passes over the data; alternative to training.max_steps",
        minimum=1,
        maximum=MAX_COUNT,
    )
    stop_after_steps: int | None = setting(
        None,
        "stop after this step with a checkpoint; the schedule stays that of the full training",
        minimum=1,
    )
    micro_batch_size: int = setting(
        1, "rows per rank in one forward pass", minimum=1, maximum=MAX_COUNT
    )
    global_batch_size: int = setting(
        8, "rows per optimizer step over all ranks", minimum=1, maximum=MAX_COUNT
    )
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", above=0)
    activation_checkpointing: str = setting(
        "off",
        "layers whose activations are recomputed in backward instead of stored: off, full (all "
        "layers) or N (the first of every N layers)",
    )
    loss: str = setting(
        "chunked",
        "chunked: compute the loss over chunks of the positions without storing logits, if the "
        "model allows it; liger: the same with Liger's Triton kernel; whole: from all logits at "
        "once",
        choices=("chunked", "liger", "whole"),
    )
    kernels: str = setting(
        "torch",
        "implementation of RMSNorm, the gated MLP product and rotary positions: torch, or liger "
        "(Liger's Triton kernels, for the architectures that Liger supports)",
        choices=("torch", "liger"),
    )
    compile: str = setting(
        "off",
        "compile each layer's forward and backward with torch.compile: off, on, or auto (try both "
        "at the start and keep the faster one)",
        choices=("off", "on", "auto"),
    )
    tf32: bool = setting(
        False,
        "compute fp32 matrix products with 10-bit fractions (TF32) on NVIDIA GPUs since Ampere: "
        "7 times as fast as fp32 by the data sheet of an H100",
    )
    deterministic: bool = setting(
        False,
        "sum in a fixed order, so that the same run gives the same bits on GPUs, too; slower",
    )
    neftune_alpha: float | None = setting(
        None, "size of the noise added to embeddings during training (NEFTune)", above=0
    )
    label_smoothing: float = setting(
        0.0,
        "share of the target's probability that is spread over all tokens",
        minimum=0,
        maximum=1,
    )
    router_aux_loss: str = setting(
        "off",
        "add the auxiliary loss by which a mixture of experts learns to use all of them: off, "
        "model (times router_aux_loss_coef of its config.json) or the coefficient, such as 0.001",
    )
    skipped_steps: int = setting(
        20, "consecutive steps without a finite gradient after which the run ends", minimum=1
    )
    on_spike: str = setting(
        "ignore",
        "what a spike of the loss leads to: ignore; stop (end the run with a report); rewind (go "
        "back to the checkpoint before it, leave its batch out and go on; also for a loss that is "
        "not finite)",
        choices=("ignore", "stop", "rewind"),
    )
    spike_threshold: float = setting(
        10.0,
        "a loss is a spike if it is above the median of the last steps by this many times their "
        "spread (1.48 times the median absolute deviation, at least 2 % of the median)",
        above=0,
    )
    spike_window: int = setting(
        64, "how many of the last steps a loss is compared with", minimum=4, maximum=10_000
    )
    eval_steps: int | None = setting(
        None, "evaluate every N steps, and always at the end", minimum=1
    )
    early_stopping_patience: int | None = setting(
        None, "consecutive evaluations without a lower eval_loss after which to stop", minimum=1
    )
    early_stopping_threshold: float = setting(
        0.0, "for early stopping: a loss counts as lower if it falls by more than this", minimum=0
    )
    log_steps: int = setting(1, "write metrics every N steps, one line for each step", minimum=1)
    seed: int = setting(
        42,
        "seed of the data order, the adapters' initial values and dropout",
        minimum=0,
        maximum=2**31,
    )


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When to save checkpoints, and what they contain."""

    save_steps: int | None = setting(None, "save every N steps, and always at the end", minimum=1)
    keep_last: int | None = setting(
        None, "keep the newest N checkpoints and the best by eval_loss; null: keep all", minimum=1
    )
    save_best: bool = setting(False, "also save after every evaluation that is the best so far")
    content: str = setting(
        "all", "all: can be resumed; weights: can only be exported", choices=("all", "weights")
    )
    async_save: bool = setting(
        False, "write while training continues, from a copy of each rank's shards in host memory"
    )


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """How the run is started."""

    dry_run: bool = setting(False, "check and show what would run, without writing anything")
    rendezvous_minutes: float = setting(
        5.0,
        "how long ranks wait for each other at the start, until all of them have answered",
        above=0,
        maximum=MAX_MINUTES,
    )
    collective_minutes: float = setting(
        10.0,
        "how long ranks wait for each other in one message of training, loading or saving before "
        "the run fails",
        above=0,
        maximum=MAX_MINUTES,
    )
    shared_disk: bool = setting(
        True,
        "all machines share the run folder; false (torchrun on each machine): each machine has its "
        "own, and the checkpoints are in the one on rank 0's machine",
    )
