"""The baselines that a model has to beat: running means of the labels, by the ids of a feature and over all rows.

On several ranks each holds every N-th row of a feature's means. What a rank's rows of a step have of one id is added up
and sent to the rank that holds it, once a step, and its mean comes back.

Shapes: B rows of a batch, S steps, K tasks, F features, R rows of a feature's table, U pairs of a step and an id, C
those that came.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from .errors import CheckpointError, ConfigError, check_known
from .metrics import Metrics
from .ranks import ALONE, Ranks
from .schema import Batch, Schema

GLOBAL = "global"
"""Name of the baseline that knows no feature: the running mean of each label over all rows."""


@dataclass(frozen=True)
class Labelled:
    """Rows of a step, as the baselines meet them."""

    rows_BF: Int64[Tensor, "batch features"]
    """Row in each feature's own table."""
    labels_BK: Float[Tensor, "batch tasks"]
    weights_BK: Float[Tensor, "batch tasks"]
    """0 where masked."""

    @cached_property
    def sums(self) -> Any:
        """The labels of each row times their weights, beside these, in float64."""
        weights_BK, labels_BK = self.weights_BK.numpy(), self.labels_BK.numpy()
        kept_BK = weights_BK > 0
        counts_BK = np.where(kept_BK, weights_BK, 0).astype(np.float64)
        sums_BK = np.multiply(counts_BK, labels_BK, where=kept_BK, out=np.zeros_like(counts_BK))
        return np.concatenate([sums_BK, counts_BK], axis=1)


