"""A sweep (`python train.py -m ...`): a record per job on disk, a line per job on the terminal, a table at the end.

The records lie in `paths.runs/.sweep/<id>/`, where the id is a function of the command, so that the same command again
writes to the same folder, and any process that can see the folder can show the sweep (`python -m experiments.status`).
They are written by the process that runs a job, whichever launcher of Hydra has started it.
"""

import contextlib
import os
import shlex
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from tabulate import tabulate

from conf import devices
from conf.schema import ConfigError
from experiments.engine.artefacts import digest, read_json, remove, write_json
from experiments.engine.locks import describe_this_process, has_ended

RUNNING, WAITING, FINISHED, SKIPPED = "running", "waiting", "finished", "finished before"
FAILED, STOPPED = "failed", "stopped"
"""The states of a job. `waiting`: another process works on the same run; `stopped`: the job was interrupted, or its
process has ended without a word."""
REASON_LENGTH = 200
"""The longest reason of a failure that is shown in full, in characters; the log has all of it."""


SEARCH_RESULTS = "optimization_results.yaml"
"""The file that Optuna's sweeper writes into the folder of a sweep at its end."""

DIRECTIONS = {"lower": "minimize", "higher": "maximize"}
"""{the values of a measure that are better: the `hydra.sweeper.direction` that searches for them}"""

POSTPONED: list[Callable[[], None]] = []
"""What is left to do at the end of this process' sweep: jobs that another process worked on when their turn came."""


class SweepFolder(Callback):
    """Hydra's callback: it makes the folder of the records before the first job, and prints the table at the end."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Write sweep.json, and pass its folder on to the jobs as `hydra.sweep.dir`."""
        overrides = [str(override) for override in config.hydra.overrides.task]
        params = {str(key): str(value) for key, value in (config.hydra.sweeper.get("params") or {}).items()}
        folder = Path(config.hydra.sweep.dir) / digest([sorted(overrides), params])[:8]
        if is_running(folder):  # another process runs the same sweep
            folder = folder.with_name(f"{folder.name}-{socket.gethostname()}-{os.getpid()}")
        for name in ("jobs", SEARCH_RESULTS):
            remove(folder / name)
        content = {
            "command": shlex.join(["python", *sys.argv]),
            "jobs": count_jobs(config.hydra.sweeper, overrides, params),
            "started": time.time(),
            "ended": None,
            "gpus": devices.list_gpus(),
        }
        write_json(folder / "sweep.json", content | describe_this_process())
        number = "" if content["jobs"] is None else f" of {content['jobs']} jobs"
        print(f"sweep{number}; to watch it from another terminal: python -m experiments.status {folder.parents[1]}")
        with read_write(config), open_dict(config):
            config.hydra.sweep.dir = str(folder)
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")  # jobs are composed anew

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Run the jobs that were postponed, and print the table; ends the process with code 1 if a job has failed."""
        while POSTPONED:
            POSTPONED.pop(0)()
        folder = Path(config.hydra.sweep.dir)
        write_json(folder / "sweep.json", read_json(folder / "sweep.json") | {"ended": time.time()})
        sweep = read_sweep(folder)
        print(f"\n{format_sweep(sweep)}")
        if any(job["state"] in (FAILED, STOPPED) for job in sweep["records"]):
            sys.exit(1)


class JobRecord:
    """The record of one job of a sweep; of a job that belongs to no sweep it writes nothing.

    Args:
        folder: the sweep's folder; None outside a sweep.
        number: the job's number in the sweep, from 0.
        overrides: what distinguishes the job: the overrides of its command line.
        options: the other arguments of its command line, such as --config-dir.
    """

    def __init__(
        self, folder: Path | None = None, number: int = 0, overrides: Sequence[str] = (), options: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.path = folder / "jobs" / f"{number:04}.json" if folder else None
        self.content: dict[str, Any] = {
            "number": number,
            "overrides": list(overrides),
            "options": list(options),
            "state": RUNNING,
            "run": None,
            "started": time.time(),
            **describe_this_process(),
        }

    @property
    def in_sweep(self) -> bool:
        """Whether the job belongs to a sweep."""
        return self.path is not None

    def is_sweeps_process(self) -> bool:
        """Tell whether this process runs the sweep itself; launchers start others for its jobs."""
        if self.folder is None:
            return False
        sweep, this = read_json(self.folder / "sweep.json"), describe_this_process()
        return all(sweep.get(key) == value for key, value in this.items())

    def update(self, **fields: Any) -> None:
        """Change fields of the record, on disk as well."""
        self.content |= fields
        if self.path is not None:
            write_json(self.path, self.content)

    def finish(self, measure: float | None) -> float | None:
        """Record the end of a job without an error, and return its first measure."""
        state = SKIPPED if self.content["state"] == SKIPPED else FINISHED
        self.update(state=state, measure=measure, seconds=time.time() - self.content["started"])
        return measure

    def fail(self, error: BaseException, state: str = FAILED) -> None:
        """Record the end of a job by an error; the traceback is in the run's log, or where there is none beside."""
        run = self.content["run"]
        if run and not Path(run).exists():  # a refused configuration leaves no folder
            run = None
        path = Path(run) / "run.log" if run else None
        if self.path is not None and (path is None or not path.exists()):
            path = self.path.with_suffix(".log")
            path.write_text("".join(traceback.format_exception(error)))
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        seconds = time.time() - self.content["started"]
        self.update(state=state, run=run, reason=reason, log=str(path), seconds=seconds)

    @contextlib.contextmanager
    def follow(self, raises: bool = False) -> Iterator[None]:
        """Print the beginning and the end of a job of a sweep that runs inside; an error ends this job only.

        The reason of an error is printed at once, and once more in the table at the end of the sweep. Outside a sweep
        this does nothing.

        Args:
            raises: raise the error once it is recorded, so that this process ends with an exit code other than 0.
        """
        if self.folder is None:
            yield
            return
        self.update()
        position = format_position(self.content["number"], read_json(self.folder / "sweep.json")["jobs"])
        print(f"\n{position} {shlex.join(self.content['overrides'])}", flush=True)
        try:
            yield
        except Exception as error:
            self.fail(error)
            print(f"{position} failed: {shorten(self.content['reason'])}\n  log: {self.content['log']}", flush=True)
            if raises:
                raise
        except BaseException as error:
            self.fail(error, STOPPED)
            raise
        else:
            progress = format_progress(read_sweep(self.folder))
            print(f"{position} {self.content['state']}: {self.content['run']}; {progress}", flush=True)


