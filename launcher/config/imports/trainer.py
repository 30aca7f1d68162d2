"""The settings of transformers' TrainingArguments, which LLaMA-Factory and others pass on.

Names and defaults: transformers 5, and the older names that files of its users still have.
"""

from __future__ import annotations

from launcher.config.imports.translation import Reader, as_list, is_off

OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "adamw_paged",
    "paged_adamw_32bit": "adamw_paged",
    "adafactor": "adafactor",
    "lion": "lion",
    "lion_32bit": "lion",
    "sgd": "sgd",
}
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
)
CURVE_SETTINGS = {  # keys of lr_scheduler_kwargs
    "num_cycles": "scheduler.cycles",
    "power": "scheduler.power",
    "lr_end": "scheduler.minimum_rate",
    "min_lr": "scheduler.minimum_rate",
    "timescale": "scheduler.timescale",
    "factor": "scheduler.factor",
    "patience": "scheduler.patience",
    "threshold": "scheduler.threshold",
    "cooldown": "scheduler.cooldown",
}
TRACKERS = ("tensorboard", "wandb", "mlflow")


def training(reader: Reader, ranks: int) -> None:
    """Length, batch, optimizer, learning rate, logs, evaluations and checkpoints."""
    _length(reader)
    _batch(reader, ranks)
    _optimizer(reader)
    _schedule(reader)
    _evaluation(reader)
    _checkpoints(reader)
    _logs(reader)
    names = {
        "max_grad_norm": "training.max_grad_norm",
        "label_smoothing_factor": "training.label_smoothing",
        "neftune_noise_alpha": "training.neftune_alpha",
        "seed": "training.seed",
        "tf32": "training.tf32",
        "full_determinism": "training.deterministic",
    }
    reader.translate(names)
    if reader.take("data_seed", reader.take("seed", 42)) != reader.take("seed", 42):
        reader.refuse("data_seed", "training.seed seeds the order of the rows, too")
    if not is_off(reader.take("torch_compile", False)):
        reader.add("training.compile=on")
    if not is_off(reader.take("use_liger_kernel", False)):
        reader.add("training.kernels=liger", "training.loss=liger")
    sampling = str(reader.take("train_sampling_strategy", "random"))
    if sampling == "group_by_length" or not is_off(reader.take("group_by_length", False)):
        reader.add("data.group_by_length=true")
    elif sampling == "sequential":
        reader.add("data.shuffle=false")
    elif sampling != "random":
        reader.refuse("train_sampling_strategy", "choose data.group_by_length or data.shuffle")
    resume = reader.take("resume_from_checkpoint")
    if str(resume).lower() == "true":
        reader.add("resume=auto")
    elif not is_off(resume):
        reader.refuse(
            "resume_from_checkpoint",
            "a checkpoint of another trainer cannot be resumed: export it with shardway "
            "consolidate and train the result further",
        )


def _length(reader: Reader) -> None:
    steps, epochs = int(reader.number("max_steps", -1)), reader.number("num_train_epochs", 3)
    if steps > 0:
        reader.set("training.max_steps", steps)
    elif epochs.is_integer():
        reader.set("training.epochs", int(epochs))
    else:
        reader.refuse("num_train_epochs", "epochs are whole: training.max_steps=N ends earlier")


def _batch(reader: Reader, ranks: int) -> None:
    micro = int(reader.number("per_device_train_batch_size", 8))
    accumulation = int(reader.number("gradient_accumulation_steps", 1))
    reader.set("training.micro_batch_size", micro)
    reader.set("training.global_batch_size", micro * accumulation * ranks)


def _optimizer(reader: Reader) -> None:
    name = str(reader.take("optim", "adamw_torch"))
    rate, decay = reader.number("learning_rate", 5e-5), reader.number("weight_decay", 0)
    betas = [reader.number("adam_beta1", 0.9), reader.number("adam_beta2", 0.999)]
    epsilon = reader.number("adam_epsilon", 1e-8)
    if name not in OPTIMIZERS:
        reader.refuse("optim", f"choose optimizer={', '.join(dict.fromkeys(OPTIMIZERS.values()))}")
        return
    optimizer = OPTIMIZERS[name]
    reader.add(f"optimizer={optimizer}")
    reader.set("optimizer.learning_rate", rate)
    reader.set("optimizer.weight_decay", decay)
    if optimizer in ("sgd", "adafactor"):
        return
    if betas != [0.9, 0.999]:
        reader.set("optimizer.betas", betas)
    if epsilon != 1e-8 and optimizer != "lion":
        reader.set("optimizer.epsilon", epsilon)


