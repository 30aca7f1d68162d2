"""Schema of `cluster=`: where the ranks run."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.setting import setting


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Ranks on this machine, started by torchrun."""

    name: str = setting("local", "this machine")
    nodes: int = setting(1, "machines", minimum=1)
    nproc_per_node: int | None = setting(
        None, "ranks per machine; null is one for each visible GPU", minimum=1
    )
    cpu_processes: int = setting(1, "what null means where there is no GPU", minimum=1)


CLUSTERS: dict[str, type[ClusterConfig]] = {"local": ClusterConfig}
