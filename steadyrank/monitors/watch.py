"""`Watch`: all instruments around a training loop, the user's own or ours.

Shapes: K tasks, P parameters, T steps since the last flush, B rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field as Setting
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..metrics import TaskKind as TaskKind
from ..ranks import ALONE, Ranks
from ..runs import RunFolder
from ..settings import Settings
from .activations import DeadUnits, Gates, read_logits
from .curvature import Before, copy_before, find_updates, measure_headroom, pack_before, unpack_before
from .dynamics import ClipFactors
from .readings import Reading, join_rows, to_host
from .steps import StepWatch
from .tables import Field
from .tasks import find_conflict
from .verdict import Change, VerdictConfig, Verdicts, find_kinds
from .warning import Alert, EarlyWarning, WarningConfig

_KEPT = 1000  # alerts and changes: a run without an end must not grow
_REMEMBERED = 200  # steps whose signals a cause report compares with


class WatchConfig(Settings):
    """The instruments of a run, and how often each reads. Dearer readings have longer periods."""

    enabled: bool = True
    """Watch the run at all."""
    look_every: int = Setting(default=10, ge=1)
    """Steps between two quick looks: updates of the weight matrices, dead units, gates, logits; what warnings need."""
    dynamics_every: int = Setting(default=50, ge=1)
    """Steps between two full looks, each a quick one too: norms, accumulators, hypothetical factors, table rows."""
    tasks_every: int = Setting(default=200, ge=1)
    """Steps between two comparisons of the tasks' gradients: a backward pass each, from its loss to what is shared."""
    rank_every: int = Setting(default=200, ge=1)
    """Steps between two effective ranks of the tables; taken at the next look at the dynamics."""
    curvature_every: int = Setting(default=500, ge=1)
    """Steps between two measurements of headroom: six forward passes each, and six more at a new window."""
    dead_batches: int = Setting(default=3, ge=1)
    """Looks in which a unit must be silent, one after the other, to count as dead."""
    snapshot_every: int = Setting(default=100, ge=1)
    """Steps between two copies of the dense weights, three of which are kept: what a cause report tries a batch on."""
    causes: int = Setting(default=5, ge=0)
    """Cause reports that a run writes at most: each takes some seconds."""
    warning: WarningConfig = WarningConfig()
    """When to warn."""
    verdict: VerdictConfig = VerdictConfig()
    """What counts as a divergence."""