class RunningMean:
    """Each id's running mean label, shrunk towards that of all rows.

    `m_r = (sum_r w y + prior * m) / (sum_r w + prior)`, over the rows learned so far whose id is r; `m` is the same
    over all rows, with one pseudo-row of 1/2 (binary) or 0 (regression), so that it is defined from the start.
    Memory is one float64 table [R, 2 K] for each feature, sums beside weights: 16 R K bytes, over all ranks.

    Args:
        schema: of the batches.
        features: id features that each give a baseline; `schema.baseline` when left out.
        prior: pseudo-rows, above 0: an id seen in as many rows is trusted as much as the mean of all. The best value is
            the variance of a label given its id over the variance of the ids' means, about 9 for rates of 0.3 that
            spread by 0.15 and about 50 for rates of 0.05 that spread by 0.03; the default lies between.
        ranks: who has rows; `meet` is then a collective.

    Raises:
        ConfigError: a feature is not a one-valued id feature, is called "global", or the prior is not positive.
    """

    def __init__(
        self, schema: Schema, features: Sequence[str] | None = None, prior: float = 20.0, ranks: Ranks = ALONE
    ) -> None:
        if not prior > 0:
            raise ConfigError(f"expected a prior above 0 pseudo-rows, got {prior}; 20 is the default")
        self._columns: dict[str, tuple[int, int]] = {}
        for name in schema.baseline if features is None else features:
            check_known(name, schema.id_features, "id feature")
            if name == GLOBAL:
                raise ConfigError(f"baseline: '{GLOBAL}' names the mean of all rows; rename that feature")
            self._columns[name] = (list(schema.id_features).index(name), schema.slot(name).start)
        self._prior, self._ranks = prior, ranks
        self._binary_K = torch.tensor([task.kind == "binary" for task in schema.tasks.values()])
        self._pseudo_K = 0.5 * self._binary_K.double().numpy()
        self._rows = {name: schema.slot(name).rows for name in self._columns}
        held = {name: len(range(ranks.rank, rows, ranks.size)) for name, rows in self._rows.items()}
        # NumPy's, since half of what so few numbers take is the overhead of a call, and torch has four times as much.
        self._tables = {name: np.zeros((count, 2 * len(schema.tasks))) for name, count in ({GLOBAL: 1} | held).items()}

    def labelled(self, batch: Batch) -> Labelled:
        """Return what the baselines need of a batch."""
        columns = [batch.ids[:, column] - start for column, start in self._columns.values()]
        return Labelled(torch.stack(columns, 1) if columns else batch.ids[:, :0], batch.labels, batch.weights)

    def score(self, step: Labelled) -> dict[str, Float[Tensor, "batch tasks"]]:
        """Return the scores of each feature's means and of the `"global"` one, from the rows learned before.

        Binary tasks as logits of the mean (kept 1e-7 away from 0 and 1), regressions as the mean. In one process.
        """
        mean_K = self._mean()
        scores = {GLOBAL: self._as_scores(mean_K[None]).expand(len(step.labels_BK), -1)}
        for name, rows_B in zip(self._columns, step.rows_BF.numpy().T, strict=True):
            scores[name] = self._look_up(name, rows_B, mean_K)
        return scores

    def learn(self, step: Labelled) -> None:
        """Add labels to the means. In one process."""
        self._tables[GLOBAL] += step.sums.sum(0)
        for name, rows_B in zip(self._columns, step.rows_BF.numpy().T, strict=True):
            _add_at(self._tables[name], rows_B, step.sums)

    def meet(
        self, steps: Sequence[Labelled], sums_S2K: Float64[np.ndarray, "steps _"]
    ) -> list[dict[str, Float[Tensor, "batch tasks"]]]:
        """Score the rows of each step, as `score` does, and then learn them. A collective.

        Args:
            steps: This rank's rows, one step after the other.
            sums_S2K: `Labelled.sums`, summed over the whole batch of each step.
        """
        found = []
        if self._ranks.is_alone:
            for step in steps:
                found.append(self.score(step))
                self.learn(step)
            return found
        means_SK = []
        for step, sums_2K in zip(steps, sums_S2K, strict=True):
            means_SK.append(self._mean())
            found.append({GLOBAL: self._as_scores(means_SK[-1][None]).expand(len(step.labels_BK), -1)})
            self._tables[GLOBAL] += sums_2K
        for f, name in enumerate(self._columns):
            scores_NK = self._ask(f, name, steps, np.array(means_SK))
            lengths = [len(step.labels_BK) for step in steps]
            for scores, each_BK in zip(found, scores_NK.split(lengths), strict=True):
                scores[name] = each_BK
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and the weights of every baseline, `{name: [R, 2 K]}`; on several ranks this one's rows."""
        return {name: torch.from_numpy(table_R2K.copy()) for name, table_R2K in self._tables.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            CheckpointError: the state has other features, tables or tasks.
        """
        expected, found = ({n: tuple(t.shape) for n, t in tables.items()} for tables in (self._tables, state))
        if found != expected:
            raise CheckpointError(
                f"expected running means of {expected} (name: rows, twice the tasks), found {found}; resume with the "
                f"schema that the run was started with"
            )
        for name, table_R2K in self._tables.items():
            table_R2K[:] = state[name].numpy()

    def _mean(self) -> Any:
        """Return the mean of all rows learned so far [K]."""
        tasks = len(self._pseudo_K)
        (global_2K,) = self._tables[GLOBAL]
        return (global_2K[:tasks] + self._pseudo_K) / (global_2K[tasks:] + 1)

    def _look_up(self, name: str, rows_B: Any, mean_K: Any) -> Tensor:
        tasks = len(mean_K)
        known_B2K = self._tables[name].take(rows_B, axis=0)
        mean_BK = (known_B2K[:, :tasks] + self._prior * mean_K) / (known_B2K[:, tasks:] + self._prior)
        return self._as_scores(mean_BK)

    def _ask(self, f: int, name: str, steps: Sequence[Labelled], means_SK: Any) -> Tensor:
        """Return the scores of all rows of the steps by one feature's means, wherever these are held."""
        step_N = np.repeat(np.arange(len(steps)), [len(step.labels_BK) for step in steps])
        row_N = np.concatenate([step.rows_BF[:, f].numpy() for step in steps])
        sums_N2K = np.concatenate([step.sums for step in steps])
        pair_U, pair_N = np.unique(step_N * self._rows[name] + row_N, return_inverse=True)
        sums_U2K = np.zeros((len(pair_U), sums_N2K.shape[1]))
        _add_at(sums_U2K, pair_N, sums_N2K)
        step_U, row_U = (torch.from_numpy(part) for part in np.divmod(pair_U, self._rows[name]))

        def answer(came: list[Tensor]) -> Tensor:
            """Score and learn step by step, of all ranks' rows alike."""
            (step_C, row_C), sums_C2K = came[0].unbind(1), came[1]
            found = torch.empty(len(step_C), means_SK.shape[1])
            counts = step_C.bincount(minlength=len(steps)).tolist()
            for here, mean_K in zip(step_C.argsort(stable=True).split(counts), means_SK, strict=True):
                rows_B = row_C[here].numpy() // self._ranks.size
                found[here] = self._look_up(name, rows_B, mean_K)
                _add_at(self._tables[name], rows_B, sums_C2K[here].numpy())
            return found

        columns = [torch.stack([step_U, row_U], 1), torch.from_numpy(sums_U2K)]
        scores_UK = self._ranks.ask(columns, row_U % self._ranks.size, answer)
        return scores_UK[torch.from_numpy(pair_N)]

    def _as_scores(self, mean: Any) -> Float[Tensor, "batch tasks"]:
        mean_BK = torch.from_numpy(mean)
        return torch.where(self._binary_K, torch.logit(mean_BK, eps=1e-7), mean_BK).float()


def _add_at(table_R2K: Any, rows_B: Any, sums_B2K: Any) -> None:
    # Flat, since NumPy adds the rows of a matrix one by one but the elements of a vector in one loop.
    cell_B2K = rows_B[:, None] * table_R2K.shape[1] + np.arange(table_R2K.shape[1])
    np.add.at(table_R2K.reshape(-1), cell_B2K.reshape(-1), sums_B2K.reshape(-1))


def deal_means(states: Sequence[Mapping[str, Tensor]], size: int) -> list[dict[str, Tensor]]:
    """Return what each of `size` ranks goes on from, of the states of `RunningMean` on another number of them."""
    whole = {}
    for name in states[0]:
        parts = [state[name] for state in states]
        whole[name] = parts[0]
        if name != GLOBAL:
            whole[name] = parts[0].new_empty(sum(len(part) for part in parts), parts[0].shape[1])
            for rank, part in enumerate(parts):
                whole[name][rank :: len(parts)] = part
    return [{name: x if name == GLOBAL else x[rank::size].clone() for name, x in whole.items()} for rank in range(size)]


def best(baselines: Mapping[str, Metrics]) -> dict[str, str]:
    """Return the name of the best baseline for each task: highest AUC if binary, lowest RMSE if a regression.

    A NaN never wins against a number; of equals the first named does.

    >>> best({"user": {"click": {"auc": 0.6}}, "item": {"click": {"auc": 0.7}}})
    {'click': 'item'}
    """
    found: dict[str, str] = {}
    for task in next(iter(baselines.values()), {}):
        values = {name: _goodness(metrics[task]) for name, metrics in baselines.items()}
        found[task] = max(values, key=lambda name: values[name])
    return found


def _goodness(values: Mapping[str, float]) -> float:
    value = values["auc"] if "auc" in values else -values["rmse"]
    return value if value == value else -float("inf")
