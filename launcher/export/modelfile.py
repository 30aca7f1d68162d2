"""Writes an Ollama Modelfile whose template comes from the tokenizer's chat template.

Ollama's templates are written in Go's language, chat templates in Jinja. Instead of translating
code, this module renders conversations with the chat template and finds the text around each part
(https://docs.ollama.com/modelfile). Tools and reasoning blocks are not supported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.io.answer_end import end_tokens
from launcher.io.limits import render_within_limits

# Contents of messages that can be found again in the rendered text.
SYSTEM, USER, ANSWER, AGAIN = "\u2460sys", "\u2461usr", "\u2462ans", "\u2463agn"


def make_modelfile(
    folder: Path | None,
    config: dict[str, Any],
    trust_remote_code: bool = False,
    template: str | None = None,
) -> str:
    """The text of the Modelfile for a model whose tokenizer is in `folder`. `template`: its chat
    template, if it is another one.

    Raises UserError if there is no tokenizer, or if its chat template cannot be converted.
    """
    from transformers import AutoTokenizer  # takes seconds to import; only this option needs it

    if folder is None:
        raise UserError("--modelfile: no tokenizer is known, and so no chat template")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each tokenizer class raises its own errors
        raise UserError(
            f"--modelfile: the tokenizer in {folder} cannot be read: {error}"
        ) from error
    tokenizer.chat_template = template or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise UserError(f"--modelfile: the tokenizer in {folder} has no chat template")
    ends = tokenizer.convert_ids_to_tokens(list(end_tokens(tokenizer)))
    stop = dict.fromkeys(filter(None, (tokenizer.eos_token, *ends)))
    lines = ["FROM .", f'TEMPLATE """{_template(tokenizer, folder)}"""']
    lines += [f'PARAMETER stop "{token}"' for token in stop]
    context = config.get("max_position_embeddings") or config.get("n_positions")
    if context:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def _template(tokenizer: Any, folder: Path) -> str:
    """The Go template of one turn: system, prompt, response."""
    question = _render(tokenizer, [("user", USER)], True)
    answered = _render(tokenizer, [("user", USER), ("assistant", ANSWER)], False)
    two_turns = _render(tokenizer, [("user", USER), ("assistant", ANSWER), ("user", AGAIN)], False)
    try:
        _, before_answer = question.split(USER)
        _, end = answered.split(ANSWER)
        between = two_turns.split(ANSWER)[1].split(AGAIN)[0]
        before_user = between.removeprefix(end)
        system = _system_part(tokenizer, before_user)
    except (ValueError, IndexError):
        raise UserError(
            f"--modelfile: the chat template of {folder} does not write each message once, in "
            "order; write the Modelfile by hand"
        ) from None
    prompt = f"{{{{ if .Prompt }}}}{before_user}{{{{ .Prompt }}}}{{{{ end }}}}"
    return f"{system}{prompt}{before_answer}{{{{ .Response }}}}{end}"


def _system_part(tokenizer: Any, before_user: str) -> str:
    from jinja2 import TemplateError

    try:
        text = _render(tokenizer, [("system", SYSTEM), ("user", USER)], False)
    except TemplateError:
        return ""  # the template refuses system messages
    before, rest = text.split(SYSTEM)
    after = rest.split(USER)[0].removesuffix(before_user)
    if getattr(tokenizer, "add_bos_token", False):
        before = before.removeprefix(tokenizer.bos_token or "")  # Ollama adds it itself
    return f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ end }}}}"


def _render(tokenizer: Any, messages: list[tuple[str, str]], add_generation_prompt: bool) -> str:
    conversation = [{"role": role, "content": content} for role, content in messages]
    return render_within_limits(
        lambda: str(
            tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    )
