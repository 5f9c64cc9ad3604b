"""Launchers and sweepers: each runs a sweep of two tiny jobs that share their scores."""

import os
import re
import stat
import sys
from pathlib import Path

import pytest
from support.process import train
from support.ranks import find_free_port
from support.results import files

import train as entry_point
from conf import devices
from experiments.engine.artefacts import read_json
from experiments.engine.sweep import read_sweep

COUNTED = '''
import os
from criteria.scores.magnitude import Magnitude


class Counted(Magnitude):
    """Magnitude that notes every time it is computed, and by which process."""

    def start(self, backbone, units, seed):
        with open(os.environ["COUNTED"], "a") as file:
            file.write(f"{os.getpid()}\\n")
        super().start(backbone, units, seed)
'''


@pytest.fixture
def sweep(overrides, data_folder, tmp_path, monkeypatch) -> list[str]:
    """Arguments of `train.py` for a sweep of short jobs whose criterion writes a line to tmp_path/counted per use."""
    for name, content in {
        "criterion/counted.yaml": "name: counted\n_target_: counted.Counted\nlevel: depth\n",
        "python/counted.py": COUNTED,
    }.items():
        (data_folder / name).parent.mkdir(exist_ok=True)
        (data_folder / name).write_text(content)
    monkeypatch.syspath_prepend(data_folder / "python")
    monkeypatch.setenv("PYTHONPATH", str(data_folder / "python"))
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))
    job = [*overrides, "criterion=counted", "distillation=none", "pipeline.stages.export=null"]
    return ["-m", "--config-dir", str(data_folder), *job]


def run_here(monkeypatch, *arguments: str) -> None:
    """Run train.py in this process, which has imported everything."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    entry_point.main()


def read_only_sweep(tmp_path: Path) -> dict:
    (folder,) = (path.parent for path in tmp_path.glob("runs/.sweep/*/sweep.json"))
    return read_sweep(folder)


def check_jobs(tmp_path: Path, processes: int) -> None:
    """Check that both jobs are finished, in this number of processes, and that scores were computed once."""
    records = read_only_sweep(tmp_path)["records"]
    assert [record["state"] for record in records] == ["finished"] * 2
    assert len({record["pid"] for record in records}) == processes
    for record in records:
        assert record["measure"] == read_json(Path(record["run"]) / "metrics.json")["eval/output_loss"]
    assert len((tmp_path / "counted").read_text().splitlines()) == 1


@pytest.mark.slow
def test_the_basic_launcher_runs_jobs_in_one_process(sweep, tmp_path, monkeypatch, capsys, quick_end):
    run_here(monkeypatch, *sweep, "launcher=basic", "selection.ratio=0.3,0.5")
    check_jobs(tmp_path, 1)
    out = capsys.readouterr().out
    assert out.startswith(
        f"sweep of 2 jobs; to watch it from another terminal: python -m experiments.status {tmp_path}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm"])
def test_launchers_of_several_processes_share_scores(sweep, tmp_path, launcher, slurm):
    train(*sweep, f"launcher={launcher}", "selection.ratio=0.3,0.5")
    check_jobs(tmp_path, 2)


SBATCH = """#!/bin/bash
# sbatch of a cluster of one machine: starts a job, or those of a job array, in the background.
script="${@: -1}"
jobs=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
export SLURM_NTASKS_PER_NODE=$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "$script")
if [ -z "$jobs" ]; then
    { SLURM_JOB_ID=7 bash "$script"; touch "$(dirname "$0")/ended_7"; } > /dev/null 2>&1 &
fi
for job in $(test -z "$jobs" || seq 0 "$jobs"); do
    {
        SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$job SLURM_JOB_ID=$((7 + job)) bash "$script"
        touch "$(dirname "$0")/ended_7_$job"
    } > /dev/null 2>&1 &
