"""The arm of TRL's SFTTrainer: prompt and completion, so only the completion is in the loss."""

from __future__ import annotations

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peers import count, job


def main() -> None:
    mine = job.read()
    tokenizer = AutoTokenizer.from_pretrained(mine.model)
    rows = [
        {
            "prompt": count.prompt(tokenizer, text["question"]),
            "completion": text["answer"] + tokenizer.eos_token,
        }
        for text in mine.texts()
    ]
    settings = {"train_sampling_strategy": "sequential", **mine.settings}
    trainer = SFTTrainer(
        model=mine.model,
        args=SFTConfig(**count.arguments(mine), max_length=mine.max_length, **settings),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(**count.adapter()),
        callbacks=[count.Count(mine)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
