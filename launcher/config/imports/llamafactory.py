"""LLaMA-Factory's YAML files as Shardway's commands.

Names and defaults are those of its `hparams` in August 2026 and of transformers' TrainingArguments.
A setting that a file leaves out gets LLaMA-Factory's default where Shardway's is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.config.imports import distribution, trainer
from launcher.config.imports.llamafactory_keys import IGNORED, UNUSED
from launcher.config.imports.translation import Reader, Translation, as_list, is_off
from launcher.errors import UserError

PEER = "LLaMA-Factory"
ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}
MIXING = {"concat": None, "interleave_under": "first_exhausted", "interleave_over": "all_exhausted"}
STAGES = {"dpo": "preference training", "kto": "preference training"}
STAGES |= {"rm": "reward modeling", "ppo": "reinforcement learning"}
OUR_TEMPLATES = {"alpaca": "alpaca", "chatml": "chatml", "vicuna": "vicuna"}


def translate(
    settings: Mapping[str, Any], folders: list[Path], ranks: int, accelerate: Path | None
) -> Translation:
    """The command that does what LLaMA-Factory does with `settings`.

    Args:
        settings: the keys of the file.
        folders: where relative paths may start: the working directory, and the file's folder with
            its parents.
        ranks: processes of the whole run, which the file does not tell: global batch =
            per device × accumulation × ranks.
        accelerate: the file that was given to `accelerate launch`, if any.

    Raises UserError for settings that are not LLaMA-Factory's.
    """
    reader = Reader(settings, PEER)
    if not reader.has("model_name_or_path"):
        raise UserError(
            "model_name_or_path is missing, without which LLaMA-Factory starts nothing → a file "
            "of `llamafactory-cli train`, export or chat"
        )
    trains, predicts = (not is_off(reader.take(key, False)) for key in ("do_train", "do_predict"))
    if reader.take("export_dir"):
        _export(reader)
    elif trains or (reader.has("output_dir") and not predicts):
        _train(reader, folders, ranks, accelerate)
    else:
        _chat(reader)
    if predicts:
        reader.refuse("do_predict", "a file of questions is not answered: shardway chat --question")
    return reader.finish(IGNORED, UNUSED)


def _train(reader: Reader, folders: list[Path], ranks: int, accelerate: Path | None) -> None:
    _model(reader)
    _method(reader)
    _data(reader, folders)
    trainer.training(reader, ranks)
    _recomputation(reader)
    _precision(reader)
    if accelerate:
        distribution.accelerate(reader, "--accelerate", accelerate)
    elif reader.has("deepspeed"):
        distribution.deepspeed(reader, "deepspeed", folders)
    elif words := reader.take("fsdp"):
        distribution.fsdp(reader, reader.mapping("fsdp_config"), str(words))
    elif ranks > 1:
        reader.add("strategy=ddp")
    reader.known |= {"deepspeed", "fsdp", "fsdp_config"}
    reader.set("run_dir", reader.take("output_dir", "saves"))
    if not is_off(reader.take("overwrite_output_dir", False)):
        reader.note("overwrite_output_dir", "a run folder is never overwritten: choose a new one")


def _model(reader: Reader) -> None:
    reader.set("model.name_or_path", str(reader.take("model_name_or_path")))
    if (revision := reader.take("model_revision", "main")) != "main":
        reader.set("model.revision", revision)
    if not is_off(reader.take("trust_remote_code", False)):
        reader.add("model.trust_remote_code=true")
        reader.note("trust_remote_code", "most models do not need it: leave it out if yours runs")
    attention = str(reader.take("flash_attn", "auto")).lower()
    if attention in ATTENTION:
        reader.set("model.attention", ATTENTION[attention])
    elif attention != "auto":
        reader.refuse("flash_attn", f"choose one of {', '.join(sorted(set(ATTENTION.values())))}")
    tokens = as_list(reader.take("add_tokens")) + as_list(reader.take("add_special_tokens"))
    if tokens:
        reader.set("model.add_tokens", tokens)
        reader.known.add("resize_vocab")
    if not is_off(reader.take("enable_liger_kernel", False)):
        reader.add("training.kernels=liger", "training.loss=liger")
    if reader.has("moe_aux_loss_coef"):
        reader.set("training.router_aux_loss", reader.number("moe_aux_loss_coef", 0))


def _method(reader: Reader) -> None:
    stage = str(reader.take("stage", "sft"))
    if stage in STAGES:
        reader.refuse("stage", f"{STAGES[stage]} is not built; sft and pt are")
    kind = str(reader.take("finetuning_type", "lora"))
    bits = int(reader.number("quantization_bit", 0))
    method = "qlora" if kind == "lora" and bits else kind
    if kind not in ("lora", "full", "freeze"):
        reader.refuse("finetuning_type", "choose method=lora, qlora, freeze or full")
        return
    reader.add(f"method={method}")
    if method == "freeze":
        reader.set("method.layers", int(reader.number("freeze_trainable_layers", 2)))
        reader.set("method.modules", as_list(reader.take("freeze_trainable_modules", "all")))
        if extra := as_list(reader.take("freeze_extra_modules")):
            reader.set("method.extra_modules", extra)
    if kind == "lora":
        _lora(reader)
    reader.known |= {"quantization_method", "quantization_type", "double_quantization"}
    if bits and kind != "lora":
        reader.refuse("quantization_bit", f"method={kind} trains weights that are not quantized")
    elif bits:
        _quantization(reader, bits)


def _lora(reader: Reader) -> None:
    names = {
        "lora_rank": "method.rank",
        "lora_alpha": "method.alpha",
        "lora_dropout": "method.dropout",
        "use_rslora": "method.rslora",
        "use_dora": "method.dora",
        "loraplus_lr_ratio": "method.plus_ratio",
    }
    reader.translate(names)
    targets = as_list(reader.take("lora_target", "all"))
    if targets != ["all"]:
        reader.set("method.target_modules", targets)
    if saved := as_list(reader.take("additional_target")):
        reader.set("method.modules_to_save", saved)
    iterations = int(reader.number("pissa_iter", 16))
    if not is_off(reader.take("pissa_init", False)):
        reader.add("method.pissa=true")
        reader.set("method.pissa_iterations", iterations if iterations > 0 else None)
    if not is_off(reader.take("pissa_convert", False)):
        reader.note("pissa_convert", "every export of a PiSSA run is for the unchanged base")
    adapters = as_list(reader.take("adapter_name_or_path"))
    if not is_off(reader.take("create_new_adapter", False)) and adapters:
        reader.set("method.merge_first", adapters)
    elif len(adapters) == 1:
        reader.set("method.adapter", adapters[0])
    elif adapters:
        reader.refuse(
            "adapter_name_or_path",
            "several adapters are merged before a new one: method.merge_first=[…]; or export the "
            "first ones with shardway consolidate and train the last one on the result",
        )


def _quantization(reader: Reader, bits: int) -> None:
    backend = str(reader.take("quantization_method", "bnb")).lower()
    if backend not in ("bnb", "bitsandbytes"):
        reader.refuse("quantization_method", "bitsandbytes quantizes: 4 or 8 bits")
    if bits not in (4, 8):
        reader.refuse("quantization_bit", "choose method.bits=4 or 8")
        return
    if bits == 8:
        reader.add("method.bits=8")
    else:
        names = {
            "quantization_type": "method.quant_type",
            "double_quantization": "method.double_quant",
        }
        reader.translate(names)


def _data(reader: Reader, folders: list[Path]) -> None:
    folder = str(reader.take("dataset_dir", "data"))
    names = as_list(reader.take("dataset"))
    if not names:
        reader.refuse("dataset", "is missing: name the rows with data.path=…")
    elif folder.upper().startswith(("ONLINE", "REMOTE")):
        reader.refuse("dataset_dir", "name rows of the hub with data.path=hub:OWNER/NAME")
    else:
        reader.add("data=llamafactory")
        reader.set("data.dataset_info", f"{folder.rstrip('/')}/dataset_info.json")
        reader.set("data.name", ",".join(names))
    raw_text = reader.take("stage", "sft") == "pt"
    if raw_text:
        reader.add("data.format=text")
    _packing(reader, raw_text)
    reader.set("data.max_length", int(reader.number("cutoff_len", 2048)))
    if not raw_text:
        reader.add("data.too_long=cut")
        note = "a longer row loses its end; data.too_long=drop leaves it out"
        reader.note("cutoff_len", note)
    reader.translate({"max_samples": "data.max_rows", "streaming": "data.streaming"})
    last, everything = reader.take("mask_history", False), reader.take("train_on_prompt", False)
    if not is_off(last) or not is_off(everything):
        reader.set("data.train_on", "last_answer" if not is_off(last) else "all")
    _mixing(reader, names)
    if not is_off(reader.take("disable_shuffling", False)):
        reader.add("data.shuffle=false")
    _template(reader)
    _held_out(reader, folders, folder)


def _packing(reader: Reader, raw_text: bool) -> None:
    packing, neat = reader.take("packing"), not is_off(reader.take("neat_packing", False))
    if raw_text:
        if packing is not None and is_off(packing):
            reader.add("data.concatenate=false")
    elif neat or (packing is not None and not is_off(packing)):
        reader.add("data.packing=true")
        if not neat:
            reader.note("packing", "attention stays within each row, as with neat_packing")


def _mixing(reader: Reader, names: list[str]) -> None:
    strategy = str(reader.take("mix_strategy", "concat"))
    if strategy not in MIXING:
        reader.refuse("mix_strategy", "choose data.mixing=concatenate or interleave")
    elif (stopping := MIXING[strategy]) is not None:
        reader.add("data.mixing=interleave", f"data.stopping={stopping}")
    probabilities = set(as_list(reader.take("interleave_probs")))
    if len(probabilities) > 1:
        reader.refuse(
            "interleave_probs",
            f"list the rows of {', '.join(names)} in data.sources, each with its weight",
        )


def _template(reader: Reader) -> None:
    template = reader.take("template")
    if template in OUR_TEMPLATES:
        reader.set("data.template", OUR_TEMPLATES[template])
    elif template is not None:
        reader.note(
            "template",
            "the tokenizer's own chat template is used; look at a row with shardway data preview",
        )
    if reader.has("enable_thinking") and is_off(reader.take("enable_thinking")):
        reader.add("data.template_arguments.enable_thinking=false")


def _held_out(reader: Reader, folders: list[Path], dataset_dir: str) -> None:
    size = reader.number("val_size", 0)
    if size >= 1:
        reader.set("data.eval_rows", int(size))
    elif size > 0:
        reader.set("data.eval_fraction", size)
    if names := as_list(reader.take("eval_dataset")):
        found = distribution.read_mapping(f"{dataset_dir}/dataset_info.json", folders) or {}
        entry = found.get(names[0], {})
        if len(names) == 1 and entry.get("file_name"):
            reader.set("data.eval_path", f"{dataset_dir.rstrip('/')}/{entry['file_name']}")
        else:
            reader.refuse("eval_dataset", "name one file with data.eval_path=…")


def _recomputation(reader: Reader) -> None:
    """LLaMA-Factory recomputes every layer unless a file says otherwise."""
    if is_off(reader.take("disable_gradient_checkpointing", False)):
        reader.add("training.activation_checkpointing=full")


def _precision(reader: Reader) -> None:
    stated = {key: not is_off(reader.take(key, False)) for key in ("pure_bf16", "bf16", "fp16")}
    chosen = [name for name, on in stated.items() if on]
    reader.add(f"precision={chosen[0] if chosen else 'fp32'}")


def _export(reader: Reader) -> None:
    reader.result.verb = "consolidate"
    adapters = as_list(reader.take("adapter_name_or_path"))
    model = str(reader.take("model_name_or_path"))
    if len(adapters) == 1:
        reader.add(adapters[0], "--base", model)
    else:
        reader.add(model, *(word for adapter in adapters for word in ("--adapter", adapter)))
    reader.add("--output", str(reader.take("export_dir")))
    reader.add("--max-shard-size", f"{reader.take('export_size', 5)}GB")
    if str(reader.take("export_device", "cpu")) == "auto":
        reader.add("--device", "auto")
    dtype = str(reader.take("infer_dtype", "auto"))
    names = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    if dtype in names:
        reader.add("--dtype", names[dtype])
    if not is_off(reader.take("trust_remote_code", False)):
        reader.add("--trust-remote-code")
    if repository := reader.take("export_hub_model_id"):
        reader.add("--push-to-hub", str(repository))
    if reader.take("quantization_bit"):
        reader.add("--qlora-base", "dequantized")
        reader.note("quantization_bit", "the adapter is added to the weights that training used")
    reader.known |= {"template", "finetuning_type", "stage"}


def _chat(reader: Reader) -> None:
    reader.result.verb = "chat"
    adapters = as_list(reader.take("adapter_name_or_path"))
    model = str(reader.take("model_name_or_path"))
    reader.add(*([adapters[0], "--base", model] if adapters else [model]))
    if len(adapters) > 1:
        reader.refuse("adapter_name_or_path", "merge them first with shardway consolidate")
    options = {"max_new_tokens": "--max-new-tokens", "temperature": "--temperature"}
    options |= {"top_p": "--top-p"}
    for key, option in options.items():
        if reader.has(key):
            reader.add(option, str(reader.take(key)))
    if str(reader.take("infer_backend", "huggingface")) != "huggingface":
        reader.note("infer_backend", "shardway serve prints the command of vLLM and SGLang")
    if not is_off(reader.take("trust_remote_code", False)):
        reader.note("trust_remote_code", "chat runs no code of a model's folder")
    reader.known |= {"template", "finetuning_type", "stage"}
