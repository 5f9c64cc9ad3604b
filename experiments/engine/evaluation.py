"""The measurements of the stage `evaluate`: one protocol for all networks of a job, whatever their family."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.engine.cache import cached
from experiments.engine.identity import RESULT_VERSION, get_effective_settings
from experiments.engine.inputs import make_held_out_batches
from experiments.engine.job import TEACHER, Job
from experiments.engine.measures import (
    build_measures,
    check_finite,
    check_network_measures,
    measure_network,
    select_network_measures,
    select_sample_measures,
)
from experiments.engine.samples import SampleEvaluation
from experiments.engine.texts import Texts
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.metrics.cost import device_name, latencies
from lightning_modules.metrics.protocol import NetworkMeasure
from lightning_modules.modules.joint_loss import JointLoss
from lightning_modules.training.trainer import autocast, make_trainer, resolve_precision


class Evaluator:
    """Measures networks against the teacher and the data, as `cfg.evaluation` says.

    Args:
        job: the job; its teacher is loaded.
        calibration: the data modules of calibration samples, where they are not the job's data.

    Raises ValueError for measures that cannot be taken of the teacher's networks, or whose texts are among those that
    the teacher is calibrated on.
    """

    def __init__(self, job: Job, calibration: Sequence[Any] = ()) -> None:
        self.job, self.cfg, self.teacher = job, job.cfg, job.teacher
        self.measures = build_measures(self.cfg)
        self.samples: SampleEvaluation | None = None
        if measures := select_sample_measures(self.measures):
            if not self.teacher.generates:
                raise ValueError(
                    f"evaluation.metrics.{next(iter(measures))} measures generated samples, and this teacher generates "
                    "none; choose measures of the network: evaluation=perplexity for a language model, "
                    "evaluation=accuracy for an image classifier"
                )
            self.samples = SampleEvaluation(job, measures)
        for data in (job.data, *calibration):
            check_network_measures(select_network_measures(self.measures), list(self.measures), self.teacher, data)
        self.texts: Texts | None = None
        if self.teacher.writes_text and self.cfg.evaluation.prompts is not None:
            self.texts = Texts(job, self.get_teacher_key())

    def get_teacher_key(self) -> dict[str, Any]:
        """Return the key under which evaluations of the teacher are cached, whatever the run."""
        options = get_effective_settings(self.cfg)["teacher"].items()
        options = {key: value for key, value in options if key not in ("name", "path")}
        return {"teacher": self.job.teacher_id, "options": options}

    def measure(self, networks: Mapping[str, NetworkBackbone]) -> dict[str, Any]:
        """Return costs and quality of all networks, as entries of metrics.json; nothing that depends on time.

        The last network is the one that the run delivers. Its costs have the prefix `student/` and its quality the
        prefix `eval/` as well, so that dashboards need one name whatever the stages were.
        """
        final = list(networks)[-1]
        metrics: dict[str, Any] = {}
        for name, network in (*networks.items(), ("student", networks[final])):
            metrics |= {f"{name}/{cost}": total for cost, total in network.totals().items()}
            metrics[f"{name}/macs_attention"] = network.macs().attention
        if self.teacher.writes_text:
            metrics["macs_tokens"] = self.teacher.length
        for name, network in networks.items():
            if name != TEACHER:
                metrics |= self.measure_losses(name, network)
        if self.samples is not None:
            metrics |= self.samples.measure(networks)
        for name, measure in select_network_measures(self.measures).items():
            metrics |= self.measure_networks(name, measure, networks)
        if self.measures:
            metrics["protocol"] = self.describe_protocol(networks)
        if self.texts is not None:
            for name, network in networks.items():
                self.texts.write(name, network)
        quality = {key: value for key, value in metrics.items() if key.startswith(f"{final}/")}
        return metrics | {f"eval/{key.split('/')[1]}": value for key, value in quality.items()}

    def measure_losses(self, name: str, network: NetworkBackbone) -> dict[str, float]:
        """Return the losses of a network on the held-out samples, and the teacher's task loss on them."""
        cfg = self.cfg
        with self.job.clock("measure losses"):
            module = JointLoss(network, self.teacher, cfg.evaluation.seed)
            make_trainer(cfg.trainer, f"loss of {name}", cfg.evaluation.precision).test(
                module, make_held_out_batches(cfg, self.job.data), verbose=False
            )
        losses = {f"{name}/{key}": value for key, value in module.metrics.items() if key != "teacher_task_loss"}
        return losses | {"teacher/task_loss": module.metrics["teacher_task_loss"]}

    def measure_networks(
        self, name: str, measure: NetworkMeasure, networks: Mapping[str, NetworkBackbone]
    ) -> dict[str, float]:
        """Return {network/measure: value} of each network; the teacher's values are cached for all runs."""
        device = self.job.device
        precision = resolve_precision(self.cfg.evaluation.precision, device.type)

        def take(network: NetworkBackbone) -> dict[str, float]:
            with self.job.clock("measure networks"), autocast(precision, device):
                return measure_network(measure, name, network, device)

        settings = get_effective_settings(self.cfg)["evaluation"]["metrics"][name]
        key = {**self.get_teacher_key(), "measure": settings, "name": name}
        key |= {"protocol": measure.protocol(), "precision": precision, "version": RESULT_VERSION}
        values: dict[str, float] = {}
        for network_name, network in networks.items():
            compute = functools.partial(take, network)
            is_teacher = network_name == TEACHER
            parts = cached(self.job.run.cache / "measures", key, compute) if is_teacher else compute()
            values |= {f"{network_name}/{column}": value for column, value in parts.items()}
        return check_finite(values, "the network's output is broken")

    def describe_protocol(self, networks: Mapping[str, NetworkBackbone]) -> dict[str, Any]:
        """Return what has to agree for values to be comparable: what all measures share, then what each one adds."""
        protocols: dict[str, dict[str, Any]] = {}
        shared: dict[str, Any] = {"precision": self.cfg.evaluation.precision}
        if self.samples is not None:
            shared, reference = self.samples.describe(networks), self.samples.reference
            protocols = {name: measure.protocol(reference) for name, measure in self.samples.measures.items()}
        for name, measure in select_network_measures(self.measures).items():
            protocols[name] = {"of": "network", **measure.protocol()}
            if parts := getattr(measure, "parts", ()):
                protocols[name]["parts"] = list(parts)
        measures = {name: {"better": measure.better, **protocols[name]} for name, measure in self.measures.items()}
        return {**shared, "measures": measures}

    def measure_latencies(self, student: NetworkBackbone, window: tuple[float, float] | None) -> dict[str, Any]:
        """Return the latencies of teacher and student in milliseconds, measured in turns, as entries of measured.json.

        `window` is the lowest and highest ratio of a latency budget, None for other budgets. With one, the ratio of the
        built student is returned as well, and a line is printed where it lies outside.
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
        entries: dict[str, Any] = {f"{name}/latency_ms": value for name, value in times.items()}
        entries |= {
            "latency_ratio": ratio,
            "latency_batch": batch,
            "latency_precision": "float32",
            "device": device_name(device),
        }
        if window is not None:
            entries["plan/achieved_ratio"] = 1 - ratio
            if not window[0] <= 1 - ratio <= window[1]:
                print(
                    f"the built student saves {1 - ratio:.3f} of the latency instead of the ratio {window[0]} "
                    f"(tolerance {window[1] - window[0]:g}): what single units save does not add up"
                )
        return entries
