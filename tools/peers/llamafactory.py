"""The arm of LLaMA-Factory, through the function behind `llamafactory-cli train`."""

from __future__ import annotations

import json
from pathlib import Path

from llamafactory.data.formatter import StringFormatter
from llamafactory.data.template import register_template
from llamafactory.train.tuner import run_exp
from transformers import AutoTokenizer

from peers import count, job

SYSTEM = "<|im_start|>system\n{{content}}<|im_end|>\n"
TURN = "<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    mine = job.read()
    # The smollm2 template of LLaMA-Factory also trains on the newline after the end of a turn, and
    # its system message differs from that of the model.
    register_template(
        name="model",
        format_user=StringFormatter(slots=[TURN]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
        format_system=StringFormatter(slots=[SYSTEM]),
        default_system=system_message(mine.model),
        stop_words=["<|im_end|>"],
    )
    datasets = {"rows": {"file_name": mine.rows}}
    (Path(mine.folder) / "dataset_info.json").write_text(json.dumps(datasets))
    arguments = {
        **count.arguments(mine),
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": mine.model,
        "template": "model",
        "dataset": "rows",
        "dataset_dir": mine.folder,
        "cutoff_len": mine.max_length,
        "disable_shuffling": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": job.RANK,
        "lora_alpha": job.ALPHA,
        **mine.settings,
    }
    run_exp(arguments, callbacks=[count.Count(mine)])


def system_message(model: str) -> str:
    """The default system message in the chat template of the model, or an empty string."""
    text = count.prompt(AutoTokenizer.from_pretrained(model), "question")
    before, _, after = SYSTEM.partition("{{content}}")
    return text.removeprefix(before).partition(after)[0] if text.startswith(before) else ""


if __name__ == "__main__":
    main()
