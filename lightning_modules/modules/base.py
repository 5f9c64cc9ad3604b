"""Base classes of the modules that are trained.

The noise of a step is a function of (seed, batch, position in the global batch), and no step is taken with a loss or a
gradient that is not finite.
"""

import contextlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics import MeanMetric

from datamodules.seeding import derive
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.rounding import round_weights
from lightning_modules.modules.non_finite import NonFiniteLoss, advise_on_non_finite, is_list_of_texts
from lightning_modules.nested import count_samples, tensors_by_path
from lightning_modules.training.ranks import DrawsForGlobalBatch, mean_over_ranks, total_norm, world_size

Optimizer = Callable[..., torch.optim.Optimizer]
Schedule = Callable[[torch.optim.Optimizer], Any]


def new_mean_metric() -> MeanMetric:
    """Return a mean over samples and ranks that sums in float64, and in which NaN stays NaN."""
    metric = MeanMetric(nan_strategy="disable")
    metric.set_dtype(torch.float64)
    return metric


class TrainedModule(pl.LightningModule):
    """Base class of the modules that are trained on the batches of a data module; subclasses implement `losses(batch)`.

    Before every batch the global generators are seeded with (seed, batch counter). Resuming therefore needs no state of
    the generators, and the micro-batches of one optimiser step have different noise. What `losses` draws for a sample
    depends on its position in the global batch and not on the number of ranks (see DrawsForGlobalBatch).

    Args:
        optimizer: makes the optimiser of the parameters that require a gradient.
        lr_scheduler: makes the schedule of an optimiser's learning rate, which advances with every optimiser step.
        seed: seed of training.
        dump: folder into which a batch with a loss or gradient that is not finite is written.
    """

    functions: tuple[str, ...] = ()
    """names of the methods, besides those of the networks, that `trainer.compile` compiles"""

    def __init__(self, optimizer: Optimizer, lr_scheduler: Schedule, seed: int, dump: Path) -> None:
        super().__init__()
        self.make_optimizer, self.make_schedule, self.seed, self.dump = optimizer, lr_scheduler, seed, dump
        self.batch_counter = 0
        self.newest_batch: Mapping[str, Any] = {}
        """the batch of the newest training step"""
        self.network_inputs: Mapping[str, Any] = {}
        """the networks' inputs for the newest batch (noised samples, timesteps), if `losses` sets this attribute"""
        self.section = "train"
        """the first part of the names of the logged values; a second training of a job has another"""
        self.loss_values: dict[str, Tensor] = {}
        """the losses of the newest batch, without gradients"""
        self.precision_of_training = "32-true"
        """Lightning's name of the precision; `prepare` sets it"""
        self.gradient_norm: Tensor | None = None
        """norm of the gradients of the newest optimiser step, before clipping"""

    def networks(self) -> dict[NetworkBackbone, list[nn.Module]]:
        """Return {network that `losses` runs: its modules whose outputs are read}.

        These are compiled by `trainer.compile`, and their activations recomputed by `trainer.checkpoint_activations`.
        Without any, both fields have no effect.
        """
        return {}

    def prepare(self, precision: str) -> None:
        """Prepare networks for a training in a precision, by Lightning's name; called before anything is compiled."""
        self.precision_of_training = precision

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return scalars of a batch by name. "loss" is minimised, and all are logged as `<section>/<name>`.

        In logged names, dots are underscores, because W&B takes a dot for a level of its own.
        """
        raise NotImplementedError

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batch_counter = self.trainer.fit_loop.epoch_loop.total_batch_idx
        # The 0 stands for the rank, on which seeds once depended: runs of one process keep their bits.
        torch.manual_seed(derive(self.seed, "noise", 0, self.batch_counter))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        with self.draws_for_global_batch(batch):
            losses = self.losses(batch)
        self.newest_batch = batch
        self.loss_values = {name: value.detach() for name, value in losses.items()}
        means = mean_over_ranks(losses)
        if not torch.isfinite(means["loss"]):  # the same on all ranks: none may wait for the gradients of another
            self.stop_on_non_finite("loss")
        self.log("loss", means["loss"], prog_bar=True, logger=False)
        self.log_dict({f"{self.section}/{name.replace('.', '_')}": value for name, value in means.items()})
        return losses["loss"]

    def draws_for_global_batch(self, batch: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which this rank's samples get the random numbers that one process would draw for them."""
        world = world_size()
        if world == 1:
            return contextlib.nullcontext()
        return DrawsForGlobalBatch(count_samples(batch), torch.distributed.get_rank(), world)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        self.gradient_norm = total_norm(gradients.values())
        if self.trainer.precision == "16-mixed":
            return  # the scaler of this precision skips such steps, and needs to see them
        if not torch.isfinite(self.gradient_norm):
            bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
            self.stop_on_non_finite(f"gradient of {', '.join(bad[:3]) or 'all parameters together'}")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients by the norm that the check of finiteness has computed, if there is one.

        Raises RuntimeError, as Lightning does, for an optimiser that undoes the scaling of gradients itself.
        """
        is_scaled = self.precision_of_training == "16-mixed" and getattr(optimizer, "_step_supports_amp_scaling", False)
        if self.gradient_norm is None or gradient_clip_algorithm not in (None, "norm") or is_scaled:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self.gradient_norm)

    def stop_on_non_finite(self, quantity: str) -> None:
        """Write the newest batch, the networks' inputs and the losses into `dump`, and raise NonFiniteLoss with advice.

        If gradients are accumulated, they are those of the last micro-batch.

        Args:
            quantity: name of the value that is not finite.
        """
        self.dump.mkdir(parents=True, exist_ok=True)
        path = self.dump / f"non_finite_rank{self.global_rank}.safetensors"
        given = tensors_by_path(self.newest_batch) | tensors_by_path(self.network_inputs, "inputs")
        counts = {"step": torch.tensor(self.global_step), "batch_counter": torch.tensor(self.batch_counter)}
        tensors = given | tensors_by_path(self.loss_values, "losses") | counts
        texts = {name: json.dumps(value) for name, value in self.newest_batch.items() if is_list_of_texts(value)}
        # Copies, as safetensors refuses tensors that share memory. Scalars get a dimension.
        save_file({name: torch.atleast_1d(tensor.cpu()).clone() for name, tensor in tensors.items()}, path, texts)
        values = ", ".join(f"{name}={float(value):.4g}" for name, value in self.loss_values.items())
        raise NonFiniteLoss(
            f"the {quantity} is not finite at optimiser step {self.global_step} ({values}); no step was taken with it. "
            f"The batch, the networks' inputs and the losses are in {path}. {self.advise(given)}"
        )

    def advise(self, given: Mapping[str, Tensor]) -> str:
        """Return a sentence that says what to try; `given` are the tensors of the batch and the networks' inputs."""
        broken = [
            name for name, tensor in given.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()
        ]
        if broken:
            return (
                f"The samples themselves are not finite ({', '.join(broken[:3])}): look at them (`index` has their "
                "numbers) and at the VAE and text encoders"
            )
        otherwise = "trainer.options={detect_anomaly: true}, which names the operation that failed"
        precision = str(self.trainer.precision)
        return advise_on_non_finite(self.global_step, precision, "optimizer.lr", "trainer.precision", otherwise)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        fused = can_be_fused(self.make_optimizer, parameters, self.precision_of_training)
        optimizer = self.make_optimizer(parameters, **({"fused": True} if fused else {}))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_schedule(optimizer), "interval": "step"},
        }


