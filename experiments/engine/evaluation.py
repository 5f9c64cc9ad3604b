"""The evaluation stage: one protocol for teacher, pruned and distilled network, whatever their family."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.engine.cache import cached
from experiments.engine.identity import RESULT_VERSION, effective
from experiments.engine.inputs import held_out
from experiments.engine.job import TEACHER, Job
from experiments.engine.measures import (
    build_measures,
    check_network_measures,
    finite,
    of_networks,
    of_samples,
    taken_of_network,
)
from experiments.engine.samples import Drawn
from experiments.engine.texts import Texts
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.metrics.cost import device_name, latencies
from lightning_modules.metrics.protocol import NetworkMeasure
from lightning_modules.modules.joint_loss import JointLoss
from lightning_modules.training.trainer import autocast, make_trainer, precision_of


class Evaluator:
    """Measures networks against the teacher and the data, as `cfg.evaluation` says.

    Raises ValueError for measures that cannot be taken of the teacher's networks, or on texts that it was calibrated
    on (`calibration`: the data modules of calibration samples, where they are others than the job's data).
    """

    def __init__(self, job: Job, calibration: Sequence[Any] = ()) -> None:
        self.job, self.cfg, self.teacher = job, job.cfg, job.teacher
        self.measures = build_measures(self.cfg)
        self.drawn: Drawn | None = None
        if measures := of_samples(self.measures):
            if not self.teacher.generates:
                raise ValueError(
                    f"evaluation.metrics.{next(iter(measures))} measures generated samples, and this teacher generates "
                    "none; choose measures of the network: evaluation=perplexity for a language model, "
                    "evaluation=accuracy for an image classifier"
                )
            self.drawn = Drawn(job, measures)
        for data in (job.data, *calibration):
            check_network_measures(of_networks(self.measures), list(self.measures), self.teacher, data)
        self.texts: Texts | None = None
        if self.teacher.writes_text and self.cfg.evaluation.prompts is not None:
            self.texts = Texts(job, self.teacher_key())

    def teacher_key(self) -> dict[str, Any]:
        """Return the key under which evaluations of the teacher are kept, whatever the run."""
        options = {key: value for key, value in effective(self.cfg)["teacher"].items() if key not in ("name", "path")}
        return {"teacher": self.job.teacher_id, "options": options}

    def metrics(self, networks: Mapping[str, NetworkBackbone]) -> dict[str, Any]:
        """Return costs and quality of all networks, as entries of metrics.json; nothing that depends on time.

        The last network is the one that the run delivers: its costs stand under `student/`, its quality under `eval/`,
        too, one name for dashboards whatever the stages were.
        """
        cfg, final = self.cfg, list(networks)[-1]
        metrics: dict[str, Any] = {}
        for name, network in (*networks.items(), ("student", networks[final])):
            metrics |= {f"{name}/{cost}": total for cost, total in network.totals().items()}
            metrics[f"{name}/macs_attention"] = network.macs().attention
        if self.teacher.writes_text:
            metrics["macs_tokens"] = self.teacher.length
        for name, network in networks.items():
            if name == TEACHER:
                continue
            with self.job.clock("measure losses"):
                module = JointLoss(network, self.teacher, cfg.evaluation.seed)
                make_trainer(cfg.trainer, f"loss of {name}", cfg.evaluation.precision).test(
                    module, held_out(cfg, self.job.data), verbose=False
                )
                metrics |= {
                    f"{name}/{key}": value for key, value in module.metrics.items() if key != "teacher_task_loss"
                }
                metrics["teacher/task_loss"] = module.metrics["teacher_task_loss"]
        if self.drawn is not None:
            metrics |= self.drawn.values(networks)
        for name, measure in of_networks(self.measures).items():
            metrics |= self.values(name, measure, networks)
        if self.measures:
            metrics["protocol"] = self.protocol()
        if self.texts is not None:
            for name, network in networks.items():
                self.texts.write(name, network)
        quality = {key: value for key, value in metrics.items() if key.startswith(f"{final}/")}
        return metrics | {f"eval/{key.split('/')[1]}": value for key, value in quality.items()}

    def values(self, name: str, measure: NetworkMeasure, networks: Mapping[str, NetworkBackbone]) -> dict[str, float]:
        """A measure of each network, {network/measure: value}; the teacher's is taken once for all runs."""
        device = self.job.device
        precision = precision_of(self.cfg.evaluation.precision, device.type)

        def taken(network: NetworkBackbone) -> dict[str, float]:
            with self.job.clock("measure networks"), autocast(precision, device):
                return taken_of_network(measure, name, network, device)

        key = {**self.teacher_key(), "measure": effective(self.cfg)["evaluation"]["metrics"][name], "name": name}
        key |= {"protocol": measure.protocol(), "precision": precision, "version": RESULT_VERSION}
        found: dict[str, float] = {}
        for of, network in networks.items():
            once = functools.partial(taken, network)
            values = cached(self.job.run.cache / "measures", key, once) if of == TEACHER else once()
            found |= {f"{of}/{column}": value for column, value in values.items()}
        return finite(found, "the network's output is broken")

    def protocol(self) -> dict[str, Any]:
        """What has to agree for values to be comparable: what all measures share, then each one's own."""
        own: dict[str, dict[str, Any]] = {}
        if self.drawn is not None:
            own = {name: measure.protocol(self.drawn.reference) for name, measure in self.drawn.measures.items()}
        for name, measure in of_networks(self.measures).items():
            own[name] = {"of": "network", **measure.protocol()}
            if parts := getattr(measure, "parts", ()):
                own[name]["parts"] = list(parts)
        shared = {"precision": self.cfg.evaluation.precision} if self.drawn is None else self.drawn.protocol()
        measures = {name: {"better": measure.better, **own[name]} for name, measure in self.measures.items()}
        return {**shared, "measures": measures}

    def measured(self, student: NetworkBackbone, wanted: tuple[float, float] | None) -> dict[str, Any]:
        """Return the latencies of teacher and student, taken in turns, as entries of measured.json.

        `wanted` is the window of ratios of a latency budget, None without one; the built student's own ratio is
        returned with it, and a warning is logged where it lies outside.
        """
        device = self.job.device
        batch, repeats = self.cfg.evaluation.latency_batch, self.cfg.evaluation.latency_repeats
        with self.job.clock("time"):
            calls: dict[str, Callable[[], Any]] = {}
            for name, network in (("teacher", self.teacher), ("student", student)):
                inputs = network.to(device).eval().example_inputs(batch, device)
                calls[name] = functools.partial(network.predict, inputs)
            times = latencies(calls, repeats, device)
        ratio = times["student"] / times["teacher"]
        measured: dict[str, Any] = {f"{name}/latency_ms": value for name, value in times.items()}
        measured |= {
            "latency_ratio": ratio,
            "latency_batch": batch,
            "latency_precision": "float32",
            "device": device_name(device),
        }
        if wanted is not None:
            measured["plan/achieved_ratio"] = 1 - ratio
            if not wanted[0] <= 1 - ratio <= wanted[1]:
                print(
                    f"the built student saves {1 - ratio:.3f} of the latency, selection.ratio={wanted[0]} (tolerance "
                    f"{wanted[1] - wanted[0]:g}) was asked for: what units save alone did not add up"
                )
        return measured
