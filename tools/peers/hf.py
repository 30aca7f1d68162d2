"""The arm of the Trainer of transformers with PEFT, combined as in the documentation."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from peers import count, job


def main() -> None:
    mine = job.read()
    tokenizer = AutoTokenizer.from_pretrained(mine.model)
    model = AutoModelForCausalLM.from_pretrained(mine.model)
    model = get_peft_model(model, LoraConfig(**count.adapter()))
    settings = {"train_sampling_strategy": "sequential", **mine.settings}
    flat = settings.pop("padding_free", False)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**count.arguments(mine), **settings),
        train_dataset=Dataset.from_list([_row(tokenizer, text) for text in mine.texts()]),
        data_collator=DataCollatorWithFlattening() if flat else DataCollatorForSeq2Seq(tokenizer),
        callbacks=[count.Count(mine)],
    )
    trainer.train()


def _row(tokenizer: Any, text: dict[str, str]) -> dict[str, list[int]]:
    asked = tokenizer(count.prompt(tokenizer, text["question"]), add_special_tokens=False)
    answer = tokenizer(text["answer"] + tokenizer.eos_token, add_special_tokens=False)
    before, after = asked["input_ids"], answer["input_ids"]
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


if __name__ == "__main__":
    main()