def _schedule(reader: Reader) -> None:
    name = str(reader.take("lr_scheduler_type", "linear"))
    options = reader.mapping("lr_scheduler_kwargs")
    steps, ratio = reader.number("warmup_steps", 0), reader.number("warmup_ratio", 0.0)
    if name == "cosine_with_min_lr":
        name = "cosine"
        if isinstance(ratio := options.pop("min_lr_rate", None), int | float):
            options["min_lr"] = ratio * reader.number("learning_rate", 5e-5)
    if name not in SCHEDULERS:
        reader.refuse("lr_scheduler_type", f"choose scheduler={', '.join(SCHEDULERS)}")
        return
    reader.add(f"scheduler={name}")
    for key, value in options.items():
        if key in CURVE_SETTINGS:
            reader.set(CURVE_SETTINGS[key], value)
        else:
            reader.refuse("lr_scheduler_kwargs", f"scheduler={name} has no {key}")
    if 0 < steps < 1:  # transformers 5: a fraction of the training
        steps, ratio = 0, steps
    if (steps or ratio) and name in ("constant", "reduce_lr_on_plateau"):
        key = "warmup_steps" if steps else "warmup_ratio"
        reader.refuse(key, f"scheduler={name} has no warm-up → scheduler=constant_with_warmup")
    elif steps:
        reader.set("scheduler.warmup_steps", int(steps))
    elif ratio:
        reader.set("scheduler.warmup_ratio", ratio)


def _evaluation(reader: Reader) -> None:
    strategy = str(reader.take("eval_strategy", reader.take("evaluation_strategy", "no")))
    every = reader.number("eval_steps", reader.number("logging_steps", 500))
    key = "eval_strategy" if reader.has("eval_strategy") else "evaluation_strategy"
    if strategy == "steps":
        reader.set("training.eval_steps", int(every))
    elif strategy == "epoch":
        reader.refuse(key, "evaluations come every N steps: training.eval_steps=N")
    if patience := int(reader.number("early_stopping_steps", 0)):
        reader.set("training.early_stopping_patience", patience)
    if not is_off(reader.take("load_best_model_at_end", False)):
        reader.add("checkpoint.save_best=true")
        reader.note("load_best_model_at_end", "the best checkpoint is kept: export that one")
    metric = str(reader.take("metric_for_best_model", "loss"))
    if metric not in ("loss", "eval_loss"):
        reader.refuse("metric_for_best_model", "the best evaluation is that of the lowest loss")


def _checkpoints(reader: Reader) -> None:
    strategy = str(reader.take("save_strategy", "steps"))
    every = reader.number("save_steps", 500)
    if strategy == "steps" and every >= 1:
        reader.set("checkpoint.save_steps", int(every))
    elif strategy == "steps":
        reader.refuse("save_steps", "name a number of steps: checkpoint.save_steps=N")
    elif strategy == "best":
        reader.add("checkpoint.save_best=true")
    elif strategy == "epoch":
        reader.refuse("save_strategy", "checkpoints come every N steps: checkpoint.save_steps=N")
    reader.translate({"save_total_limit": "checkpoint.keep_last"})
    if not is_off(reader.take("save_only_model", False)):
        reader.add("checkpoint.content=weights")


def _logs(reader: Reader) -> None:
    every = reader.number("logging_steps", 500)
    reader.set("training.log_steps", max(1, int(every)))
    wanted = [each for each in as_list(reader.take("report_to")) if each not in ("none", "None")]
    if unknown := [each for each in wanted if each not in (*TRACKERS, "all")]:
        reader.refuse("report_to", f"{', '.join(unknown)}: choose {', '.join(TRACKERS)}")
    if trackers := [each for each in wanted if each in TRACKERS]:
        reader.set("tracking.trackers", trackers)
