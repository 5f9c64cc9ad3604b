"""The evaluation stage: one protocol for teacher, pruned and distilled network, whatever their family."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from experiments.engine.artefacts import read_json
from experiments.engine.cache import cached
from experiments.engine.clock import Stages
from experiments.engine.identity import RESULT_VERSION, effective
from experiments.engine.measures import (
    build_measures,
    check_network_measures,
    finite,
    of_networks,
    of_samples,
    taken_of_network,
)
from experiments.engine.run import Run
from experiments.engine.samples import Drawn
from experiments.engine.texts import Texts
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.metrics.cost import device_name, latencies, peak_memory
from lightning_modules.metrics.protocol import NetworkMeasure
from lightning_modules.modules.joint_loss import JointLoss
from lightning_modules.training.trainer import autocast, make_trainer, precision_of


class Evaluator:
    """Measures networks against the teacher and the data, as `cfg.evaluation` says."""

    def __init__(
        self, cfg: DictConfig, run: Run, data: Any, teacher: NetworkBackbone, teacher_id: str, stages: Stages
    ) -> None:
        self.cfg, self.run, self.data, self.stages = cfg, run, data, stages
        self.teacher, self.teacher_id = teacher, teacher_id
        self.measures = build_measures(cfg)
        self.drawn: Drawn | None = None
        if measures := of_samples(self.measures):
            if not isinstance(teacher, DiffusionBackbone):
                raise ValueError(
                    f"evaluation.metrics.{next(iter(measures))} measures generated samples, and this teacher generates "
                    "none; choose measures of the network: evaluation=perplexity for a language model, "
                    "evaluation=accuracy for an image classifier"
                )
            self.drawn = Drawn(cfg, run, data, teacher, teacher_id, stages, measures)
        check_network_measures(of_networks(self.measures), list(self.measures), teacher, data)
        self.texts: Texts | None = None
        if teacher.writes_text and cfg.evaluation.prompts is not None:
            self.texts = Texts(cfg, run, teacher, self.teacher_key(), stages)

    def teacher_key(self) -> dict[str, Any]:
        """What the teacher's evaluations are kept under, whatever the run."""
        options = {key: value for key, value in effective(self.cfg)["teacher"].items() if key not in ("name", "path")}
        return {"teacher": self.teacher_id, "options": options}

    def held_out(self) -> DataLoader:
        """The samples on which losses are measured."""
        return held_out(self.cfg, self.data)

    def metrics(self, plan: dict[str, Any], networks: dict[str, NetworkBackbone]) -> dict[str, Any]:
        """Quality of teacher, pruned and distilled network; counts; nothing that depends on time."""
        cfg, path = self.cfg, self.run / "metrics.json"
        if path.exists():
            return read_json(path)
        budget = cfg.selection.get("budget", "params")
        final = "distilled" if "distilled" in networks else "pruned"
        metrics: dict[str, Any] = {
            "run_id": self.run.id,
            **requested(cfg.selection, self.teacher.totals()),
            "plan/budget": budget,
            "plan/removed_units": sum("unit" in change for change in plan["changes"]),
            "plan/predicted_harm": plan["predicted_harm"],
        }
        for name, network in (("teacher", self.teacher), ("student", networks["pruned"])):
            metrics |= {f"{name}/{cost}": total for cost, total in network.totals().items()}
            metrics[f"{name}/macs_attention"] = network.macs().attention
        if self.teacher.writes_text:
            metrics["macs_tokens"] = self.teacher.length
        if budget != "latency":  # that is measured, and stands in measured.json
            metrics["plan/achieved_ratio"] = 1 - metrics[f"student/{budget}"] / metrics[f"teacher/{budget}"]
        metrics["eval/weights"] = ("ema" if cfg.ema_decay is not None else "last") if final == "distilled" else "pruned"

        for name, network in networks.items():
            if name == "teacher":
                continue
            with self.stages("measure losses"):
                module = JointLoss(network, self.teacher, cfg.evaluation.seed)
                make_trainer(cfg.trainer, f"loss of {name}", cfg.evaluation.precision).test(
                    module, self.held_out(), verbose=False
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
        # "eval/..." is what the run delivers: one name for dashboards, whether it was distilled or not.
        metrics |= {f"eval/{key.split('/')[1]}": value for key, value in metrics.items() if key.startswith(f"{final}/")}
        self.run.write("metrics.json", metrics)
        return metrics

    def values(self, name: str, measure: NetworkMeasure, networks: dict[str, NetworkBackbone]) -> dict[str, float]:
        """A measure of each network, {network/measure: value}; the teacher's is taken once for all runs."""
        device = self.stages.device
        precision = precision_of(self.cfg.evaluation.precision, device.type)

        def taken(network: NetworkBackbone) -> dict[str, float]:
            with self.stages("measure networks"), autocast(precision, device):
                return taken_of_network(measure, name, network, device)

        key = {**self.teacher_key(), "measure": effective(self.cfg)["evaluation"]["metrics"][name], "name": name}
        key |= {"protocol": measure.protocol(), "precision": precision, "version": RESULT_VERSION}
        found: dict[str, float] = {}
        for of, network in networks.items():
            once = functools.partial(taken, network)
            values = cached(self.run.cache / "measures", key, once) if of == "teacher" else once()
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

    def latency_achieved(self, ratio: float) -> dict[str, float]:
        """The built student's own share of a latency budget; says so where it is not what was asked for."""
        selection = self.cfg.selection
        if selection.get("budget") != "latency":
            return {}
        if "ratio" in selection and not selection.ratio <= ratio <= selection.ratio + selection.tolerance:
            print(
                f"the built student saves {ratio:.3f} of the latency, selection.ratio={selection.ratio} (tolerance "
                f"{selection.tolerance}) was asked for: what units save alone did not add up"
            )
        return {"plan/achieved_ratio": ratio}

    def measured(self, student: NetworkBackbone) -> dict[str, Any]:
        """Latency of teacher and student, taken in turns, and the job's time and peak memory."""
        device = self.stages.device
        batch, repeats = self.cfg.evaluation.latency_batch, self.cfg.evaluation.latency_repeats
        with self.stages("time"):
            calls: dict[str, Callable[[], Any]] = {}
            for name, network in (("teacher", self.teacher), ("student", student)):
                inputs = network.to(device).eval().example_inputs(batch, device)
                calls[name] = functools.partial(network.predict, inputs)
            times = latencies(calls, repeats, device)
        measured: dict[str, Any] = {f"{name}/latency_ms": value for name, value in times.items()}
        measured |= {
            "latency_ratio": times["student"] / times["teacher"],
            **self.latency_achieved(1 - times["student"] / times["teacher"]),
            "latency_batch": batch,
            "latency_precision": "float32",
            "device": device_name(device),
            "torch": str(torch.__version__),
            "peak_memory_bytes": peak_memory(device),
        }
        return measured


def requested(selection: DictConfig, totals: Mapping[str, int]) -> dict[str, float | None]:
    """The ratio that was asked for, as an entry of metrics.json, and the target it comes from where one was given.

    The ratio is None where units were given; `totals` are the teacher's.
    """
    target = selection.get("target")
    if target is None:
        return {"plan/requested_ratio": selection.get("ratio")}
    return {"plan/requested_ratio": 1 - target / totals[selection.budget], "plan/requested_target": target}


def held_out(cfg: DictConfig, data: Any) -> DataLoader:
    """The held-out samples on which losses are measured."""
    count, seed, batch = (cfg.evaluation[key] for key in ("loss_samples", "seed", "batch_size"))
    return data.subset("holdout", count, seed, batch, field="evaluation.loss_samples")
