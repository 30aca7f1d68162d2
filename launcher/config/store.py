"""Build a checked `Config` from a composed mapping; write and read the frozen file."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher.config import SECTIONS, TOP_LEVEL, Config
from launcher.config.schema.setting import broken_limits
from launcher.config.secrets import masked_settings
from launcher.errors import UserError
from launcher.folders import regular
from launcher.folders.json_file import DamagedFile

# The safe loader of libyaml is several times as fast.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ConfigError(UserError):
    """All problems of a configuration. `problems` has one message each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        head = (
            "The configuration cannot run:"
            if len(problems) == 1
            else f"The configuration cannot run, for {len(problems)} reasons:"
        )
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in problems)]))


def build(raw: Mapping[str, Any]) -> Config:
    """Check a composed mapping against the schema.

    Raises ConfigError with every unknown key, wrong type and broken limit at once.
    """
    problems = [describe_unknown(str(key)) for key in raw if key not in (*SECTIONS, *TOP_LEVEL)]
    sections: dict[str, Any] = {}
    for section, schema in SECTIONS.items():
        values = raw[section] if section in raw else {}
        if not isinstance(values, Mapping):
            problems.append(
                f"{section}={values} is not a section; choose a file of conf/{section}/"
            )
            continue
        if isinstance(schema, dict):
            name = values["name"] if "name" in values else None
            if name not in schema:
                problems.append(f"{section}.name={name} is not one of {', '.join(schema)}")
                continue
            schema = schema[name]
        sections[section] = _section(section, schema, values, problems)
    top = {"run_dir": None, "resume": "none", "resume_force": False}
    top |= {key: raw[key] for key in TOP_LEVEL if key in raw}
    if not isinstance(top["resume_force"], bool):
        problems.append(f"resume_force={top['resume_force']} must be true or false")
    if problems:
        raise ConfigError(problems)
    return Config(
        **sections,
        run_dir=None if top["run_dir"] is None else str(top["run_dir"]),
        resume="none" if top["resume"] is None else str(top["resume"]),
        resume_force=bool(top["resume_force"]),
    )


def _section(section: str, schema: type, values: Mapping[Any, Any], problems: list[str]) -> Any:
    """Build one section. If something is wrong, append messages to `problems` and return None."""
    before = len(problems)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    converted: dict[str, Any] = {}
    values = {key: value for key, value in values.items() if value != "???"}
    typed = OmegaConf.structured(schema)
    for key, value in values.items():
        if key not in fields:
            known = [f"{section}.{name}" for name in fields]
            problems.append(describe_unknown(f"{section}.{key}", known))
            continue
        try:
            typed.merge_with({key: value})  # a merged copy takes four times as long
            node = typed[key]
            converted[key] = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException as error:
            problems.append(f"{section}.{key}={value}: {str(error).splitlines()[0]}")
            continue
        # OmegaConf takes text with "${" for any type, since it expects to find the value later.
        if isinstance(value, str) and "${" in value and "str" not in str(fields[key].type):
            problems.append(f"{section}.{key}={value} must be a value, not a reference to one")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            problems.append(f"{section}.{name} is not set; set it to {field.metadata['help']}")
    if len(problems) > before:
        return None
    built = schema(**converted)
    problems += broken_limits(section, built)
    return built


def setting_names(section: str) -> list[str]:
    """The dotted names of a section's settings, over all its schemas."""
    names = [field.name for schema in _schemas(section) for field in dataclasses.fields(schema)]
    return [f"{section}.{name}" for name in dict.fromkeys(names)]


def _schemas(section: str) -> list[type]:
    """The schemas of a section, empty if it does not exist."""
    schema = SECTIONS[section] if section in SECTIONS else {}
    return list(schema.values()) if isinstance(schema, dict) else [schema]


def _choices_with(key: str) -> list[str]:
    """The choices of a section that have the setting `key`."""
    section, _, name = key.partition(".")
    schemas = SECTIONS[section] if section in SECTIONS else None
    if not isinstance(schemas, dict):
        return []
    return [
        choice
        for choice, schema in schemas.items()
        if name in (field.name for field in dataclasses.fields(schema))
    ]


def mapping_setting(key: str) -> str | None:
    """The setting that `key` is or lies in, if that setting is a mapping with free names."""
    section, name = (*key.split("."), "")[:2]
    fields = [field for schema in _schemas(section) for field in dataclasses.fields(schema)]
    is_mapping = any(f.name == name and str(f.type).startswith("dict[") for f in fields)
    return f"{section}.{name}" if is_mapping else None


def describe_unknown(key: str, known: list[str] | None = None) -> str:
    """The message that `key` is not a setting, with the nearest one or, if none is near, all.

    `known`: the settings to choose from; None: those of the section of `key`.
    """
    section = key.partition(".")[0]
    if choices := _choices_with(key):
        return (
            f"{key} is a setting of {section}={', '.join(choices)} and not of the selected "
            f"{section}; remove it (~{key} if a file sets it), or choose {section}={choices[0]}"
        )
    if known is None and section in SECTIONS:
        known = setting_names(section)
    elif known is None:
        key, known = section, [*SECTIONS, *TOP_LEVEL]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
    return f"{key} is not a setting; {hint}"


def dump(config: Config) -> str:
    """The frozen form: plain YAML without tags, interpolation and secrets."""
    return yaml.safe_dump(_tree(config), sort_keys=False, allow_unicode=True)


def leaves(config: Config) -> dict[str, Any]:
    """The value of every setting by its dotted name, such as `optimizer.learning_rate`; `•••` for
    a secret."""
    return dict(leaves_of(_tree(config)))


def _tree(config: Config) -> dict[str, Any]:
    return masked_settings(dataclasses.asdict(config))


def leaves_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and the value of each leaf of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load(path: Path) -> Config:
    """Read a frozen configuration and check it in the same way.

    Raises DamagedFile if it cannot be read, ConfigError if the schema refuses it.
    """
    return build(read_mapping(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """A frozen configuration as nested mappings, not checked against the schema.

    Raises DamagedFile if it cannot be read.
    """
    try:
        raw = yaml.load(regular.read_text(path), Loader=LOADER)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DamagedFile(path, f"is not a frozen configuration: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("training"), dict):
        raise DamagedFile(path, "is not a frozen configuration: it has no sections")
    if _has_aliases(raw, set()):
        raise DamagedFile(path, "is not a frozen configuration: it repeats a part by an alias")
    return raw


def _has_aliases(tree: Any, seen: set[int]) -> bool:
    """Whether a part of `tree` occurs in more than one place. A few of those are billions of values
    for whoever looks at each."""
    if not isinstance(tree, dict | list):
        return False
    if id(tree) in seen:
        return True
    seen.add(id(tree))
    values = tree.values() if isinstance(tree, dict) else tree
    return any(_has_aliases(value, seen) for value in values)


def fingerprint(config: Config) -> str:
    """A hash that is equal on ranks that composed the same run. It does not depend on `run_dir`."""
    return xxhash.xxh3_128_hexdigest(dump(dataclasses.replace(config, run_dir=None)).encode())
