"""A loaded model that answers, piece by piece."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.utils import logging

from launcher.chat.options import Conversation, Options, check
from launcher.chat.subject import Subject
from launcher.errors import UserError

GREEDY = Options()
AFTER_MODULE = r"\.(lora_|token_adapter\.|base_layer\.|weight$|bias$).*"


class Talk:
    """The model of a subject on the first GPU in its own dtype, or on the CPU in fp32."""

    def __init__(self, subject: Subject) -> None:
        """Raises UserError when the model cannot be loaded, or has no chat template."""
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.subject = subject
        self.tokens = 0  # of the last answer
        self.tokenizer = _tokenizer(subject.tokenizer)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # A CPU without bf16 arithmetic is several times faster in fp32; the weights are the same.
        self.model = _load(subject, "auto" if device == "cuda" else torch.float32, device)

    def stream(
        self,
        conversation: Conversation,
        options: Options = GREEDY,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[str]:
        """The answer in pieces as they come; it ends early once `stopped()`, or with the iterator.

        Raises UserError for a conversation that is none, or does not fit, and what generating
        raised.
        """
        prompt = self._prompt(conversation)
        length = prompt["input_ids"].shape[1]
        left = self._room_for(length)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        gone, failure, self.tokens = threading.Event(), [], 0

        def ended(tokens: int) -> bool:
            self.tokens = tokens - length
            return gone.is_set() or stopped()

        def generate() -> None:
            try:
                torch.manual_seed(secrets.randbits(63) if options.seed is None else options.seed)
                self.model.generate(
                    **prompt,
                    **self._sampling(options, left),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Ended(ended)]),
                )
            except BaseException as error:  # crosses to the caller, who waits for pieces
                failure.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = threading.Thread(target=generate, name="generate", daemon=True)
        thread.start()
        try:
            yield from filter(None, streamer)
        finally:
            gone.set()
            thread.join()
        if failure:
            raise _readable(failure[0])

    def answer(self, conversation: Conversation, options: Options = GREEDY) -> str:
        """The whole answer."""
        return "".join(self.stream(conversation, options)).strip()

    def _prompt(self, conversation: Conversation) -> Any:
        """input_ids and attention_mask [1, tokens]."""
        check(conversation)
        try:
            prompt = self.tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template is a program: it raises what its author chose
            raise UserError(
                f"the chat template of {self.subject.tokenizer} cannot write this conversation: "
                f"{error}"
            ) from error
        return prompt.to(self.model.device)

    def _room_for(self, length: int) -> int | None:
        """How many tokens may follow `length`; None: as many as one likes."""
        settings = self.model.config.get_text_config()
        positions = getattr(settings, "max_position_embeddings", None)
        if positions is None:
            return None
        if length >= positions:
            raise UserError(
                f"the conversation has {length} tokens and the model {positions} positions; "
                "shorten it, or begin a new one"
            )
        return int(positions) - length

    def _sampling(self, options: Options, left: int | None) -> dict[str, Any]:
        """What else the folder's generation_config.json says (top_k, penalties) holds."""
        tokens = options.max_new_tokens
        given: dict[str, Any] = {
            "max_new_tokens": tokens if left is None else min(tokens, left),
            "do_sample": options.temperature > 0,
            "eos_token_id": self._ends(),
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        if options.temperature > 0:
            given |= {"temperature": options.temperature, "top_p": options.top_p}
        return given

    def _ends(self) -> list[int] | None:
        """The model's end tokens and the tokenizer's: data.template may have taught another."""
        known = self.model.generation_config.eos_token_id
        ends = known if isinstance(known, list) else [known]
        found = dict.fromkeys([*ends, self.tokenizer.eos_token_id])
        return [token for token in found if token is not None] or None


class _Ended(StoppingCriteria):
    """Asked after every token, with how many there are."""

    def __init__(self, ended: Callable[[int], bool]) -> None:
        self.ended = ended

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ended = self.ended(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), ended, device=input_ids.device)


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # each tokenizer class has its own
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {_line(error)}") from error
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {folder} has no chat template; put a chat_template.jinja beside it"
        )
    return tokenizer


def _load(subject: Subject, dtype: Any, device: str) -> Any:
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            subject.model,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        if lost := sorted(found["missing_keys"]):  # else they would be random numbers
            raise UserError(f"{subject.model} lacks {', '.join(lost[:3])} ({len(lost)} tensors)")
        if subject.adapter is not None:
            model = _with_adapter(model, subject.adapter)
        return model.to(device).eval()
    except UserError:
        raise
    except Exception as error:  # a damaged folder fails in a dozen ways; each means: not this one
        raise UserError(f"{subject.describe()} cannot be loaded: {_line(error)}") from error


def _with_adapter(model: Any, folder: Path) -> Any:
    """With the adapter added to its weights. Raises UserError for what consolidate refuses, too."""
    from launcher.export.merge.adapter import PREFIX, read_adapter
    from launcher.export.merge.settings import check as check_settings
    from launcher.model.peft import PeftModel  # a model without an adapter needs none of it

    adapter = read_adapter(folder)
    check_settings(adapter)
    known = {name for name, _ in model.named_modules()}
    adapted = {re.sub(AFTER_MODULE, "", name.removeprefix(PREFIX)) for name in adapter.tensors}
    if strange := sorted(adapted - known):  # PEFT would leave them out in silence
        raise UserError(
            f"{folder} adapts {strange[0]}, which its base has not: it belongs to another model; "
            "name that with --base DIR"
        )
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)


def _readable(error: BaseException) -> BaseException:
    """Out of memory as a sentence; anything else as it is."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return UserError(f"there is not enough memory for this answer: {_line(error)}")
    return error


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return " ".join(text.split())[:400] or type(error).__name__
