"""`WatchCallback`: all instruments around a LightningModule.

Needs the extra `lightning`: `pip install 'steadyrank[lightning]'`. Import it by its full name; `import steadyrank` does
not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"steadyrank.lightning needs Lightning, and found no '{error.name}'; pip install 'steadyrank[lightning]'",
        name=error.name,
    ) from error

from .errors import ConfigError
from .monitors.watch import TaskKind, Watch
from .runs import RunFolder
from .trackers import tracker_name


class WatchCallback(Callback):  # type: ignore[misc]  # mypy runs without Lightning
    """Watches a LightningModule as it trains, with automatic or manual optimisation, one or several optimizers.

    `training_step` leaves the tasks' losses where the callback finds them before the backward pass; Lightning itself
    hands out no more than the total:

        def training_step(self, batch, batch_idx):
            logits = self.model(batch.features)
            losses = ...                    # [K], in the order of the tasks, or {task: loss}
            self.task_losses = losses       # with their graph; and self.task_logits = logits, if you like
            return losses.sum()

        Trainer(callbacks=[WatchCallback(("click", "watch_time"))])

    What is read goes to the trainer's loggers at each flush, under `trackers.tracker_name` and over the steps of the
    Watch, and to `out`. Each process watches its own rows; only the first writes. A resumed run goes on with what its
    checkpoint remembers.

    With mixed precision, losses and gradients are those before scaling (but for a fused optimizer, which takes the
    scale out within its step); a step that the scaler leaves out has no readings of weights.

    Of gradients that are accumulated (`accumulate_grad_batches`), a step's loss is the mean over its batches, and the
    tasks are compared on the last of them; with manual optimisation, leave losses on the batch that ends in the step.

    Args:
        tasks: Names of the tasks; a mapping says "binary" or "regression" of each.
        losses: The attribute of the module that holds the tasks' losses.
        logits: The attribute that may hold the logits [B, K].
        out: A run folder to make, for `steadyrank report`; none for None.
        options: More for `Watch`: `config`, `flush_every`, `shared` and so on.
    """

    def __init__(
        self,
        tasks: Sequence[str] | Mapping[str, TaskKind],
        *,
        losses: str = "task_losses",
        logits: str = "task_logits",
        out: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.watch: Watch | None = None
        """The instruments, while the module is trained."""
        self.summary = ""
        """What was seen, when training has ended."""
        self._tasks, self._losses, self._logits, self._out, self._options = tasks, losses, logits, out, options
        self._state: dict[str, Any] = {}
        self._earlier: list[Tensor] = []  # losses of the batches whose gradients wait for the step
        self._ends_in_step = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch, when the optimizers are there and a checkpoint has been taken up."""
        folder = None
        if self._out is not None and trainer.is_global_zero:
            folder = RunFolder.open(self._out) if self._state else RunFolder.create(self._out)

        def write(table: str, step: int, row: Mapping[str, float]) -> None:
            if folder is not None:
                folder.append(table, step, row)
                folder.flush()
            named = {tracker_name(table, reading): value for reading, value in row.items()}
            for logger in trainer.loggers:  # Lightning's own `log_dict` would drop rows between its periods
                logger.log_metrics(named, step=step)

        optimizers = list(trainer.optimizers)
        self.watch = Watch(pl_module, optimizers, self._tasks, out=folder, write=write, **self._options)
        if self._state:
            self.watch.load_state_dict(self._state)
        if self._state and folder is not None:
            folder.truncate_readings(self.watch.step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note whether this batch ends in a step of the optimizer."""
        self._ends_in_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the tasks' losses while they have their graph."""
        if self.watch is None:
            return
        losses, logits = (getattr(pl_module, name, None) for name in (self._losses, self._logits))
        for name in (self._losses, self._logits):  # a graph that is kept is memory, and each batch must bring its own
            setattr(pl_module, name, None)
        if losses is None and pl_module.automatic_optimization:
            raise ConfigError(self._how())
        if losses is None:
            return  # one of several backward passes
        losses_K = self._in_order(losses)
        if self._ends_in_step:
            held, self._earlier = [*self._earlier, losses_K], []
            self.watch.losses(torch.stack(held).mean(0), logits=logits)
        else:
            self._earlier.append(losses_K.detach())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what is left, and take the hooks off.

        Raises:
            ConfigError: The module trained, but never left its losses.
        """
        if self.watch is None:
            return
        watch, self.watch = self.watch, None
        self.summary = watch.close()
        if watch.step == 0 and trainer.global_step > 0:
            raise ConfigError(self._how())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what was read up to there."""
        if self.watch is not None and self.watch.step:
            self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what the instruments remember, for the trainer's checkpoint."""
        if self.watch is None:
            return self._state
        self.watch.flush()
        return self.watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict` when training starts."""
        self._state = state_dict

    def _in_order(self, losses: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return the losses [K] in the order of the tasks."""
        tasks = list(self._tasks)
        if isinstance(losses, Mapping):
            if set(losses) != set(tasks):
                raise ConfigError(f"self.{self._losses}: expected a loss of each of {tasks}, found {sorted(losses)}")
            return torch.stack([losses[task] for task in tasks])
        if losses.shape != (len(tasks),):
            raise ConfigError(
                f"self.{self._losses}: expected one loss for each of {tasks}, found a tensor of shape "
                f"{list(losses.shape)}; give the mean over the rows of each"
            )
        return losses

    def _how(self) -> str:
        return (
            f"WatchCallback found no losses before a backward pass; in training_step, write self.{self._losses} = "
            f"losses, one for each of {list(self._tasks)} with its graph, before you return the total"
        )
