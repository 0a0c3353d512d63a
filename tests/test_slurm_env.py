"""What Slurm's variables are read as."""

import pytest

from disttrain import slurm_env
from disttrain.errors import UsageError
from disttrain.parallel import usable_cores

# What `env | grep SLURM` shows in the second of two tasks, one on each of two nodes.
TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
# The shell that salloc opens on the first of two nodes: SLURM_NTASKS and SLURM_NNODES are the job's.
INTERACTIVE = TASK | {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "gpu03",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
}


def test_the_place_of_a_node():
    node = slurm_env.node(TASK)
    assert node is not None
    assert node[:3] == (2, 1, "gpu03")
    assert slurm_env.node(TASK | {"SLURM_NODEID": "0", "SLURM_PROCID": "0"}) == node._replace(node_rank=0)


@pytest.mark.parametrize("environ", [{}, BATCH_SCRIPT, {"SLURM_STEP_ID": "0"}])
def test_no_node_outside_of_a_step(environ):
    assert slurm_env.node(environ) is None


def test_an_interactive_shell_is_a_single_node():
    node = slurm_env.node(INTERACTIVE)
    assert node is not None
    assert (node.nodes, node.node_rank) == (1, 0)


def test_several_tasks_on_a_node_are_refused():
    with pytest.raises(
        UsageError, match=r"started 8 tasks on 2 nodes.*--ntasks-per-node=1.*disttrain\.worker.*--nodes 1"
    ):
        slurm_env.node(TASK | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[01-03,7]", "n01"),
        ("n[7,9-11]", "n7"),
        ("gpu[03-05]-ib,login1", "gpu03-ib"),
        ("login1,gpu[03-05]", "login1"),
        ("gpu-a[001-128]", "gpu-a001"),
        ("rack1-node[3,5],rack2-node[1-2]", "rack1-node3"),
        ("rack[2-3]node[07,9-12]-ib,login1", "rack2node07-ib"),
        ("gpu07.cluster.example.org,gpu[08-09]", "gpu07.cluster.example.org"),
    ],
)
def test_the_first_host_of_a_list(hosts, first):
    node = slurm_env.node(TASK | {"SLURM_STEP_NODELIST": hosts})
    assert node is not None
    assert node.master_addr == first


def test_the_step_names_the_hosts_rather_than_the_job():
    node = slurm_env.node(TASK | {"SLURM_JOB_NODELIST": "gpu[01-04]"})
    assert node is not None
    assert node.master_addr == "gpu03"


def test_a_task_gets_the_variables_of_torch():
    node = slurm_env.node(TASK)
    assert node is not None
    assert slurm_env.task_environment(TASK) == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(node.master_port),
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"SLURM_CPUS_PER_TASK": "6"}, "6"),
        ({"SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": "2"}, "2"),
        ({"SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": ""}, "6"),
    ],
)
def test_the_threads_of_a_task(variables, threads):
    assert slurm_env.task_environment(TASK | variables)["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("counts", "node_rank", "local_size"),
    [
        ("4", 0, 4),
        ("4(x2)", 1, 4),
        ("2(x3),1", 0, 2),
        ("2(x3),1", 2, 2),
        ("2(x3),1", 3, 1),
        ("1,4(x2)", 2, 4),
    ],
)
def test_tasks_per_node(counts, node_rank, local_size):
    task = TASK | {"SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_NODEID": str(node_rank)}
    assert slurm_env.task_environment(task)["LOCAL_WORLD_SIZE"] == str(local_size)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH_SCRIPT,
        INTERACTIVE,
        TASK | {"RANK": "0"},
        TASK | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=["outside", "batch script", "interactive", "under torchrun", "a single task"],
)
def test_no_variables_where_there_is_no_group_of_tasks(environ):
    assert slurm_env.task_environment(environ) == {}


def test_an_address_of_the_user_is_kept():
    variables = slurm_env.task_environment(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_ports_of_neighbouring_jobs_and_steps_differ():
    steps = [("4711", "0"), ("4711", "1"), ("4711", "7"), ("4712", "0"), ("4713", "2")]
    nodes = [slurm_env.node(TASK | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}) for job, step in steps]
    assert len({node.master_port for node in nodes if node}) == len(steps)


@pytest.mark.parametrize("job", ["1", "4711", "99999999", "4294967295"])
@pytest.mark.parametrize("step", ["0", "3999", "4294967290"])
def test_ports_are_below_those_that_the_kernel_hands_out(job, step):
    node = slurm_env.node(TASK | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
    assert node is not None
    assert 1024 < node.master_port < 32768


def test_the_cores_of_a_task(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    cores = usable_cores()
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert usable_cores() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(cores + 1))
    assert usable_cores() == cores, "where Slurm counts more than there are"
