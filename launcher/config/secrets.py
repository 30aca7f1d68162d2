"""Environment variables whose values are secret: they are passed on, and never written.

The names are those of cluster.secrets, and those of cluster.environment that look like a secret. A
value comes from the environment of the command that submits a job, or from cluster.environment; in
everything that is written or shown, `•••` stands for it. Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from launcher.config.schema.cluster import ClusterConfig, SlurmConfig
from launcher.errors import UserError

MASK = "•••"
# How a word of a name ends: HF_TOKEN, wandbApiKey, PGPASSWORDS. TOKENIZERS_PARALLELISM has none.
SECRET_WORD = re.compile(
    r".*(TOKENS?|KEYS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASES?|CREDENTIALS?|JWTS?|[^MY]PASS)"
)
# MAX_TOKENS and NUM_KEYS are numbers.
COUNTED = {"MAX", "MIN", "NUM", "N", "COUNT", "TOTAL", "PER"}
# NCCL_IB_PKEY is the number of a partition.
NO_SECRETS = {"PKEY", "MONKEY", "HOTKEY", "HOCKEY", "TURKEY", "DONKEY", "WHISKEY"}
# Words that are secret only behind others: MYSQL_PWD, SMTP_PASS, GITHUB_PAT.
SECRET_LAST_WORDS = ("PASS", "PWD", "PAT")
# The last word of a name whose value says where the secret is.
PLACES = ("FILE", "PATH", "DIR", "FOLDER", "HOME")
VALUE = r"(?P<value>'[^']*'|\"(?:\\.|[^\"\\])*\"|(?:\\.|[^\s;&|)'\"])*)"
START = r"(?:^|[\s;&|({'\"])"
ASSIGNMENTS = (
    re.compile(START + r"([A-Za-z_]\w*)(?:\[\w*\])?(?:\+?=|\s*<<<\s*)" + VALUE),
    re.compile(START + r"printf\s+-v\s+([A-Za-z_]\w*)\s+" + VALUE),
)
# What a value takes from elsewhere, and a path behind it.
REFERENCE = re.compile(r"(\$\w+|\$\{[^}]*\}|\$\([^)]*(\)|$)|`[^`]*(`|$))(/[\w./-]*)?")


def is_secret_name(name: str) -> bool:
    """Whether a variable with this name probably holds a secret."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    words = [word.upper() for word in words if not word.isdigit()]
    if not words or words[-1] in PLACES:
        return False
    if len(words) > 1 and words[-1] in SECRET_LAST_WORDS:
        return True
    found = [word for word in words if SECRET_WORD.fullmatch(word) and word not in NO_SECRETS]
    return any(not (word.endswith("S") and COUNTED & {*words}) for word in found)


def secret_names(cluster: ClusterConfig) -> list[str]:
    """The names of a job's secrets; none without a job."""
    if not isinstance(cluster, SlurmConfig):
        return []
    values = cluster.environment.items()
    named = [name for name, value in values if value == MASK or is_secret_name(name)]
    return list(dict.fromkeys([*cluster.secrets, *named]))


def secret_values(cluster: SlurmConfig) -> dict[str, str]:
    """The value of every secret: the one in `cluster.environment`, or in this process's
    environment.

    Raises UserError with the names of those that have none: config.yaml does not keep them.
    """
    given = {name: value for name, value in cluster.environment.items() if value != MASK}
    names = secret_names(cluster)
    if missing := [name for name in names if name not in given and name not in os.environ]:
        raise UserError(
            f"{', '.join(missing)} must be set in the environment: the values of cluster.secrets, "
            f"and of secrets in cluster.environment, are not saved → export {missing[0]}=…"
        )
    return {name: given[name] if name in given else os.environ[name] for name in names}


def masked_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """The sections of a configuration as plain mappings, with `•••` in place of secrets."""
    cluster = tree["cluster"]
    if "secrets" not in cluster:
        return tree
    environment = masked_values(cluster["environment"], cluster["secrets"])
    return {**tree, "cluster": {**cluster, "environment": environment}}


def masked_values(values: Mapping[str, Any], listed: Collection[str] = ()) -> dict[str, Any]:
    """Variables with `•••` in place of the values of secrets."""
    return {
        name: MASK if name in listed or is_secret_name(name) else value
        for name, value in values.items()
    }


def masked_yaml(text: str) -> str:
    """YAML in which the values of secrets in a mapping `environment` are `•••`."""
    listed = re.findall(r"^\s*- (\w+)$", "".join(re.findall(LISTED, text)), re.MULTILINE)
    return "".join(_masked_lines(text.splitlines(keepends=True), listed))


LISTED = re.compile(r"^ *secrets:\n(?: *- .*\n)+", re.MULTILINE)


def _masked_lines(lines: list[str], listed: list[str]) -> Iterator[str]:
    block = secret = None  # the indents of `environment:` and of a secret in it
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if secret is not None and (indent > secret or not line.strip()):
            continue  # a value of several lines
        secret = None
        if block is not None and line.strip() and indent <= block:
            block = None
        key = line.strip().partition(":")[0].strip("'\"")
        if block is not None and (key in listed or is_secret_name(key)):
            secret = indent
            yield f"{line[:indent]}{key}: {MASK}\n"
            continue
        if line.strip() == "environment:":
            block = indent
        yield line


def secrets_in_script(lines: list[str], listed: Collection[str] = ()) -> list[str]:
    """The names of secrets to which lines of bash assign a value, and not a variable or a command's
    output."""
    return [
        match[1]
        for line in lines
        for pattern in ASSIGNMENTS
        for match in pattern.finditer(line)
        if (match[1] in listed or is_secret_name(match[1]))
        and re.search(r"\w", REFERENCE.sub("", match["value"]))
    ]