def can_be_fused(make_optimizer: Callable[..., Any], parameters: Sequence[nn.Parameter], precision: str) -> bool:
    """Tell whether an optimiser can take its step in one kernel: on a GPU, if it can and nothing else was configured.

    The meta device stands for a GPU, for estimates of memory. Not with the gradient scaling of `16-mixed`, for which a
    fused optimiser would undo the scaling after the clipping.
    """
    on_gpu = all(parameter.is_cuda or parameter.is_meta for parameter in parameters)
    configured = getattr(make_optimizer, "keywords", {}).keys() & {"fused", "foreach"}
    takes_it = "fused" in inspect.signature(make_optimizer).parameters
    return on_gpu and takes_it and not configured and precision != "16-mixed"


class Reference:
    """Holds a network that a module uses but that is not part of it: it is not trained, saved or copied with it."""

    def __init__(self, network: NetworkBackbone) -> None:
        self.network = network.eval().requires_grad_(False)

    def __deepcopy__(self, memo: Any) -> Self:
        return self


class DistillationModule(TrainedModule):
    """Base class of the modules that train a student with the help of its teacher.

    A subclass implements `losses(batch)` with `self.student` and `self.teacher`; `self.student.training_inputs(batch)`
    returns the inputs of both networks. A subclass outside the repository is chosen by a file
    `distillation/<name>.yaml` with its `_target_` and `_partial_: true`. The pipeline passes the six arguments below by
    keyword, takes all other arguments of the constructor from the file, and calls `result()` after training. It can
    train any other LightningModule with these arguments and `result()` as well.

    A class method `check_settings(settings, teacher, narrower)` is optional. It is called before anything expensive
    runs and raises ValueError for settings that cannot work. `settings` are the fields of the group, and `narrower`
    says whether the student's feature maps have fewer channels than the teacher's.

    `losses` reads `self.teacher` and its modules anew in every call, as `prepare` may replace the teacher by a copy in
    half precision. A subclass that reads outputs inside the networks by hooks has to list these modules in
    `networks()`: elsewhere, compiled functions do not notice hooks.

    Args:
        student: the pruned network, whose parameters are trained.
        teacher: the unpruned network, or the one that `distillation.teacher` names. It is frozen, in eval mode and in
            no checkpoint.
        optimizer: see TrainedModule.
        lr_scheduler: see TrainedModule.
        seed: see TrainedModule.
        dump: see TrainedModule.
    """

    def __init__(
        self,
        student: NetworkBackbone,
        teacher: NetworkBackbone,
        optimizer: Optimizer,
        lr_scheduler: Schedule,
        seed: int,
        dump: Path,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, dump)
        self.student, self.reference = student.train(), Reference(teacher)
        self.needs_teacher = True
        """whether `losses` calls the teacher"""

    def networks(self) -> dict[NetworkBackbone, list[nn.Module]]:
        return {self.student: [], self.teacher: []} if self.needs_teacher else {self.student: []}

    @property
    def teacher(self) -> NetworkBackbone:
        return self.reference.network

    def prepare(self, precision: str) -> None:
        """Round the teacher's weights once as autocast would round them in every pass.

        In mixed precision `self.teacher` is another object afterwards.
        """
        super().prepare(precision)
        if self.needs_teacher:
            self.reference = Reference(round_weights(self.teacher, precision))

    def on_fit_start(self) -> None:
        if self.needs_teacher:
            self.teacher.to(self.device)

    def result(self) -> NetworkBackbone:
        """Return the trained student."""
        return self.student