class Watch:
    """Sees how a model trains, in any loop: three lines, and nothing else of ours is needed.

        watch = Watch(model, optimizer, tasks=("click", "watch_time"))
        for batch in loader:
            losses = ...                 # [K], one for each task, with their graph
            watch.losses(losses)         # before backward
            losses.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        print(watch.close())

    Hooks on the optimizers and on the model's activations do the rest. Nothing crosses to the host between two
    flushes, and nothing of the training changes: weights are the same to the bit with it and without.

    Args:
        model: What is trained.
        optimizers: One or several, as they are stepped (a wrapper, not what it is wrapped around).
        tasks: Names of the tasks, in the order of the losses; a mapping says "binary" or "regression" of each.
        config: Periods and thresholds.
        flush_every: Steps between two flushes; 0 leaves them to whoever calls `flush`.
        shared: Name of the module that the tasks share; the one called `trunk` where there is one; "" for none.
        fields: Tables within the weight matrices with sparse gradients.
        loss_weights: Weight of each task's loss in what is trained.
        out: A run folder to make, or one that is open: readings and events are written there, and `steadyrank report`
            draws them.
        write: Takes a table, a step and a row of readings, in place of the folder.

    Raises:
        ConfigError: there is no module called `shared`, no task, fields do not fit, or the folder cannot be made.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    >>> watch = Watch(model, optimizer, tasks=("click", "like"))
    >>> for _ in range(40):
    ...     losses = model(torch.ones(16, 4)).square().mean(0)
    ...     watch.losses(losses)
    ...     losses.sum().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> print(watch.close())
    40 steps, no warning
    click: ...
    like: ...
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        tasks: Sequence[str] | Mapping[str, TaskKind],
        *,
        config: WatchConfig | None = None,
        flush_every: int = 20,
        shared: str | None = None,
        fields: Sequence[Field] = (),
        loss_weights: Sequence[float] | None = None,
        out: RunFolder | str | Path | None = None,
        write: Callable[[str, int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.config = config or WatchConfig()
        kinds = find_kinds(tasks)
        self.tasks = list(kinds)
        self.step = 0
        """Steps seen so far."""
        self.alerts: list[Alert] = []
        """The last thousand warnings, first to last."""
        self.changes: list[Change] = []
        """The last thousand changes of verdicts."""
        self._news: list[Alert | Change] = []
        self.keep_update = False
        """Keep the coming step's update for `headroom`, though it is not due."""
        held = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self._parameters = [p for each in held for group in each.param_groups for p in group["params"]]
        names = {id(p): name for name, p in model.named_parameters()}
        self.parameters = [names.get(id(p), f"parameter_{i}") for i, p in enumerate(self._parameters)]
        """Names of the parameters that the optimizers hold, in their order."""
        self._binary = [kinds[task] == "binary" for task in self.tasks]
        self._flush_every = flush_every
        self._loss_weights = [1.0] * len(self.tasks) if loss_weights is None else list(loss_weights)
        self.verdicts = Verdicts(kinds, self.config.verdict)
        matrices = [name for name, p in zip(self.parameters, self._parameters, strict=True) if p.dim() > 1]
        self.warning = EarlyWarning(self.tasks, self.parameters, self.config.warning, matrices)
        self._dead, self._gates = DeadUnits(model, self.config.dead_batches), Gates(model)
        self._conflict = find_conflict(model, shared, self.tasks, self._loss_weights)
        self._handles = [*self._dead.handles, *self._gates.handles, *(self._conflict.handles if self._conflict else [])]
        self._named = dict(zip(self.parameters, self._parameters, strict=True))
        self._clip = ClipFactors(self._named.items(), held)
        self._parts = [StepWatch(each, self._named, fields) for each in held]
        for part in self._parts:
            self._handles.append(part.optimizer.register_step_pre_hook(self._pre_hook(part)))
            self._handles.append(part.optimizer.register_step_post_hook(lambda *_, part=part: self._after(part)))
        self._write = write
        # The last that can go wrong: no folder is left behind where the rest does.
        self.folder = RunFolder.create(out) if isinstance(out, str | Path) else out
        self._signals: list[Tensor] = []
        self._recent = np.empty((0, 2 * len(self.tasks) + len(self.parameters)))
        self._read: list[tuple[str, int, list[Reading]]] = []
        self._open: list[Tensor] = []  # losses and logits of the step that is under way
        self._gradients_P: Tensor | None = None
        self._moved: list[Before] = []
        self._ranked = 0
        self._expect()

    def losses(
        self,
        losses_K: Float[Tensor, " tasks"],
        *,
        logits: Float[Tensor, "batch tasks"] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Begin a step: to be called between forward and backward. No host sync, but for the flush that may be due.

        Args:
            losses_K: The loss of each task, with its graph, without its weight in the total.
            logits: What the model says, for range and saturation.
            ranks: Who else has rows of the batch, and does the same with them.

        Raises:
            ConfigError: There is not one loss, or not one column of logits, for each task.
        """
        self._check_shapes(losses_K, logits)
        self._close_step()
        if self._flush_every and self.step and self.step % self._flush_every == 0:
            self.flush()
        self.step += 1
        self._moved = []
        for part in self._parts:
            part.done = False
        if self._conflict is not None and self._is_due(self.config.tasks_every):
            self._read.append(("tasks", self.step, self._conflict.read(losses_K)))
        with torch.no_grad():
            now = losses_K.detach().float()
            top = torch.full_like(now, torch.nan)
            if logits is not None and len(logits):
                top = logits.detach().float().abs().amax(0)
            self._open = [now, top]
            if self._looks():
                found = self._dead.read(ranks) + self._gates.read()
                if logits is not None:
                    found += read_logits(logits, self.tasks, self._binary)
                self._read.append(("dynamics", self.step, found))
        self._expect()

    def _check_shapes(self, losses_K: Tensor, logits: Tensor | None) -> None:
        count = len(self.tasks)
        if losses_K.shape != (count,):
            raise ConfigError(
                f"Watch: expected {count} losses for {count} tasks, found a tensor of shape {list(losses_K.shape)}; "
                "give the mean over the rows of each, as in torch.stack(losses)"
            )
        if logits is not None and (logits.dim() != 2 or logits.shape[1] != count):
            raise ConfigError(f"Watch: expected logits [rows, {count}], found a tensor of shape {list(logits.shape)}")

    def whole(self, losses_K: Float[Tensor, " tasks"], logits_K: Float[Tensor, " tasks"]) -> None:
        """Give losses and largest |logits| of a whole batch of which `losses` were those of this rank's part."""
        self._open = [losses_K.detach().float(), logits_K.detach().float()]

    def gradients(self, largest: Float[Tensor, " with_gradient"]) -> None:
        """Give the largest |g| of each parameter that has a gradient, where the loop knows it already."""
        for part in self._parts:
            part.note_sparse()
        missing = [p.grad is None for p in self._parameters]
        if any(missing):
            values = iter(largest.unbind())
            nan = torch.full((), torch.nan, device=largest.device)
            largest = torch.stack([nan if none else next(values).to(nan) for none in missing])
        self._gradients_P = largest.detach().float()

    def headroom(self, losses: Callable[[], Tensor], area: str = "headroom") -> None:
        """Measure headroom along the step just made (`curvature.measure_headroom`), where `headroom_is_due`.

        Args:
            losses: Gives the K weighted losses on a held batch, or on one to come, in eval mode.
            area: "headroom", or "headroom_next" for data to come.
        """
        rate = self._parts[0].optimizer.param_groups[0]["lr"]
        found = measure_headroom(losses, find_updates(self._moved), lr=rate)
        values = torch.cat([found.total[None], found.tasks])
        readings = [Reading(area, ["total", *self.tasks], values)]
        if area == "headroom":
            readings.append(Reading("critical_sharpness", ["total"], found.critical_sharpness[None]))
        self._read.append(("curvature", self.step, readings))
        self.keep_update = False

    @property
    def headroom_is_due(self) -> bool:
        """Whether this step's update was kept for `headroom`."""
        return bool(self._moved)

    def kept_update(self) -> list[Any]:
        """Return what `headroom` would be measured on, for `keep_again` after a resume."""
        return pack_before(self._moved, self._named)

    def keep_again(self, kept: Sequence[Any]) -> None:
        """Take up a `kept_update`."""
        self._moved = unpack_before(kept, self._named)

    def flush(self) -> dict[str, float]:
        """Bring all readings to the host, in one copy; judge, warn, write.

        Returns:
            The largest losses, logits and gradients since the last flush: `loss_max/`, `logit_max/`, `gradient_max/`.
        """
        self._close_step()
        if not self._signals:
            return {}
        held, self._read = self._read, []
        ranks = [reading for part in self._parts for reading in part.tables.read_rank()]
        if ranks:
            held.append(("dynamics", self._ranked, ranks))
        if self._flush_every and (factors := self._clip.read()):
            values = torch.stack([factor.detach().float() for factor in factors.values()])
            held.append(("steps", self.step, [Reading("clip_factor", list(factors), values)]))
        readings = [reading for *_, found in held for reading in found]
        signals, *arrays = to_host([torch.stack(self._signals), *(reading.values for reading in readings)])
        first, self._signals = self.step - len(self._signals) + 1, []
        tops = self._take_signals(first, signals)
        rows = join_rows(held, arrays)
        if self._flush_every:  # our own trainer has more to put into this row
            rows["steps", self.step] = self._mean_losses(signals) | tops | rows.get(("steps", self.step), {})
        for (table, step), row in rows.items():
            if row:
                self._put(table, step, row)
            if table == "dynamics":
                self._warn(self.warning.add_dynamics(step, row))
        if self._flush_every and self.folder is not None:
            self.folder.flush()
        return tops

    def recent(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the last flushed steps: their numbers [T], losses [T, K] and largest gradients [T, P]."""
        k, count = len(self.tasks), len(self._recent)
        last = self.step - len(self._signals) - bool(self._open)
        return np.arange(last - count + 1, last + 1), self._recent[:, :k], self._recent[:, 2 * k :]

    def window(self, row: Mapping[str, float]) -> list[Change]:
        """Judge the metrics of a progressive window that ends at this step (`normalised_entropy/<task>` and so on)."""
        return self._note(self.verdicts.add_window(self.step, row))

    def take_news(self) -> tuple[list[Alert], list[Change]]:
        """Return the warnings and the changes of verdicts since the last call."""
        news, self._news = self._news, []
        return [n for n in news if isinstance(n, Alert)], [n for n in news if isinstance(n, Change)]

    def close(self) -> str:
        """Flush, take the hooks away, and return what was seen: the verdict of each task, and the warnings."""
        self.finish()
        if self.folder is not None:
            self.folder.flush()
            kinds, found = self.verdicts.kinds, self.verdicts.summary()
            tasks = {task: {"kind": kinds[task], "verdict": verdict} for task, verdict in found.items()}
            facts = {"name": self.folder.path.name, "status": "finished", "message": "", "steps": self.step}
            self.folder.write_summary({**facts, "tasks": tasks})
        warned = [f"step {alert.step}: {alert.level}: {alert.reason}" for alert in self.alerts]
        count = f"{len(warned)} warning{'s' if len(warned) > 1 else ''}" if warned else "no warning"
        judged = [f"{task}: {verdict.replace('_', ' ')}" for task, verdict in self.verdicts.current().items()]
        return "\n".join([f"{self.step} steps, {count}", *judged, *warned])

    def finish(self, *, stopped: bool = False) -> None:
        """Flush, give the verdicts on the whole run, and take the hooks away.

        Args:
            stopped: The run was ended by what is judged.
        """
        self.flush()
        self._note(self.verdicts.final(self.step, stopped=stopped))
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See nothing of the forward passes made inside: those of somebody who examines the model."""
        self._dead.active = self._gates.active = False
        if self._conflict is not None:
            self._conflict.active = False
        try:
            yield
        finally:
            self._expect()

    def state_dict(self) -> dict[str, Any]:
        """Flush, and return what the instruments remember, as tensors and plain values."""
        self.flush()
        return {
            "step": self.step,
            "dead": self._dead.state_dict(),
            "tables": [part.tables.state_dict() for part in self._parts],
            "warning": self.warning.state_dict(),
            "verdicts": self.verdicts.state_dict(),
            "alerts": [list(alert) for alert in self.alerts],
            "changes": [list(change) for change in self.changes],
            "recent": torch.from_numpy(self._recent.copy()),
            "ranked": self._ranked,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.step = state["step"]
        self._dead.load_state_dict(state["dead"])
        for part, tables in zip(self._parts, state["tables"], strict=True):
            part.tables.load_state_dict(tables)
        self.warning.load_state_dict(state["warning"])
        self.verdicts.load_state_dict(state["verdicts"])
        self.alerts = [Alert(*alert) for alert in state["alerts"]]
        self.changes = [Change(*change) for change in state["changes"]]
        self._recent, self._ranked = state["recent"].numpy(), state["ranked"]
        self._expect()

    def _is_due(self, every: int, ahead: int = 0) -> bool:
        return (self.step + ahead) % every == 0

    def _looks(self, ahead: int = 0) -> bool:
        return self._is_due(self.config.look_every, ahead) or self._is_due(self.config.dynamics_every, ahead)

    def _expect(self) -> None:
        """Watch the forward pass of the next step, where a reading of it is due."""
        self._dead.active = self._gates.active = self._looks(1)
        if self._conflict is not None:
            self._conflict.active = self._is_due(self.config.tasks_every, 1)

    def _pre_hook(self, part: StepWatch) -> Callable[..., Any]:
        """Return what sees an optimizer's step coming: at once, or where it calls a closure, after its first call."""

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            if closure is None:
                self._before(part)
                return None
            looked = False

            def run() -> Any:
                nonlocal looked
                loss = closure()
                if not looked:
                    self._before(part)
                looked = True
                return loss

            return args[:1], {**kwargs, "closure": run}

        return hook

    def _before(self, part: StepWatch) -> None:
        """See gradients and weights right before an optimizer's step."""
        if not self._open or part.done:
            return
        if self._gradients_P is None:
            part.note_sparse()
            part.note_gradients()
        if self._looks():
            part.before(full=self._is_due(self.config.dynamics_every))
        if self.keep_update or self._is_due(self.config.curvature_every):
            self._moved += copy_before(part.parameters)

    def _after(self, part: StepWatch) -> None:
        """See what the step has changed."""
        if not self._open or part.done:
            return
        part.done = True
        if self._looks():
            full = self._is_due(self.config.dynamics_every)
            rank = full and (self.step - self._ranked >= self.config.rank_every or self._ranked == self.step)
            self._ranked = self.step if rank else self._ranked
            self._read.append(("dynamics", self.step, part.after(full, self.step, rank)))

    def _close_step(self) -> None:
        """Put the signals of the step that is under way with the others, on the device."""
        if self._open:
            losses_K, logits_K = self._open
            gradients_P = self._gradients_P
            if gradients_P is None:
                gradients_P = torch.cat([part.take_gradients(losses_K) for part in self._parts])
            self._signals.append(torch.cat([losses_K, logits_K, gradients_P.to(losses_K)]))
        self._open, self._gradients_P = [], None

    def _take_signals(self, first: int, signals_TS: np.ndarray) -> dict[str, float]:
        """Judge the signals of the steps since the last flush; return the largest of each."""
        losses_TK, logits_TK, gradients_TP = np.split(signals_TS, np.multiply(len(self.tasks), [1, 2]), axis=1)
        self._recent = np.vstack([self._recent, signals_TS])[-_REMEMBERED:]
        # A loss of exactly 0 is that of a batch without a label.
        self._note(self.verdicts.add_losses(first, losses_TK, losses_TK != 0))
        # The few rows of a table that a batch holds make its largest gradient a lottery.
        sparse_P = np.array([yes for part in self._parts for yes in part.sparse])
        judged_TP = np.where(sparse_P & np.isfinite(gradients_TP), np.nan, gradients_TP)
        self._warn(self.warning.add_steps(first, logits_TK, judged_TP))
        areas = (("loss_max", self.tasks), ("logit_max", self.tasks), ("gradient_max", self.parameters))
        parts = (losses_TK, logits_TK, gradients_TP)
        row: dict[str, float] = {}
        for (area, names), part in zip(areas, parts, strict=True):
            known = ~np.isnan(part).all(0)
            tops = np.where(known, np.fmax.reduce(part, axis=0), np.nan)
            row |= {f"{area}/{name}": float(top) for name, top, yes in zip(names, tops, known, strict=True) if yes}
        return row

    def _mean_losses(self, signals_TS: np.ndarray) -> dict[str, float]:
        """Return the mean of each task's finite losses, and of what is trained."""
        losses_TK = signals_TS[:, : len(self.tasks)]
        finite_TK = np.isfinite(losses_TK)
        sum_K, count_K = np.where(finite_TK, losses_TK, 0.0).sum(0), finite_TK.sum(0)
        mean_K = np.where(count_K > 0, sum_K / np.maximum(count_K, 1), np.nan)
        named = zip(["total", *self.tasks], [mean_K @ np.array(self._loss_weights), *mean_K], strict=True)
        return {f"loss/{name}": float(mean) for name, mean in named}

    def _put(self, table: str, step: int, row: Mapping[str, float]) -> None:
        if self._write is not None:
            self._write(table, step, row)
        elif self.folder is not None:
            self.folder.append(table, step, row)

    def _warn(self, alerts: list[Alert]) -> None:
        self.alerts = [*self.alerts, *alerts][-_KEPT:]
        self._news = [*self._news, *alerts][-_KEPT:]
        if self.folder is not None:
            for alert in alerts:
                detail = {"level": alert.level, "sign": alert.sign, "task": alert.task, "layer": alert.layer}
                self.folder.event(
                    alert.step, "warning", alert.reason, **detail, reason=alert.reason, quantities=alert.quantities
                )

    def _note(self, changes: list[Change]) -> list[Change]:
        self.changes = [*self.changes, *changes][-_KEPT:]
        self._news = [*self._news, *changes][-_KEPT:]
        if self.folder is not None:
            for change in changes:
                message = f"{change.task}: {change.verdict.replace('_', ' ')}: {change.reason}"
                detail = {"task": change.task, "verdict": change.verdict, "since": change.since}
                self.folder.event(change.step, "verdict", message, **detail)
        return changes