def open_record() -> JobRecord:
    """Return the record of the job that Hydra runs in this process; it writes nothing unless that is one of a sweep.

    Only rank 0 of a job may open it.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return JobRecord()
    hydra = HydraConfig.get()
    sources = hydra.runtime.config_sources
    folders = dict.fromkeys(source.path for source in sources if source.provider == "command-line")
    options = [word for path in folders for word in ("--config-dir", path)]
    overrides = [str(override) for override in hydra.overrides.task]
    return JobRecord(Path(hydra.sweep.dir), int(hydra.job.num), overrides, options)


def shares_process() -> bool:
    """Tell whether this process runs jobs of a sweep one after another, as some launchers have it."""
    if not open_record().in_sweep:
        return False
    return HydraConfig.get().launcher._target_.endswith(("BasicLauncher", "JoblibLauncher"))


def check_search_direction(metrics: DictConfig) -> None:
    """Raise ConfigError if this job belongs to a search in the wrong direction for its first measure.

    `metrics` are those of the evaluation; without any, a job returns its output loss. Sweepers without a `direction`
    and measures whose class does not state which values are `better` are not checked.
    """
    if not open_record().in_sweep or "direction" not in (sweeper := HydraConfig.get().sweeper):
        return
    name, node = next(((str(key), value) for key, value in metrics.items()), ("output_loss", None))
    better = "lower" if node is None else getattr(get_object(node._target_), "better", None)
    directions = sweeper.direction if isinstance(sweeper.direction, ListConfig) else [sweeper.direction]
    directions = [str(getattr(direction, "name", direction)) for direction in directions]  # Optuna's default is an enum
    if better is not None and directions != [DIRECTIONS[better]]:
        raise ConfigError(
            f"hydra.sweeper.direction={','.join(directions)}: a job returns its first measure, {name}, of which "
            f"{better} values are better; choose hydra.sweeper.direction={DIRECTIONS[better]}"
        )


def count_jobs(sweeper: DictConfig, overrides: list[str], params: dict[str, str]) -> int | None:
    """Return the number of jobs of a sweep; None where the sweeper decides as it goes.

    Args:
        sweeper: the configuration of Hydra's sweeper; Optuna's has a number of trials.
        overrides: those of the command line.
        params: those of the sweeper's configuration.
    """
    if "n_trials" in sweeper:
        return int(sweeper.n_trials)
    try:
        parsed = OverridesParser.create().parse_overrides(
            [*(f"{key}={value}" for key, value in params.items()), *overrides]
        )
        return sum(map(len, BasicSweeper.split_arguments(parsed, None)))
    except Exception:  # intervals and distributions are for sweepers that search
        return None


def read_sweep(folder: Path) -> dict[str, Any]:
    """Return the content of sweep.json with the folder, and the "records" of its jobs in their order.

    "best" is what Optuna found: {"best_params": {key: value}, "best_value": measure}; None without such a search.
    """
    records = [read_json(path) for path in sorted((folder / "jobs").glob("*.json"))]
    for record in records:
        if record["state"] in (RUNNING, WAITING) and has_ended(record):
            record |= {"state": STOPPED, "reason": f"process {record['pid']} has ended without a word"}
    results = folder / SEARCH_RESULTS
    best = OmegaConf.to_container(OmegaConf.load(results)) if results.exists() else None
    return {**read_json(folder / "sweep.json"), "folder": str(folder), "records": records, "best": best}


def is_running(folder: Path) -> bool:
    """Return whether a process works on the sweep of a folder; of another machine: unless the sweep has ended."""
    if not (folder / "sweep.json").exists():
        return False
    sweep = read_json(folder / "sweep.json")
    return sweep["ended"] is None and not has_ended(sweep)


def format_sweep(sweep: dict[str, Any]) -> str:
    """Return a sweep as text: a row per job, and for each job that failed its reason, its log and its command."""
    records = sweep["records"]
    rows = [
        {
            "job": record["number"] + 1,
            "overrides": " ".join(own),
            "state": record["state"],
            "time": format_seconds(record.get("seconds", time.time() - record["started"])),
            "measure": "" if record.get("measure") is None else f"{record['measure']:.4g}",
            "run": record["run"] or "",
        }
        for record, own in zip(records, varied_overrides(records), strict=True)
    ]
    parts = [sweep["command"], tabulate(rows, headers="keys", disable_numparse=True), format_progress(sweep)]
    if sweep["best"] is not None:
        overrides = [f"{key}={value}" for key, value in sweep["best"]["best_params"].items()]
        parts.append(f"best measure: {sweep['best']['best_value']:.4g} with {shlex.join(overrides)}")
    for record in records:
        if record["state"] in (FAILED, STOPPED):
            parts.append(
                f"job {record['number'] + 1} {record['state']}: {shorten(record.get('reason', ''))}\n"
                f"  log:   {record.get('log', '-')}\n"
                f"  again: python {compose_job_command(record)}"
            )
    return "\n\n".join(parts)


def compose_job_command(record: dict[str, Any]) -> str:
    """Return the arguments after `python` that run a job of a sweep alone, given its record."""
    words = ["train.py", *record["options"], *record["overrides"]]
    if any(word.startswith("sweep=") for word in words):  # a file of sweep/ asks for a sweep
        words.append("hydra.mode=RUN")
    return shlex.join(words)


def varied_overrides(records: list[dict[str, Any]]) -> list[list[str]]:
    """Return for each job the overrides that not all jobs share."""
    shared = set.intersection(*(set(record["overrides"]) for record in records)) if len(records) > 1 else set()
    return [[override for override in record["overrides"] if override not in shared] for record in records]


def format_progress(sweep: dict[str, Any]) -> str:
    """Return how many jobs are in each state, of how many, and about how long those that are left will take."""
    records = sweep["records"]
    states = (FINISHED, SKIPPED, RUNNING, WAITING, FAILED, STOPPED)
    counts = {state: sum(record["state"] == state for record in records) for state in states}
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    total = sweep["jobs"]
    if total is None:
        return text
    ended = [record for record in records if record["state"] in (FINISHED, FAILED)]
    left = total - len(records) + counts[RUNNING] + counts[WAITING]
    text = f"{text} of {total}"
    if ended and left:
        elapsed = max(record["started"] + record["seconds"] for record in ended) - min(r["started"] for r in ended)
        text += f", about {format_seconds(elapsed / len(ended) * left)} left"
    return text


def format_position(number: int, total: int | None) -> str:
    """Return "[3/9]" for job number 2 of 9, or "[3]" where the number of jobs is not known."""
    return f"[{number + 1}{'' if total is None else f'/{total}'}]"


def format_seconds(seconds: float) -> str:
    """Return a duration such as "0.3 s", "42 s", "3 min 5 s" or "2 h 10 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def shorten(reason: str) -> str:
    """Return a reason in one line of bounded length."""
    return reason if len(reason) <= REASON_LENGTH else f"{reason[: REASON_LENGTH - 3]}..."
