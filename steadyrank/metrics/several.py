"""AUC over rows that lie on several ranks: exactly that of all rows together, not a mean of means.

Every column of scores is brought to one rank, the columns dealt out over all: as rows where they are still kept, which
are `capacity` rows at most, and as the bins that they were folded into where they are not.

Shapes: N rows kept, C columns, F bins that are not empty.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ranks import Ranks
from .functions import BINS, add_to_bins, auc, auc_of_bins


class Column(NamedTuple):
    """The scores of one task: those kept as they are, and those folded."""

    scores_N: Any
    labels_N: Any
    weights_N: Any
    bins: Any | None
    """Weights of both classes [2, BINS]; None before the first fold, which is at the same row on all ranks."""

    def auc(self) -> float:
        """Return the AUC of what lies here."""
        if self.bins is None:
            return auc(self.scores_N, self.labels_N, self.weights_N)
        return auc_of_bins(self._folded())

    def _folded(self) -> Any:
        assert self.bins is not None
        bins = self.bins.copy()
        add_to_bins(bins, self.scores_N, self.labels_N, self.weights_N)
        return bins

    def packed(self) -> Tensor:
        """Return what another rank needs of it: rows that are not masked [N, 3], or filled bins [F, 3]."""
        if self.bins is None:
            kept = self.weights_N > 0
            return torch.from_numpy(np.stack([part[kept] for part in self[:3]], axis=1))
        bins = self._folded()
        filled = np.flatnonzero((bins != 0).any(axis=0))  # a NaN is not 0
        return torch.from_numpy(np.stack([filled.astype(np.float64), *bins[:, filled]], axis=1))


def aucs(columns: Sequence[Column], ranks: Ranks) -> list[float]:
    """Return the AUC of each column, over the rows of all ranks. A collective."""
    if ranks.is_alone:
        return [column.auc() for column in columns]
    found_C = torch.full((len(columns),), torch.nan, dtype=torch.float64)
    for folded in (False, True):
        chosen = [c for c, column in enumerate(columns) if (column.bins is not None) == folded]
        if not chosen:  # on no rank, since they fold at the same rows
            continue
        owners = [i % ranks.size for i in range(len(chosen))]
        here = [columns[c].packed() for c in chosen]
        mine = [c for c, owner in zip(chosen, owners, strict=True) if owner == ranks.rank]
        for c, part_R3 in zip(mine, _deal(ranks, here, owners), strict=True):
            found_C[c] = _auc_of_bins(part_R3) if folded else auc(*part_R3.numpy().T.copy())
        by_rank = ranks.gather(found_C)
        for c, owner in zip(chosen, owners, strict=True):
            found_C[c] = by_rank[owner, c]
    return found_C.tolist()


def _deal(ranks: Ranks, parts: Sequence[Tensor], owners: Sequence[int]) -> list[Tensor]:
    """Send each part, of as many rows as it has here, to its owner; return this rank's own, whole."""
    lengths_RC = ranks.gather(torch.tensor([len(part) for part in parts]))
    order = sorted(range(len(parts)), key=lambda i: owners[i])
    mine = [i for i in order if owners[i] == ranks.rank]
    send = [sum(len(parts[i]) for i in order if owners[i] == rank) for rank in range(ranks.size)]
    received_RC = lengths_RC[:, mine]
    came = ranks.swap(torch.cat([parts[i] for i in order]), send, received_RC.sum(1).tolist())
    pieces = came.split(received_RC.reshape(-1).tolist())
    return [torch.cat(pieces[i :: len(mine)]) for i in range(len(mine))]  # rank by rank, each with one of every part


def _auc_of_bins(part_F3: Tensor) -> float:
    bins = np.zeros((2, BINS))
    place, *sides = part_F3.numpy().T
    for side_N, side in zip(bins, sides, strict=True):
        np.add.at(side_N, place.astype(np.int64), side)
    return auc_of_bins(bins)
