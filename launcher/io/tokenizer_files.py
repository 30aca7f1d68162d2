"""The files of a base model's tokenizer, with another chat template and another end token.

The files stay in the form that the base has: only what must change is changed. A tokenizer that
transformers saves itself has the form of that version, which other versions may not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.folders import regular
from launcher.folders.brief import brief
from launcher.folders.file_names import matches
from launcher.folders.json_file import (
    OBJECT,
    Field,
    check_fields,
    dump_like,
    is_count,
    is_object,
    list_of,
    read_object,
)
from launcher.folders.model import TEMPLATES, TOKENIZER_FILES
from launcher.folders.unreadable import is_file

SETTINGS = "tokenizer_config.json"
ADDED = "added_tokens.json"
FAST = "tokenizer.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
# Files of a tokenizer without its tokens.
NO_TOKENS = (SETTINGS, SPECIAL, ADDED, "chat_template*", f"{TEMPLATES}/*", "merges.txt")
TOKENS: Field = (
    list_of(lambda token: is_object(token) and is_count(token.get("id"))),
    "a list of tokens with their ids",
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of an added token

Json = dict[str, Any]


def is_of_tokenizer(name: str) -> bool:
    """Whether it is a file of a tokenizer, by its path below the model's folder."""
    folder, _, last = name.rpartition("/")
    return folder == TEMPLATES or (not folder and matches(last, TOKENIZER_FILES))


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Name → file of the tokenizer of `folder`, with the folder of its other templates."""
    files = [*folder.iterdir(), *(folder / TEMPLATES).glob("*.jinja")]
    names = {str(path.relative_to(folder)): path for path in files if is_file(path)}
    return {name: path for name, path in names.items() if is_of_tokenizer(name)}


def has_vocabulary(folder: Path) -> bool:
    """Whether the folder has a tokenizer's tokens, and not only its settings."""
    return any(not matches(name, NO_TOKENS) for name in tokenizer_files(folder))


def read_files(folder: Path) -> dict[str, bytes]:
    """Name → content of the tokenizer files of `folder`, without its other templates."""
    files = tokenizer_files(folder).items()
    return {name: path.read_bytes() for name, path in files if name == path.name}


