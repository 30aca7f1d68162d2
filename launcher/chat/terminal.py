"""`shardway chat DIR`: talk to a model folder in the terminal.

    shardway chat runs/first/export                                a conversation; /exit ends it
    shardway chat runs/first/export --question "Who are you?"      one answer

Answers are greedy unless --temperature is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import IO, Any

from launcher.errors import UserError

Conversation = list[dict[str, str]]


def main() -> None:
    arguments = _parser().parse_args()
    try:
        talk = Talk(arguments.folder, arguments.max_new_tokens, arguments.temperature)
        if arguments.question:
            talk.answer(_opening(arguments.system, arguments.question), sys.stdout)
        else:
            converse(talk, arguments.system)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


class Talk:
    """A loaded model that answers."""

    def __init__(self, folder: Path, max_new_tokens: int = 256, temperature: float = 0.0) -> None:
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} is no model folder (no config.json); make one of a run with "
                "shardway consolidate RUN --output DIR"
            )
        import torch  # after the folder was found to be one
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from launcher.model.tokenizer import load_tokenizer

        logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = load_tokenizer(folder, trust_remote_code=False)
        # A CPU without bf16 arithmetic is several times faster in fp32; the weights are the same.
        dtype: Any = "auto" if device == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        if temperature > 0:
            self.options |= {"do_sample": True, "temperature": temperature}

    def answer(self, conversation: Conversation, out: IO[str] | None = None) -> str:
        """The answer to `conversation`, also written to `out` as it comes."""
        from transformers import TextStreamer

        class Written(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                print(text, end="\n" if stream_end else "", file=out, flush=True)

        prompt = self.tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        streamer = (
            Written(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if out else None
        )
        generated = self.model.generate(
            **prompt, **self.options, pad_token_id=self.tokenizer.pad_token_id, streamer=streamer
        )
        new = generated[0, prompt["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()


def converse(talk: Talk, system: str | None) -> None:
    """Questions from the keyboard until /exit or the end of input."""
    conversation: Conversation = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            question = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question in ("/exit", "exit"):
            return
        if not question:
            continue
        conversation.append({"role": "user", "content": question})
        print("model: ", end="", flush=True)
        try:
            answer = talk.answer(conversation, sys.stdout)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            print()
            conversation.pop()
            continue
        conversation.append({"role": "assistant", "content": answer})


def _opening(system: str | None, question: str) -> Conversation:
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": question}]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardway chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="an exported folder, or any model folder")
    parser.add_argument("--question", help="ask this, print the answer and end")
    parser.add_argument("--system", help="the system prompt; without it the template's own")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    return parser


if __name__ == "__main__":
    main()
