"""Schema of `cluster=`: where the ranks run."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.setting import setting


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Ranks on this machine, started by torchrun."""

    name: str = setting("local", "name of the cluster configuration")
    nodes: int = setting(1, "number of machines", minimum=1)
    nproc_per_node: int | None = setting(
        None, "ranks per machine; null: one for each visible GPU", minimum=1
    )
    cpu_processes: int = setting(
        1, "ranks per machine if nproc_per_node is null and there is no GPU", minimum=1
    )
    numa_binding: str = setting(
        "auto",
        "run each rank on the CPUs next to its GPU: none, or a mode of torchrun's --numa-binding; "
        "auto: node, if the machine has GPUs, several nodes of memory and the program numactl",
        choices=("auto", "none", "node", "socket", "exclusive", "core-complex"),
    )
    max_restarts: int = setting(
        0,
        "how often a run that fails is started again in the same folder, from its newest whole "
        "checkpoint",
        minimum=0,
        maximum=10**6,
    )
    hang_seconds: str = setting(
        "auto",
        "end a run in which no rank has moved for so long, and name the rank to blame; auto: ten "
        "times the slowest step, at least 120; 0: never",
    )
    interface: str = setting(
        "auto",
        "network interface of the ranks on every machine, such as eth0; auto: the one that reaches "
        "rank 0's machine, or what GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name",
    )
    preflight: bool = setting(
        False,
        "compare the machines before anything is loaded: versions, files, clocks, GPUs, network, "
        "arithmetic; a bad one is named, and the run ends with status 69",
    )


@dataclass(kw_only=True, slots=True)
class SlurmConfig(ClusterConfig):
    """Ranks on the nodes of a Slurm job, started by one torchrun per node."""

    gpus_per_node: int = setting(
        0, "GPUs per node, which is also the number of ranks if nproc_per_node is null", minimum=0
    )
    gpu_type: str | None = setting(None, "GPU type as the site names it, such as h100")
    gpu_flag: str = setting(
        "gpus-per-node",
        "how GPUs are requested: --gpus-per-node=h100:8 or --gres=gpu:h100:8",
        choices=("gpus-per-node", "gres"),
    )
    job_name: str = setting("shardway", "name of the job in the queue")
    partition: str | None = setting(None, "--partition")
    account: str | None = setting(None, "--account")
    qos: str | None = setting(None, "--qos")
    time: str | None = setting(None, "time limit of each start of the job, such as 4:00:00 or 1-12")
    cpus_per_task: int | None = setting(None, "CPUs per node", minimum=1)
    mem: str | None = setting(None, "memory per node, such as 64G; 0: all memory of the node")
    mem_per_cpu: str | None = setting(None, "memory per CPU instead, such as 4G")
    mem_per_gpu: str | None = setting(None, "memory per GPU instead, such as 100G")
    constraint: str | None = setting(None, "--constraint")
    reservation: str | None = setting(None, "--reservation")
    exclusive: bool = setting(False, "do not share the nodes with other jobs")
    exclude: str | None = setting(None, "nodes that must not be used")
    nodelist: str | None = setting(None, "nodes that must be used")
    dependency: str | None = setting(None, "--dependency, such as afterok:123")
    comment: str | None = setting(None, "--comment")
    mail_user: str | None = setting(None, "address for email notifications")
    mail_type: str | None = setting(None, "when to send them, such as END,FAIL")
    extra_flags: list[str] = setting([], "more options for sbatch, such as --switches=1")
    signal_seconds: int = setting(
        120, "seconds before the time limit at which Slurm asks the job to save and stop", minimum=1
    )
    requeue_limit: int = setting(
        100, "how often a job that stopped before the end of its training is requeued", minimum=0
    )
    requeue_hung: bool = setting(
        False, "also requeue a job that has hung (cluster.hang_seconds), from its last checkpoint"
    )
    array_limit: int | None = setting(
        None, "runs of a sweep (--multirun) that train at the same time; null: no limit", minimum=1
    )
    setup: list[str] = setting(
        [], "bash lines that run first, on the first node, such as module load cuda"
    )
    environment: dict[str, str] = setting(
        {}, "environment variables for all ranks; values are not expanded"
    )
    secrets: list[str] = setting(
        [],
        "names of environment variables that are passed to the job and whose values are never "
        "written, such as [HF_TOKEN]",
    )
    container: list[str] = setting(
        [],
        "words before the ranks' command on every node, such as [apptainer,exec,--nv,image.sif]; "
        "with pyxis, options of srun, such as ['--container-image=image.sqsh']",
    )
    container_python: str | None = setting(
        None, "Python with shardway inside the container; null: the same path as outside"
    )


CLUSTERS: dict[str, type[ClusterConfig]] = {"local": ClusterConfig, "slurm": SlurmConfig}


def hang_seconds(cluster: ClusterConfig) -> float | None:
    """The seconds of `cluster.hang_seconds`: None for auto. Raises ValueError for another word or a
    number that is negative."""
    if cluster.hang_seconds == "auto":
        return None
    seconds = float(cluster.hang_seconds)
    if not 0 <= seconds < float("inf"):
        raise ValueError(cluster.hang_seconds)
    return seconds