def stated_template(folder: Path) -> str | None:
    """The chat template that the files of `folder` state, None if there is none. Raises UserError
    for a file that is not JSON, or not text."""
    if (file := folder / TEMPLATE).is_file():
        try:
            return regular.read_text(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is damaged: {error!s:.200}") from error
    settings = read_object(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    template = settings.get("chat_template")
    if isinstance(template, list):  # of several by name
        named = {each.get("name"): each.get("template") for each in template if is_object(each)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def stated_tokens(folder: Path) -> tuple[str | None, set[str]]:
    """(EOS token, all tokens) that the settings of a tokenizer name. Raises UserError for a file
    that is not JSON."""
    names = (SETTINGS, SPECIAL, ADDED)
    contents = {name: read_object(folder / name) for name in names if (folder / name).is_file()}
    end = _stated_end(contents)
    decoder = contents.get(SETTINGS, {}).get("added_tokens_decoder") or {}
    tokens = {token["content"] for token in decoder.values()} | {*contents.get(ADDED, {})}
    return end, tokens | ({end} if end is not None else set())


def token_ids(folder: Path) -> dict[str, int]:
    """Token → id by the tokenizer.json of `folder`, empty if it has none. Raises UserError if it is
    damaged."""
    if not (path := folder / FAST).is_file():
        return {}
    content = read_object(path)
    check_fields(path, content, {"model": OBJECT, "added_tokens": TOKENS})
    vocabulary = (content.get("model") or {}).get("vocab")
    if isinstance(vocabulary, list):
        pieces = (e[0] if isinstance(e, list) and e else None for e in vocabulary)
        vocabulary = {str(piece or number): number for number, piece in enumerate(pieces)}
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    if wrong := [each for each in ids.values() if not is_count(each)]:
        raise UserError(f"{path}: a token has the id {brief(wrong[0])}, expected a whole number")
    added = content.get("added_tokens") or ()
    return ids | {str(token.get("content", token["id"])): token["id"] for token in added}


def with_template(folder: Path, template: str, end: str | None) -> dict[str, bytes]:
    """Name → content of all tokenizer files of `folder`, with the chat template `template`.

    `end` becomes the EOS token, and a special token; None: the EOS token stays as it is. Files
    without a change are byte for byte those of `folder`. Raises UserError for a file that is not
    JSON.
    """
    files = read_files(folder)
    changed = _changed_files(folder, template, end)
    texts = {
        name: dump_like(content, files[name].decode() if name in files else "")
        for name, content in changed.items()
        if name not in files or content != read_object(folder / name)
    }
    return files | {name: text.encode() for name, text in ({**texts, TEMPLATE: template}).items()}


def _changed_files(folder: Path, template: str, end: str | None) -> dict[str, Json]:
    """The JSON files that template and end token are in, with both set."""
    names = (SETTINGS, FAST, SPECIAL, "chat_template.json")
    contents = {name: read_object(folder / name) for name in names if (folder / name).is_file()}
    for name in (SETTINGS, "chat_template.json"):
        if "chat_template" in contents.get(name, {}):
            contents[name]["chat_template"] = template
    if end is not None and end != _stated_end(contents):
        token = _special_token(folder, contents, end)
        for name in (SETTINGS, SPECIAL):
            if name in contents or name == SETTINGS:
                content = contents.setdefault(name, {})
                content["eos_token"] = _in_form_of(content.get("eos_token"), token)
    return contents


def _stated_end(contents: dict[str, Json]) -> str | None:
    """The EOS token that the files name, None if they leave it to the tokenizer's class."""
    stated = (contents.get(name, {}).get("eos_token") for name in (SETTINGS, SPECIAL))
    token = next(filter(None, stated), None)
    return str(token["content"]) if isinstance(token, dict) else token


def _special_token(folder: Path, contents: dict[str, Json], end: str) -> Json:
    """The entry of the token `end` in tokenizer.json, where it becomes special, as in
    added_tokens_decoder of tokenizer_config.json."""
    decoder = contents.get(SETTINGS, {}).get("added_tokens_decoder")
    fast = contents.get(FAST)
    listed: list[Json] = fast.get("added_tokens") or [] if fast is not None else []
    in_decoder = ({"id": int(n), **token} for n, token in (decoder or {}).items())
    entry = next((each for each in (*listed, *in_decoder) if each["content"] == end), None)
    if entry is None:
        number = _vocabulary_id(folder, fast, end)
        entry = {"id": number, "content": end, **dict.fromkeys(FLAGS, False)}
    entry = {**entry, "special": True}
    if entry["id"] is None:  # the vocabulary is in a file that is not JSON
        return entry
    if fast is not None:
        others = [token for token in listed if token["content"] != end]
        fast["added_tokens"] = sorted([*others, entry], key=lambda token: int(token["id"]))
    if decoder is not None:
        without_id = {key: value for key, value in entry.items() if key != "id"}
        key = str(entry["id"])
        decoder[key] = {**decoder.get(key, without_id), "special": True}
    return entry


def _vocabulary_id(folder: Path, fast: Json | None, token: str) -> int | None:
    """The id of a token that is not listed as an added token, None if no JSON file has it."""
    vocabulary = fast["model"].get("vocab") if fast is not None else None
    if isinstance(vocabulary, list):
        return next((n for n, (piece, *_) in enumerate(vocabulary) if piece == token), None)
    files = [folder / name for name in (ADDED, "vocab.json")]
    for content in (vocabulary or {}, *(read_object(file) for file in files if file.is_file())):
        if token in content:
            return int(content[token])
    return None


def _in_form_of(old: object, token: Json) -> Any:
    """The token as text, or as an object with the keys of `old`."""
    if not isinstance(old, dict):
        return token["content"]
    return {key: token.get(key, value) for key, value in old.items()}
