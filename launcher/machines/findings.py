"""What is found to be wrong before a run, and the error that ends it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from launcher.config.overrides import quote
from launcher.errors import BadNode, UserError

OK, WARNING, REFUSED = "ok", "warning", "refused"


@dataclass(frozen=True)
class Finding:
    """One fact that is not as it should be."""

    status: str  # WARNING or REFUSED
    text: str
    nodes: tuple[
        str, ...
    ] = ()  # machines without which the run may start; (): the request is wrong

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Finding:
        """What `dataclasses.asdict`, and then JSON, have made of one."""
        return cls(values["status"], values["text"], tuple(values["nodes"]))


def raise_refused(findings: Iterable[Finding], machines: int, excluded: str | None) -> None:
    """Raise UserError if a finding refuses the run: BadNode, with the option that leaves them out,
    if only single nodes of `machines` are at fault. `excluded`: cluster.exclude so far."""
    refused = [each for each in findings if each.status == REFUSED]
    if not refused:
        return
    text = "\n".join(dict.fromkeys(each.text for each in refused))
    nodes = list(dict.fromkeys(node for each in refused for node in each.nodes))
    if not all(each.nodes for each in refused):
        raise UserError(text)
    if len(nodes) >= machines:
        raise BadNode(text)
    left_out = ",".join([*([excluded] if excluded else []), *nodes])
    raise BadNode(f"{text}\n→ --exclude={left_out} (cluster.exclude={quote(left_out)})")
