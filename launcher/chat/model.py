"""A loaded model that streams its answers."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.utils import logging

from launcher.chat.options import Conversation, Options, check_conversation
from launcher.chat.target import ChatTarget
from launcher.errors import UserError, one_line
from launcher.io.absent_towers import towers_may_be_absent
from launcher.io.answer_end import end_tokens
from launcher.io.limits import render_within_limits
from launcher.io.model_class import class_to_load

GREEDY = Options()


class ChatModel:
    """The model of a target, on the first GPU in its own dtype or on the CPU in fp32."""

    def __init__(self, target: ChatTarget) -> None:
        """Raises UserError if the model cannot be loaded or has no chat template."""
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.target = target
        self.tokens = 0  # number of tokens of the last answer
        self.tokenizer = _load_tokenizer(target.tokenizer)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # A CPU without bf16 arithmetic is several times faster in fp32; the weights are the same.
        self.model = _load_model(target, "auto" if device == "cuda" else torch.float32, device)

    def stream(
        self,
        conversation: Conversation,
        options: Options = GREEDY,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[str]:
        """Yield pieces of the answer as they are generated.

        The answer ends early once `should_stop()` is true or the iterator is closed. Raises
        UserError for a conversation that is invalid or too long, and any error of generation.
        """
        prompt = self._encode(conversation)
        prompt_length = prompt["input_ids"].shape[1]
        remaining = self._remaining_positions(prompt_length)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed, failures, self.tokens = threading.Event(), [], 0

        def is_done(total_tokens: int) -> bool:
            self.tokens = total_tokens - prompt_length
            return closed.is_set() or should_stop()

        def generate() -> None:
            try:
                torch.manual_seed(secrets.randbits(63) if options.seed is None else options.seed)
                self.model.generate(
                    **prompt,
                    **self._generation_arguments(options, remaining),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_CallbackCriteria(is_done)]),
                )
            except BaseException as error:  # re-raised in the caller, which waits for pieces
                failures.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = threading.Thread(target=generate, name="generate", daemon=True)
        thread.start()
        try:
            yield from filter(None, streamer)
        finally:
            closed.set()
            thread.join()
        if failures:
            raise _as_user_error(failures[0])

    def answer(self, conversation: Conversation, options: Options = GREEDY) -> str:
        """The complete answer. Raises the same errors as `stream`."""
        return "".join(self.stream(conversation, options)).strip()

    def _encode(self, conversation: Conversation) -> BatchEncoding:
        """input_ids and attention_mask, [1, tokens] int64, on the model's device."""
        check_conversation(conversation)
        try:
            prompt = render_within_limits(
                lambda: self.tokenizer.apply_chat_template(
                    conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            )
        except Exception as error:  # a template is a program and can raise any error
            raise UserError(
                f"the chat template of {self.target.tokenizer} cannot render this conversation: "
                f"{error}"
            ) from error
        return prompt.to(self.model.device)

    def _remaining_positions(self, prompt_length: int) -> int | None:
        """How many tokens fit after the prompt; None if the model has no limit."""
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None:
            return None
        if prompt_length >= positions:
            raise UserError(
                f"the conversation has {prompt_length} tokens and the model {positions} positions; "
                "shorten it, or start a new one"
            )
        return int(positions) - prompt_length

    def _generation_arguments(self, options: Options, remaining: int | None) -> dict[str, Any]:
        """Other settings of the folder's generation_config.json (top_k, penalties) still apply."""
        tokens = options.max_new_tokens
        arguments: dict[str, Any] = {
            "max_new_tokens": tokens if remaining is None else min(tokens, remaining),
            "do_sample": options.temperature > 0,
            "eos_token_id": self._end_token_ids(),
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        if options.temperature > 0:
            arguments |= {"temperature": options.temperature, "top_p": options.top_p}
        return arguments

    def _end_token_ids(self) -> list[int] | None:
        """All tokens that may end an answer: those of the model, of the tokenizer and of its chat
        template."""
        model_ids = self.model.generation_config.eos_token_id
        model_ids = model_ids if isinstance(model_ids, list) else [model_ids]
        unique = dict.fromkeys(
            [*model_ids, self.tokenizer.eos_token_id, *end_tokens(self.tokenizer)]
        )
        return [token for token in unique if token is not None] or None


class _CallbackCriteria(StoppingCriteria):
    """Calls `is_done` with the number of tokens after each new token."""

    def __init__(self, is_done: Callable[[int], bool]) -> None:
        self.is_done = is_done

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = self.is_done(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), done, device=input_ids.device)


def _load_tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # each tokenizer class raises its own errors
        message = one_line(error)
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {message}") from error
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {folder} has no chat template; add a chat_template.jinja to the "
            "folder"
        )
    return tokenizer


def _load_model(target: ChatTarget, dtype: str | torch.dtype, device: str) -> Any:
    try:
        with towers_may_be_absent():
            model, info = class_to_load(target.model, target.adapter).from_pretrained(
                target.model,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        if missing := sorted(info["missing_keys"]):  # they would be initialized at random
            raise UserError(
                f"{target.model} lacks {', '.join(missing[:3])} ({len(missing)} tensors)"
            )
        if target.adapter is not None:
            model = _merge_adapter(model, target.adapter)
        return model.to(device).eval()
    except UserError:
        raise
    except Exception as error:  # a damaged folder raises many kinds of errors
        raise UserError(f"{target.describe()} cannot be loaded: {one_line(error)}") from error


def _merge_adapter(model: Any, folder: Path) -> Any:
    """Add the adapter to the model's weights. Raises UserError for what consolidate refuses."""
    from launcher.io.adapter import check_modules, read_adapter
    from launcher.io.adapter_config import check_mergeable
    from launcher.model.peft import PeftModel, shares_adapted_weights  # only adapters need it

    adapter = read_adapter(folder)
    check_mergeable(adapter)
    check_modules(adapter, {name for name, _ in model.named_modules()})
    adapted = PeftModel.from_pretrained(model, str(folder))
    if shares_adapted_weights(adapted):  # PEFT would merge the delta at each place
        return adapted
    return adapted.merge_and_unload(safe_merge=True)


def _as_user_error(error: BaseException) -> BaseException:
    """A UserError if memory ran out; any other error unchanged."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return UserError(f"there is not enough memory for this answer: {one_line(error)}")
    return error
