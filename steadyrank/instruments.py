"""The instruments of a run: a `Watch`, what a cause report needs to remember, and where readings go."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from .data.deal import share_of
from .data.logs import Reader
from .data.rows import show_rows
from .distributed.borrowed import gather_whole
from .distributed.engine import Engine
from .distributed.merging import Merger
from .errors import CheckpointError
from .losses import multitask_loss
from .monitors.cause import READ, Cause, Earlier, Trail, find_cause
from .monitors.going_back import go_back
from .monitors.tables import Field
from .monitors.unusual import Reference
from .monitors.verdict import Change
from .monitors.warning import Alert
from .monitors.watch import Watch, WatchConfig
from .ranks import ALONE
from .recovery import Trouble
from .runs import RunFolder
from .schema import Batch, Schema
from .shards import Rows

_CAUSES_APART = 200


class Instruments:
    """All that watches a run of ours.

    Args:
        model: What is trained.
        optimizers: All of them.
        reader: Gives the batches, and single rows of the log again.
        config: Periods and thresholds.
        folder: Takes readings, events and cause reports.
        write: Takes a table, a step and a row of readings.
        engine: Trains the model together with other ranks, each of which has instruments and reads at the same steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        reader: Reader,
        config: WatchConfig,
        folder: RunFolder,
        write: Callable[[str, int, Mapping[str, float]], None],
        engine: Engine | None = None,
    ) -> None:
        self.model, self.reader, self.config, self.folder = model, reader, config, folder
        self._engine, self.ranks = engine, ALONE if engine is None else engine.ranks
        self._merger = Merger(write, self.ranks, engine is not None and bool(engine.rows))
        self.schema = reader.schema
        tasks = self.schema.tasks
        self.watch = Watch(
            model,
            optimizers,
            {name: task.kind for name, task in tasks.items()},
            config=config,
            flush_every=0,
            fields=find_fields(model, self.schema),
            loss_weights=[task.loss_weight for task in tasks.values()],
            out=folder,
            write=write if self.ranks.is_alone else self._merger.add,
        )
        self.reference = Reference()
        self._dense = [(n, p) for n, p in model.named_parameters() if n not in self._table_names()]
        self._snapshots: list[tuple[int, dict[str, Tensor]]] = []
        self._recent: list[tuple[int, Batch]] = []
        self._explained: list[int] = []
        self._troubles: list[Trouble] = []
        self._looked_ahead = 0

    def expect(self, last_of_window: bool) -> None:
        """Prepare for the coming step; after the last one of a window, headroom is measured on the next window."""
        due = self.watch.step + 1 - self._looked_ahead >= self.config.curvature_every
        if last_of_window and due:
            self._looked_ahead = self.watch.step + 1
            self.watch.keep_update = True

    def begin_window(self, batch: Batch) -> None:
        """Measure headroom on the first batch of a window, before anything of it is learned."""
        if self.watch.headroom_is_due:
            self._looked_ahead = self.watch.step
            self.watch.headroom(lambda: self._losses_of(batch), "headroom_next")

    def note(self, batch: Batch) -> None:
        """Look at the step just made; `batch` as the reader gave it. No host sync."""
        step = self.watch.step
        self.reference.add(step, batch, share_of(batch.whole_rows, self.ranks.rank, self.ranks.size)[0])
        self._recent.append((step, batch))
        if self.watch.headroom_is_due:
            self.watch.headroom(lambda: self._losses_of(batch))
        if step % self.config.snapshot_every == 0:
            self._snapshots = [*self._snapshots, (step, {n: p.detach().clone() for n, p in self._dense})][-3:]

    def flush(self) -> dict[str, float]:
        """Bring the readings to the host; judge, warn, and explain what calls for it. Returns the largest signals."""
        row = self.watch.flush()
        self._merger.flush()
        alerts, changes = self.watch.take_news()
        self._note_troubles(alerts, changes)
        # What the ranks see differs a little, since some of it is of their own rows.
        due = self.ranks.on_first(lambda: self._find_due(alerts, changes))
        if due is not None:
            self._explain(*due)
        self._recent.clear()
        return row

    def take_troubles(self) -> list[Trouble]:
        """Return the alarms, and the divergences that a task is suspected of, since the last call."""
        self._note_troubles(*self.watch.take_news())
        troubles, self._troubles = self._troubles, []
        return troubles

    def _note_troubles(self, alerts: list[Alert], changes: list[Change]) -> None:
        self._troubles += [
            Trouble("alarm", self.watch.step, a.step, a.task, a.reason) for a in alerts if a.level == "alarm"
        ]
        self._troubles += [
            Trouble("verdict", c.step, c.since, c.task, c.reason) for c in changes if c.verdict == "suspected"
        ]

    def go_back(self, then: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state to go on with where training goes back to an earlier moment: `state_dict` of then."""
        return {**then, "watch": go_back(then["watch"], self.watch.state_dict()), "explained": list(self._explained)}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to see the same; a collective."""
        self.reference.join(self.ranks)
        return {
            # The first batch of the next window is still to be met with this step's update.
            "kept_update": self.watch.kept_update() if self.reader.left == 0 else [],
            "snapshots": [[step, state] for step, state in self._snapshots],
            "watch": self.watch.state_dict(),
            "reference": self.reference.state_dict(),
            "explained": list(self._explained),
            "looked_ahead": self._looked_ahead,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.watch.load_state_dict(state["watch"])
        self.reference.load_state_dict(state["reference"])
        self._explained, self._looked_ahead = list(state["explained"]), state["looked_ahead"]
        self._snapshots = [(step, dict(weights)) for step, weights in state["snapshots"]]
        self.watch.keep_again(state["kept_update"])
        self._recent.clear()
        self._troubles.clear()

    def _table_names(self) -> list[str]:
        names = getattr(self.model, "table_names", list)
        return list(names())

    def _losses_of(self, batch: Batch) -> Float[Tensor, " tasks"]:
        """Return the weighted losses of a batch, as training would meet them; nothing is counted or learned."""
        tasks = list(self.schema.tasks.values())
        here = batch.to(next(self.model.parameters()).device, non_blocking=True)
        with _evaluating(self.model):
            both = getattr(self.model, "forward_both", None)
            logits_BK = self.model(here) if both is None else both(here).training
        sums_K = None if here.share is None else here.share.weights
        losses_K = multitask_loss(logits_BK, here.labels, here.weights, tasks, sums_K=sums_K).parts
        losses_K = self.ranks.gather(losses_K.detach()).sum(0)
        return torch.stack([task.loss_weight * loss for task, loss in zip(tasks, losses_K.unbind(), strict=True)])

    def _find_due(self, alerts: list[Alert], changes: list[Change]) -> tuple[int, str] | None:
        """Return which step calls for a cause, and why; none where that was done often enough or just now."""
        alarms = [(a.step, a.reason) for a in alerts if a.level == "alarm"]
        began = [(c.since, f"{c.task}: {c.reason}") for c in changes if c.verdict == "suspected"]
        due = min(alarms + began, default=None)
        if due is None or len(self._explained) >= self.config.causes:
            return None
        return None if self._explained and due[0] - self._explained[-1] < _CAUSES_APART else due

    def _explain(self, since: int, why: str) -> None:
        """Find what stood behind a step with all that is remembered, and write it down; a collective."""
        self._explained.append(since)
        step, batch = next(((s, b) for s, b in self._recent if s >= since), self._recent[-1])
        model, earlier, watch = self.model, self._earlier(step), self.watch
        if self._engine is not None:
            batches = self._join(batch, min(since, step))
            borrowed = self._engine.borrow(batches)
            earlier = earlier and earlier._replace(state=gather_whole(earlier.state, self.ranks))
            if borrowed is None:
                return
            model, batch = borrowed, batches[0]
        steps_T, losses_TK, gradients_TP = watch.recent()
        with watch.paused():
            cause = find_cause(
                step,
                model,
                batch,
                self.schema,
                multitask_loss,
                self.reference,
                losses_TK=losses_TK[steps_T < step],
                trails=[Trail("gradient", watch.parameters, steps_T[steps_T <= step], gradients_TP[steps_T <= step])],
                earlier=earlier,
                since=since,
                why=why,
                look_up=lambda rows: show_rows(self.reader.source, rows),
            )
        self._write_down(cause)

    def _join(self, batch: Batch, began: int) -> list[Batch]:
        """Return on the first rank a whole batch, and the usual ones that it is compared with; a collective."""
        self.reference.join(self.ranks)
        parts = self.ranks.collect(batch)
        return [Batch.cat(parts), *self.reference.before(began)[-READ:]] if parts else []

    def _write_down(self, cause: Cause) -> None:
        try:
            path = self.folder.write_cause(cause.step, cause.as_dict())
        except CheckpointError as error:  # a full disk: the run matters more
            self.folder.event(cause.step, "cause", f"{cause.sentence}; its report was not written: {error}")
            return
        self.folder.event(
            cause.step,
            "cause",
            cause.sentence,
            file=f"{path.parent.name}/{path.name}",
            task=cause.task,
            layer=cause.layer.name if cause.layer else "",
            feature=cause.feature,
        )

    def _earlier(self, step: int) -> Earlier | None:
        """Return the dense weights of some steps earlier: those that are at least `snapshot_every` steps old."""
        old = [(then, state) for then, state in self._snapshots if step - then >= self.config.snapshot_every]
        return Earlier(step - old[-1][0], old[-1][1]) if old else None


def find_fields(model: nn.Module, schema: Schema) -> list[Field]:
    """Return where each embedding table lies in the weight matrix of its width."""
    names = dict(model.named_parameters())
    held = getattr(getattr(model, "tables", None), "rows", {})  # of tables that lie on several ranks
    if held:
        return [field for name, rows in held.items() for field in _fields_here(f"tables.{name}", rows)]
    found = []
    for table, slot in schema.tables.items():
        parameter = f"tables.weights.width_{slot.width}"
        if parameter in names:
            found.append(Field(table, parameter, slot.start, slot.rows))
    return found


def _fields_here(parameter: str, rows: Sequence[Rows]) -> Iterator[Field]:
    """Yield where each table lies in what this rank holds of the weight matrix; not those of which it holds nothing."""
    start = 0
    for each in rows:
        if each.count:
            yield Field(each.table, parameter, start, each.count, each.first)
        start += each.count


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)
