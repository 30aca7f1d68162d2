"""From a composed mapping to a checked `Config`, and to the frozen file and back."""

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
from launcher.config.setting import broken_limits
from launcher.errors import UserError


class ConfigError(UserError):
    """Everything that is wrong with a configuration, one sentence an entry."""

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
    problems = [unknown(str(key)) for key in raw if key not in (*SECTIONS, *TOP_LEVEL)]
    sections: dict[str, Any] = {}
    for section, schema in SECTIONS.items():
        values = raw[section] if section in raw else {}
        if not isinstance(values, Mapping):
            problems.append(f"{section}={values} is not a section; choose one of conf/{section}/")
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
    """Build one section; append what is wrong to `problems` and then return None."""
    before = len(problems)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    converted: dict[str, Any] = {}
    values = {key: value for key, value in values.items() if value != "???"}
    typed = OmegaConf.structured(schema)
    for key, value in values.items():
        if key not in fields:
            known = [f"{section}.{name}" for name in fields]
            problems.append(unknown(f"{section}.{key}", known))
            continue
        try:
            node = OmegaConf.merge(typed, {key: value})
            converted[key] = OmegaConf.to_container(node)[key]  # type: ignore[index]
        except OmegaConfBaseException as error:
            problems.append(f"{section}.{key}={value}: {str(error).splitlines()[0]}")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            problems.append(f"{section}.{name} is not set; it is {field.metadata['help']}")
    if len(problems) > before:
        return None
    built = schema(**converted)
    problems += broken_limits(section, built)
    return built


def settings(section: str) -> list[str]:
    """The dotted names of a section's settings, over all its schemas."""
    schema = SECTIONS[section]
    schemas = list(schema.values()) if isinstance(schema, dict) else [schema]
    names = [field.name for each in schemas for field in dataclasses.fields(each)]
    return [f"{section}.{name}" for name in dict.fromkeys(names)]


def _owners(key: str) -> list[str]:
    """The choices of a section that have the setting `key`."""
    section, _, name = key.partition(".")
    schema = SECTIONS[section] if section in SECTIONS else None
    if not isinstance(schema, dict):
        return []
    return [
        choice
        for choice, each in schema.items()
        if name in (field.name for field in dataclasses.fields(each))
    ]


def _mapping(key: str) -> str | None:
    """The setting that `key` is or lies in, if it holds entries of any name."""
    section, name = (*key.split("."), "")[:2]
    schema = SECTIONS[section] if section in SECTIONS else {}
    fields = [
        field
        for each in (schema.values() if isinstance(schema, dict) else [schema])
        for field in dataclasses.fields(each)
    ]
    holds = any(f.name == name and str(f.type).startswith("dict[") for f in fields)
    return f"{section}.{name}" if holds else None


def unknown(key: str, known: list[str] | None = None) -> str:
    """`key` is no setting, with the nearest one or, where nothing is near, the choice there is."""
    section = key.partition(".")[0]
    if known is None and (mapping := _mapping(key)):
        return f"{key}: entries are added with a plus sign, +{mapping}.NAME=VALUE"
    if owners := _owners(key):
        return (
            f"{key} is a setting of {section}={', '.join(owners)} and not of the one chosen; "
            f"leave it out (~{key} where a file sets it), or choose {section}={owners[0]}"
        )
    if known is None and section in SECTIONS:
        known = settings(section)
    elif known is None:
        key, known = section, [*SECTIONS, *TOP_LEVEL]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"{key} is no setting; {hint}"


def dump(config: Config) -> str:
    """The frozen form: plain YAML, no tags and no interpolation."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def leaves(config: Config) -> dict[str, Any]:
    """Every setting's value by its override, `optimizer.learning_rate`."""
    return dict(leaves_of(dataclasses.asdict(config)))


def leaves_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of nested mappings by its dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load(path: Path) -> Config:
    """Read a frozen configuration through the same gate."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no frozen configuration: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is no frozen configuration: it holds no sections")
    return build(raw)


def fingerprint(config: Config) -> str:
    """Equal for two ranks that composed the same run. The run folder's name does not count."""
    return xxhash.xxh3_128_hexdigest(dump(dataclasses.replace(config, run_dir=None)).encode())
