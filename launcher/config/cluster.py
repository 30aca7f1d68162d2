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


@dataclass(kw_only=True, slots=True)
class SlurmConfig(ClusterConfig):
    """Ranks on the nodes of a Slurm job, started by one torchrun a node."""

    gpus_per_node: int = setting(0, "GPUs of each node; null ranks are as many", minimum=0)
    gpu_type: str | None = setting(None, "type of those GPUs as the site calls it, such as h100")
    gpu_flag: str = setting(
        "gpus-per-node",
        "how sbatch is asked: --gpus-per-node=h100:8 or --gres=gpu:h100:8",
        choices=("gpus-per-node", "gres"),
    )
    job_name: str = setting("shardway", "name in the queue")
    partition: str | None = setting(None, "--partition")
    account: str | None = setting(None, "--account")
    qos: str | None = setting(None, "--qos")
    time: str | None = setting(None, "limit of one start of the job, as 4:00:00 or 1-12")
    cpus_per_task: int | None = setting(None, "CPUs of a node", minimum=1)
    mem: str | None = setting(None, "memory of a node, as 64G; 0 is all of it")
    constraint: str | None = setting(None, "--constraint")
    reservation: str | None = setting(None, "--reservation")
    exclusive: bool = setting(False, "share nodes with no other job")
    exclude: str | None = setting(None, "nodes that must not be used")
    nodelist: str | None = setting(None, "nodes that must be used")
    dependency: str | None = setting(None, "--dependency, as afterok:123")
    comment: str | None = setting(None, "--comment")
    mail_user: str | None = setting(None, "address for mails")
    mail_type: str | None = setting(None, "when to send them, as END,FAIL")
    extra_flags: list[str] = setting([], "more options of sbatch, as --switches=1")
    signal_seconds: int = setting(
        120, "seconds before the time limit at which Slurm asks to save and stop", minimum=1
    )
    requeue_limit: int = setting(
        100, "times that a job which was stopped with work left goes back into the queue", minimum=0
    )
    array_limit: int | None = setting(
        None, "runs of a sweep (--multirun) that train at once; null: no limit", minimum=1
    )
    setup: list[str] = setting(
        [], "lines of bash before anything else on the first node, as module load cuda"
    )
    environment: dict[str, str] = setting({}, "variables for all ranks, quoted as they are")
    container: list[str] = setting(
        [],
        "words before the ranks' command on every node, as [apptainer,exec,--nv,image.sif]; with "
        "pyxis flags of srun, as ['--container-image=image.sqsh']",
    )
    container_python: str | None = setting(
        None, "the Python with shardway in the container; null: the path of the one outside"
    )


CLUSTERS: dict[str, type[ClusterConfig]] = {"local": ClusterConfig, "slurm": SlurmConfig}