done
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/bash
# srun without its options: the command once per task, with the variables of that task; all end where one has failed.
while [[ $1 == -* ]]; do
    case $1 in --output|--error|-o|-e) shift 2;; *) shift;; esac
done
export SLURM_NTASKS=$SLURM_NTASKS_PER_NODE SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=$(hostname)
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
done
for task in $(seq "$SLURM_NTASKS"); do
    wait -n || [[ $SLURM_KILL_BAD_EXIT != 1 ]] || { kill -9 $(jobs -p); exit 1; }
done
"""
SACCT = """#!/bin/bash
# sacct: a line for each job that there may be.
echo "JobID|State"
for job in 7 7_0 7_1; do
    if [ -e "$(dirname "$0")/ended_$job" ]; then echo "$job|COMPLETED"; else echo "$job|RUNNING"; fi
done
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> None:
    """Put commands named as those of Slurm into PATH, which start tasks on this machine."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, content in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (folder / name).write_text(content)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


REFUSE = """#!/bin/bash
# sbatch of a cluster that keeps the script and refuses the job.
cp "${@: -1}" "$(dirname "$0")/script"
echo "refused" >&2
exit 1
"""


NAMED = '''
from pathlib import Path
from pytorch_lightning.callbacks import Callback


class Named(Callback):
    """Leaves a file beside this one with the name of its rank; one of them may fail."""

    def __init__(self, failing=None):
        self.failing = failing

    def on_train_start(self, trainer, module):
        if trainer.global_rank == self.failing:
            raise ValueError("this rank fails")
        environment = type(trainer.strategy.cluster_environment).__name__
        name = f"rank {trainer.global_rank} of {trainer.world_size} in {environment}"
        Path(__file__).with_name(name).touch()
'''


@pytest.fixture
def training_of_tasks(sweep, slurm, tmp_path, monkeypatch) -> list[str]:
    """Arguments of `train.py` for a Slurm job of two tasks that train together."""
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "named.py").write_text(NAMED)
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}{os.pathsep}{tmp_path / 'named'}")
    monkeypatch.setenv("MASTER_PORT", str(find_free_port()))
    trained = [override for override in sweep if override not in ("distillation=none", "trainer=cpu")]
    devices = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "+callbacks.named._target_=named.Named"]
    return [*trained, "launcher=submitit_slurm", *devices]


@pytest.mark.slow
def test_the_tasks_of_a_slurm_job_are_the_ranks_of_one_training(training_of_tasks, tmp_path):
    train(*training_of_tasks, timeout=600)
    (record,) = read_only_sweep(tmp_path)["records"]
    assert record["state"] == "finished"
    assert "networks/distilled/config.json" in files(Path(record["run"]))
    assert files(tmp_path / "named") >= {f"rank {rank} of 2 in SLURMEnvironment" for rank in range(2)}


@pytest.mark.slow
def test_a_slurm_job_ends_where_one_of_its_tasks_fails(training_of_tasks, tmp_path):
    process = train(*training_of_tasks, "+callbacks.named.failing=0", check=False, timeout=600)
    assert process.returncode == 1 and "ValueError: this rank fails" in process.stderr
    (record,) = read_only_sweep(tmp_path)["records"]
    assert (record["state"], record["reason"]) == ("failed", "ValueError: this rank fails")


@pytest.mark.parametrize(("machines", "gpus"), [(1, 1), (2, 4)])
def test_a_slurm_job_has_a_task_for_each_gpu_of_each_machine(sweep, slurm, tmp_path, monkeypatch, machines, gpus):
    (tmp_path / "slurm" / "sbatch").write_text(REFUSE)
    devices = ["trainer=fsdp", f"trainer.devices={gpus}", f"trainer.num_nodes={machines}"]
    with pytest.raises(SystemExit):
        run_here(monkeypatch, *sweep, "launcher=submitit_slurm", *devices, "hydra.launcher.partition=long")
    lines = (tmp_path / "slurm" / "script").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines if line.startswith("#SBATCH"))
    expected = {"nodes": machines, "ntasks-per-node": gpus, "gpus-per-node": gpus, "cpus-per-task": 8}
    expected |= {"mem-per-cpu": "8GB", "partition": "long", "time": 1440, "open-mode": "append"}
    assert {name: options[name] for name in expected} == {name: str(value) for name, value in expected.items()}
    assert "mem" not in options
    (command,) = (line for line in lines if line.startswith("srun"))
    assert f"{sys.executable} -u -m submitit.core._submit {tmp_path}/runs/.sweep/" in command


SEARCH = ["hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=0", "optimizer.lr=1e-4"]


@pytest.mark.parametrize("search", ["optuna_latency", "random_search"])
@pytest.mark.slow
def test_a_search_runs_trials_and_shows_the_best(sweep, tmp_path, monkeypatch, capsys, quick_end, search):
    chosen = ["selection.ratio=interval(0.3,0.5)", "selection.budget=params", "hydra.sweeper.params=null"]
    run_here(monkeypatch, *sweep, f"sweep={search}", *SEARCH, *chosen)
    check_jobs(tmp_path, 1)
    swept = read_only_sweep(tmp_path)
    measures = {record["measure"]: record["overrides"] for record in swept["records"]}
    assert (swept["jobs"], swept["best"]["best_value"]) == (2, min(measures))
    ratio = f"selection.ratio={swept['best']['best_params']['selection.ratio']}"
    assert ratio in measures[min(measures)]
    assert f"best measure: {min(measures):.4g} with {ratio}" in capsys.readouterr().out
    # The same command asks for the same trials, and runs none.
    run_here(monkeypatch, *sweep, f"sweep={search}", *SEARCH, *chosen)
    assert [record["state"] for record in read_only_sweep(tmp_path)["records"]] == ["finished before"] * 2


@pytest.mark.slow
def test_a_failed_trial_does_not_end_a_search(sweep, tmp_path, monkeypatch, capsys, quick_end):
    chosen = ["selection.ratio=choice(0.5,0.9999)", "hydra.sweeper.n_trials=4", "hydra.sweeper.params=null"]
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, *sweep, "sweep=random_search", *chosen)
    assert end.value.code == 1
    swept = read_only_sweep(tmp_path)
    assert {record["state"] for record in swept["records"]} == {"finished", "failed"}
    assert swept["best"]["best_params"] == {"selection.ratio": 0.5}
    commands = re.findall("  again: (.*)", capsys.readouterr().out)
    assert commands and all(command.endswith(" sweep=random_search hydra.mode=RUN") for command in commands)
    assert all(command.count("--config-dir") == 1 for command in commands)


# Devices


@pytest.mark.parametrize(
    ("visible", "count", "chosen"),
    [
        ("0,1,2", 1, ["0", "1", "2", "0"]),
        ("4, 5, 6, 7", 2, ["4,5", "6,7", "4,5"]),
        ("GPU-a,GPU-b,-1", 1, ["GPU-a", "GPU-b", "GPU-a"]),
        ("3", 1, ["3", "3"]),
        ("", 1, ["", ""]),
    ],
)
def test_each_process_of_a_sweep_claims_gpus_of_its_own(tmp_path, monkeypatch, visible, count, chosen):
    locks = []
    for expected in chosen:  # what processes that run at the same time do
        monkeypatch.setattr(devices, "_slots", [])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        for _ in range(2):  # two jobs of one process
            devices.claim_gpus(tmp_path, devices.list_gpus(), count)
            assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
        locks += devices._slots
    for lock in locks:
        lock.release()


@pytest.mark.parametrize(("visible", "devices_per_job", "slots"), [("0,1,2,3", 1, 4), ("0,1,2", 2, 1), ("", 1, 2)])
def test_as_many_jobs_run_at_once_as_gpus_are_enough_for(monkeypatch, visible, devices_per_job, slots):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.count_job_slots(devices_per_job) == slots
