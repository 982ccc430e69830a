"""Finds which program started this process, and as one of how many: torchrun, srun, mpirun, or a user by hand."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment

    from lightning_idkd.config import RunConfig


RANKS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
"""The variables that Fabric sets for the processes that it starts."""


class Launcher(NamedTuple):
    """What a launcher says of the processes that it started, by the environment variables that it sets."""

    name: str
    size: str
    """The variable that holds the number of all processes."""
    hosts: str = ""
    """The variable that holds the number of hosts, if there is one."""
    local: str = ""
    """The variable that holds the number of processes on this host, if there is one."""


TORCHRUN = Launcher("torchrun", "WORLD_SIZE", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE")
OPEN_MPI = Launcher("mpirun", "OMPI_COMM_WORLD_SIZE", local="OMPI_COMM_WORLD_LOCAL_SIZE")
SRUN = Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")
MPI = Launcher("mpirun", "PMI_SIZE", local="MPI_LOCALNRANKS")
BY_HAND = Launcher("a launcher", "WORLD_SIZE")


def find_launcher(env: Mapping[str, str]) -> Launcher | None:
    """The launcher that set the variables ``env``; None if none did, as in a shell or in a script of sbatch."""
    if "TORCHELASTIC_RUN_ID" in env:
        return TORCHRUN
    if OPEN_MPI.size in env:  # before srun, which starts the daemons of mpirun
        return OPEN_MPI
    shell = env.get(SRUN.size) == "1" and "SLURM_PTY_PORT" in env  # in which a user starts programs, without srun
    if SRUN.size in env and not shell:
        return SRUN
    if MPI.size in env:
        return MPI
    return BY_HAND if BY_HAND.size in env else None


def check_launcher(run: RunConfig, env: Mapping[str, str] = os.environ) -> None:
    """Refuse a launcher that started other numbers of processes than ``run`` asks for, or cannot start several.

    Raises:
        UserError: the message names the variable, its value and what would fit.
    """
    launcher, world = find_launcher(env), run.hosts * run.devices
    if launcher is None:
        if run.hosts > 1 and not {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(env):
            raise UserError(
                f"run.hosts: {run.hosts} given, but nothing has started this command on other hosts; start it by "
                "torchrun, srun or mpirun, or on every host with NODE_RANK, MASTER_ADDR and MASTER_PORT set"
            )
        return
    size = read_number(launcher.size, env)
    product = f"run.hosts x run.devices is {run.hosts} x {run.devices}"
    if size != world:
        raise UserError(
            f"{launcher.size}: {launcher.name} started {size} process{'es' * (size != 1)}, but {product}; allowed: "
            f"{size} in all, or {world} process{'es' * (world != 1)}"
        )
    if launcher.hosts in env and (hosts := read_number(launcher.hosts, env)) != run.hosts:
        raise UserError(
            f"{launcher.hosts}: {launcher.name} started processes on {hosts} host{'s' * (hosts != 1)}, but {product}"
        )
    if launcher.local in env and (local := read_number(launcher.local, env)) != run.devices:
        raise UserError(f"{launcher.local}: {launcher.name} started {local} processes on this host, but {product}")
    if run.control and world > 1 and (run.hosts > 1 or launcher is not BY_HAND):
        raise UserError(
            f"run.control: {launcher.name} starts the processes of one run only; train the control by a command of its "
            "own: --distillation null --run.from CHECKPOINT"
        )
    if launcher.name == "mpirun" and world > 1 and find_spec("mpi4py") is None:
        raise UserError(
            "mpirun: several processes need mpi4py, which is not installed: pip install lightning-idkd[mpi]"
        )


def read_number(variable: str, env: Mapping[str, str]) -> int:
    """The number in an environment variable."""
    if not env[variable].isdecimal():
        raise UserError(f"{variable}: '{env[variable]}' is no number of processes; unset it, or let a launcher set it")
    return int(env[variable])


def choose_environment(run: RunConfig) -> ClusterEnvironment:
    """Fabric's environment of the launcher; it numbers the processes and, where no launcher did, starts them."""
    from lightning.fabric.plugins import environments

    env, launcher = os.environ, find_launcher(os.environ)
    if launcher is TORCHRUN:
        return environments.TorchElasticEnvironment()
    if run.hosts * run.devices > 1 and launcher is SRUN:
        env["SLURM_NTASKS"], env["SLURM_NNODES"] = env[SRUN.size], env[SRUN.hosts]  # of this step, not of the job
        env["SLURM_NTASKS_PER_NODE"] = str(run.devices)  # without it, Fabric refuses `srun --ntasks`
        env["MASTER_ADDR"] = env.get("MASTER_ADDR") or find_first_host(env)
        return environments.SLURMEnvironment(auto_requeue=False)
    if run.hosts * run.devices > 1 and launcher in (OPEN_MPI, MPI):
        environment = environments.MPIEnvironment()
        env.setdefault("MASTER_ADDR", environment.main_address)  # torch's store is found by these
        env.setdefault("MASTER_PORT", str(environment.main_port))
        return environment
    if launcher is BY_HAND and "RANK" in env:  # torch's variables, of which Fabric reads none but LOCAL_RANK
        host, local = divmod(read_number("RANK", env), run.devices)
        env.setdefault("NODE_RANK", str(host))
        env.setdefault("LOCAL_RANK", str(local))
    return environments.LightningEnvironment()


def find_first_host(env: Mapping[str, str]) -> str:
    """The address of the first host of a step of SLURM."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    host = SLURMEnvironment.resolve_root_node_address(env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    try:
        socket.gethostbyname(host)
    except OSError as e:
        raise UserError(f"MASTER_ADDR: '{host}', SLURM's first host, has no address here; set it to one") from e
    return host


def without_ranks(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables ``env`` for a new run, without those that number the processes of this one."""
    return {name: value for name, value in env.items() if name not in RANKS}


def name_host(env: Mapping[str, str] = os.environ) -> str:
    """The name of this host, for messages."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()
