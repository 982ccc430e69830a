"""Which launcher started a process, and which sizes of its world are refused before anything is written."""

import pytest

from lightning_idkd.config import RunConfig
from lightning_idkd.errors import UserError
from lightning_idkd.training import launchers
from lightning_idkd.training.launchers import BY_HAND, MPI, OPEN_MPI, SRUN, TORCHRUN, check_launcher, find_launcher

STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "1"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2"}
HAND = {"MASTER_ADDR": "h1", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        ({}, None),
        (ELASTIC, TORCHRUN),
        (ELASTIC | STEP, TORCHRUN),  # torchrun in a step of SLURM
        (STEP, SRUN),
        (STEP | {"PMI_SIZE": "2"}, SRUN),  # srun --mpi=pmi2
        (STEP | {"OMPI_COMM_WORLD_SIZE": "4"}, OPEN_MPI),  # whose daemons are a step of SLURM
        ({"PMI_SIZE": "2"}, MPI),
        ({"WORLD_SIZE": "2"}, BY_HAND),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "x"}, None),  # a script of sbatch, without srun
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PTY_PORT": "1"}, None),  # a shell by srun --pty
        (STEP | {"SLURM_PTY_PORT": "1"}, SRUN),  # srun from such a shell
    ],
)
def test_the_launcher_is_seen_by_its_variables(env, launcher):
    assert find_launcher(env) is launcher


@pytest.mark.parametrize(
    ("env", "hosts", "devices", "says"),
    [
        (STEP, 1, 1, "SLURM_STEP_NUM_TASKS: srun started 2 processes, but run.hosts x run.devices is 1 x 1; allowed: 2 in all, or 1 process"),  # noqa: E501
        (STEP, 1, 2, "SLURM_STEP_NUM_NODES: srun started processes on 2 hosts, but run.hosts x run.devices is 1 x 2"),
        (ELASTIC, 2, 1, "GROUP_WORLD_SIZE: torchrun started processes on 1 host, but run.hosts x run.devices is 2 x 1"),
        (ELASTIC | {"GROUP_WORLD_SIZE": "2"}, 2, 1, "LOCAL_WORLD_SIZE: torchrun started 2 processes on this host"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, 1, 2, "OMPI_COMM_WORLD_SIZE: mpirun started 1 process, but run.hosts x run.devices is 1 x 2; allowed: 1 in all, or 2 processes"),  # noqa: E501
        ({"PMI_SIZE": "3"}, 2, 1, "PMI_SIZE: mpirun started 3 processes"),
        ({"WORLD_SIZE": "4"}, 2, 1, "WORLD_SIZE: a launcher started 4 processes"),
        ({"WORLD_SIZE": "two"}, 2, 1, "WORLD_SIZE: 'two' is no number of processes"),
        ({}, 2, 1, "run.hosts: 2 given, but nothing has started this command on other hosts"),
        ({"NODE_RANK": "0", "MASTER_ADDR": "h1"}, 2, 1, "NODE_RANK, MASTER_ADDR and MASTER_PORT set"),
    ],
)  # fmt: skip
def test_a_world_of_another_size_is_refused(env, hosts, devices, says):
    with pytest.raises(UserError) as error:
        check_launcher(RunConfig(hosts=hosts, devices=devices), env)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("env", "hosts", "devices"),
    [
        ({}, 1, 1),
        ({}, 1, 4),  # this command starts the others itself
        (STEP, 2, 1),
        (ELASTIC, 1, 2),
        (HAND | {"WORLD_SIZE": "4", "RANK": "3"}, 2, 2),
        (HAND | {"NODE_RANK": "1"}, 2, 2),  # a command a host, which starts the other process there
        ({"SLURM_NTASKS": "2", "SLURM_NNODES": "2"}, 1, 1),
    ],
)
def test_a_world_that_fits_is_taken(env, hosts, devices):
    check_launcher(RunConfig(hosts=hosts, devices=devices), env)


@pytest.mark.parametrize(("env", "hosts"), [(STEP, 2), (ELASTIC, 1)])
def test_a_control_needs_a_command_of_its_own_under_a_launcher(env, hosts):
    with pytest.raises(UserError, match=r"run.control: (srun|torchrun) starts the processes of one run only"):
        check_launcher(RunConfig(hosts=hosts, devices=2 // hosts, control=True), env)
    check_launcher(
        RunConfig(devices=2, control=True), {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    )  # started by the run itself


def test_mpirun_needs_its_package(monkeypatch):
    env = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install lightning-idkd\[mpi\]"):
        check_launcher(RunConfig(devices=2), env)
    monkeypatch.setattr(launchers, "find_spec", lambda name: object())
    check_launcher(RunConfig(devices=2), env)


def test_a_first_host_without_an_address_is_told():
    with pytest.raises(UserError, match="MASTER_ADDR: 'no-such-host-1', SLURM's first host, has no address here"):
        launchers.find_first_host({"SLURM_STEP_NODELIST": "no-such-host-[1-4]"})
