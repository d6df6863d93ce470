"""What a run keeps at hand to survive: the ladder, the damper, snapshots, and the data it leaves out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checkpoints import Checkpoints
from .errors import CheckpointError
from .ranks import ALONE, Ranks
from .recovery import Action, Damper, Ladder, RecoveryConfig, Trouble
from .snapshots import SnapshotRing

_WINDOWS = 1000
"""Windows of the log that are remembered: far more than lie between a trouble and what comes before it."""


class Rescue:
    """The recovery's own state: what was tried stays tried, also where training goes back.

    Args:
        config: When to do what.
        optimizers: What is damped.
        tasks: Names of the tasks.
        device: Of the model.
        kept: The checkpoints on disk.
        warmup_steps: Steps over which the learning rates rise.
        ranks: Who trains together: they are asked together, and the first decides.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        optimizers: Mapping[str, Optimizer],
        tasks: Sequence[str],
        device: torch.device,
        kept: Checkpoints,
        warmup_steps: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.mode, self.kept, self._ranks = config, config.mode, kept, ranks
        self.ladder = Ladder(config)
        self.damper = Damper(config.damp, optimizers, tasks, device, warmup_steps)
        self.ring = SnapshotRing(int(config.snapshot_budget_mb * 1e6), ranks)
        self.left_out: list[list[int]] = []
        """Windows of the log that are left out: the first of each stretch, and the one after its last."""
        self.rows_skipped = 0
        self._counted: dict[int, int] = {}  # of each window that is left out, its batches whose rows are counted
        self._windows: list[list[int]] = []
        self.returned_at = -1
        """The step at which training went back last: the state of that step is an earlier one."""
        self._counts: dict[str, int] = {}

    @property
    def scales_K(self) -> Tensor | None:  # noqa: N802 - a shape suffix
        """By how much each task is damped; None where nothing ever is."""
        return self.damper.scales_K if self.mode == "on" else None

    def takes(self, trigger: str) -> bool:
        """Say whether such a trouble is answered here."""
        return self.mode == "on" and trigger in self.config.triggers

    def decide(
        self,
        step: int,
        troubles: list[Trouble],
        suspected: Mapping[str, int],
        can_go_back: Callable[[int], bool],
    ) -> Action | None:
        """Return what is to be done now, if anything."""
        if self.mode == "off":
            return None
        action = self._ranks.on_first(lambda: self.ladder.decide(step, troubles, suspected, can_go_back))
        if action is not None and self.mode == "on":
            self._counts[action.rung] = self._counts.get(action.rung, 0) + 1
        return action

    def note_window(self, step: int, window: int) -> None:
        """Note in which window of the log a step lies."""
        if not self._windows or self._windows[-1][1] != window:
            self._windows = [*self._windows[1 - _WINDOWS :], [step, window]]

    def leave_out(self, since: int, last: int, windows: int) -> None:
        """Leave out the data of a trouble, from the window of its first step on.

        Args:
            since: That step.
            last: The window in which the trouble was seen.
            windows: How many more than up to its end, and 1.
        """
        first = next((window for step, window in reversed(self._windows) if step <= since), last)
        self.left_out = [*self.left_out[-_WINDOWS:], [min(first, last), last + windows]]

    def leaves_out(self, window: int, batch: int, rows: int) -> bool:
        """Say whether a batch of the log is left out; its rows are counted once."""
        if not any(first <= window < end for first, end in self.left_out):
            return False
        if batch > self._counted.get(window, 0):
            self._counted[window], self.rows_skipped = batch, self.rows_skipped + rows
        return True

    def is_due(self, step: int) -> bool:
        """Say whether a snapshot is."""
        return self.mode == "on" and step - max(self.ring.steps, default=0) >= self.config.snapshot_every

    def can_go_back(self, since: int) -> bool:
        """Say whether there is a state from well before step `since`."""
        before = self._before(since)
        return any(step < before for step in self.ring.steps) or bool(self._on_disk(before))

    def find_earlier(
        self, since: int, say: Callable[[str], None], rows: Mapping[str, tuple[int, int]] | None = None
    ) -> tuple[int, Any]:
        """Return the newest state from well before step `since`, and its step.

        Args:
            since: The first step of the trouble.
            say: Gets what is wrong with others.
            rows: Of sharded tables, which are held here: as `Checkpoints.load` takes them.

        Raises:
            CheckpointError: There is none.
        """
        before = self._before(since)
        found = self.ring.newest_before(before)
        if found is None:
            wanted = self._ranks.on_first(lambda: self._on_disk(before))
            found = self.kept.load_newest(say, lambda step, _: step in wanted, rows=rows, ranks=self._ranks)
        if found is None:
            raise CheckpointError(f"{self.kept.path}: no whole checkpoint from before step {before} to return to")
        return found

    def _before(self, since: int) -> int:
        """Return the step before which a state will do; that to which the run went back last always does."""
        return max(since - self.config.margin_steps, self.returned_at + 1)

    def _on_disk(self, before: int) -> list[int]:
        """Return the healthy checkpoints from before a step, of those that a resumed run has too."""
        facts = {step: self.kept.facts(step) for step in self.kept.steps() if step < before}
        return [step for step, of in facts.items() if of.get("kind") == "regular" and of.get("healthy")]

    def ring_state(self) -> list[Any]:
        """Return the snapshots, for a checkpoint that must leave no trace."""
        held = [self.ring.newest_before(step + 1) for step in self.ring.steps]
        return [list(found) for found in held if found]

    def load_ring(self, held: Sequence[Any]) -> None:
        """Take up what `ring_state` gave."""
        self.ring.clear()
        for step, state in held:
            self.ring.add(step, state)

    def summary(self) -> dict[str, Any]:
        """Return what was done in the whole run."""
        return {"mode": self.mode, "actions": dict(self._counts), "rows_skipped": self.rows_skipped}

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, but for the snapshots."""
        return {
            "ladder": self.ladder.state_dict(),
            "damper": self.damper.state_dict(),
            "left_out": [list(stretch) for stretch in self.left_out],
            "rows_skipped": self.rows_skipped,
            "counted": dict(list(self._counted.items())[-_WINDOWS:]),
            "windows": [list(begun) for begun in self._windows],
            "returned_at": self.returned_at,
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.ladder.load_state_dict(state["ladder"])
        self.damper.load_state_dict(state["damper"])
        self.left_out = [list(stretch) for stretch in state["left_out"]]
        self.rows_skipped, self._counted = state["rows_skipped"], dict(state["counted"])
        self._windows = [list(begun) for begun in state["windows"]]
        self.returned_at, self._counts = state["returned_at"], dict(state["counts"])
