"""Embedding tables with sparse gradients: rows touched, how far they moved, and how many dimensions they use.

Nothing here depends on the number of rows but one int32 for each, which remembers when a watched batch first held it.

Shapes: N row indices of a batch (a row may come up repeatedly), R rows of a weight matrix, D width, F fields.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..errors import ConfigError
from .readings import Reading

SAMPLE = 256
"""Rows of a field whose effective rank is taken."""


class Field(NamedTuple):
    """A table within a weight matrix: rows `start` to `start + rows - 1` of the parameter called `parameter`."""

    name: str
    parameter: str
    start: int
    rows: int
    first: int = 0
    """Which row of its table comes first, where the rest lies elsewhere."""


class Tables:
    """What a step did to the rows of embedding tables that its batch holds.

    `before` goes right before the optimizer's step and keeps the batch's rows; `after` goes right after it.

    Of a field without a row in the batch all readings are NaN, but for 0 rows touched. A row that is not finite counts
    as infinitely long, and is so named. The age of a row is how many steps ago a watched batch first held it.

    Args:
        named_parameters: Names and parameters; those whose gradient is sparse are tables.
        fields: Tables within the parameters; a parameter that none names is one field as a whole, under its own name.

    Raises:
        ConfigError: The fields of a parameter do not follow one another from its first row to its last.

    >>> table = nn.Parameter(torch.ones(9, 2))
    >>> tables = Tables([("table", table)])
    >>> table.grad = torch.sparse_coo_tensor([[5, 2, 5]], torch.ones(3, 2), (9, 2), check_invariants=True)
    >>> tables.before()
    >>> torch.optim.SGD([table], lr=1.0).step()
    >>> {reading.area: reading.values.tolist() for reading in tables.after(step=20)}
    {'rows_touched': [2.0], 'row_update_max': [2.828...], 'row_norm_max': [1.414...], 'row_norm_max_row': [5.0],
     'row_norm_max_age_steps': [0.0]}
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], fields: Sequence[Field] = ()) -> None:
        self._named = list(named_parameters)
        self._fields = {
            name: sorted((f for f in fields if f.parameter == name), key=lambda f: f.start) for name, _ in self._named
        }
        for name, p in self._named:
            _check_fields(self._fields[name], len(p) if p.dim() else 0)
        self._starts: dict[str, Int64[Tensor, " fields"]] = {}
        self._firsts: dict[str, Int64[Tensor, " fields"]] = {}
        self._first: dict[str, Tensor] = {}
        self._before: list[tuple[str, nn.Parameter, Tensor, Tensor]] = []
        self._sample: dict[str, tuple[list[str], Tensor, Tensor]] = {}

    @torch.no_grad()
    def before(self) -> None:
        """Keep the rows of the batch as they are before the step."""
        self._before = []
        for name, p in self._named:
            if p.grad is not None and p.grad.is_sparse and p.grad._nnz() and p.dim() == 2:
                rows_N = p.grad._indices()[0].sort().values
                self._before.append((name, p, rows_N, p.detach()[rows_N]))

    @torch.no_grad()
    def after(self, step: int, rank: bool = False) -> list[Reading]:
        """Return what the step did.

        Args:
            step: Its number, for the age of rows.
            rank: Also keep a sample of rows for `read_rank`, in place of an earlier one.
        """
        held, self._before = self._before, []
        return [reading for each in held for reading in self._read(*each, step, rank)]

    def _read(
        self, name: str, p: nn.Parameter, rows_N: Tensor, before_ND: Tensor, step: int, rank: bool
    ) -> list[Reading]:
        fields = self._fields[name] or [Field(name, name, 0, p.shape[0])]
        if name not in self._starts:
            self._starts[name] = torch.tensor([f.start for f in fields]).to(p.device, non_blocking=True)
            self._firsts[name] = torch.tensor([f.first for f in fields]).to(p.device, non_blocking=True)
        if name not in self._first:
            self._first[name] = torch.full((p.shape[0],), -1, dtype=torch.int32, device=p.device)
        # rows_N is sorted, so a field is a stretch of it: its ends are all that is looked up.
        starts_F = self._starts[name]
        field_N = (torch.searchsorted(starts_F, rows_N, right=True) - 1).clamp(min=0)
        first, after_ND = self._first[name], p.detach()[rows_N]
        seen_N = first[rows_N]
        first[rows_N] = torch.where(seen_N < 0, step, seen_N)
        moved_N, norm_N = _row_norms(before_ND - after_ND), _row_norms(after_ND)
        new_N = torch.ones_like(moved_N)
        new_N[1:] = (rows_N[1:] != rows_N[:-1]).float()

        def most(values_N: Tensor) -> Tensor:
            empty = values_N.new_full((len(fields),), -torch.inf)
            return empty.scatter_reduce(0, field_N, values_N, "amax")

        touched_F = new_N.new_zeros(len(fields)).scatter_add(0, field_N, new_N)
        norm_F = most(norm_N)
        row_F = most(torch.where(norm_N == norm_F[field_N], rows_N.double(), -1.0)).clamp(min=0)  # the last of equals
        age_F = step - first[row_F.long()].float()
        none_F = touched_F == 0
        if rank:
            self._sample[name] = _sample_rows([f.name for f in fields], after_ND, field_N)
        by_area = {
            "rows_touched": touched_F,
            "row_update_max": most(moved_N),
            "row_norm_max": norm_F,
            "row_norm_max_row": row_F - starts_F + self._firsts[name],
            "row_norm_max_age_steps": age_F,
        }
        names = [f.name for f in fields]
        return [
            Reading(area, names, v if area == "rows_touched" else torch.where(none_F, torch.nan, v))
            for area, v in by_area.items()
        ]

    @torch.no_grad()
    def read_rank(self) -> list[Reading]:
        """Return `effective_rank` of the samples that were kept; on a GPU this may wait, so it belongs to a flush."""
        held, self._sample = self._sample, {}
        found = []
        for names, rows_FSD, some_F in held.values():
            ranks = torch.stack([effective_rank(rows_SD) for rows_SD in rows_FSD])
            found.append(Reading("effective_rank", names, torch.where(some_F, ranks, torch.nan)))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return when each row was first seen."""
        return {"first": dict(self._first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        parameters = dict(self._named)
        self._first = {name: first.to(parameters[name].device) for name, first in state["first"].items()}


def whole_rows(parameter: Tensor, rows_N: Int64[Tensor, " touched"]) -> Int64[Tensor, " touched"]:
    """Return the numbers that rows have in the whole weight matrix, of which other ranks may hold a part.

    >>> part = nn.Parameter(torch.ones(3, 2))
    >>> part.sharded_rows = torch.tensor([[2, 3], [0, 4]])  # two rows from 0 on, and one from 2 + 4 on
    >>> whole_rows(part, torch.tensor([1, 2]))
    tensor([1, 6])
    """
    if not hasattr(parameter, "sharded_rows"):
        return rows_N
    ends, shifts = parameter.sharded_rows
    whole_N: Tensor = rows_N + shifts[torch.searchsorted(ends, rows_N, right=True)]
    return whole_N


def rows_here(
    parameter: Tensor, rows_N: Int64[Tensor, " rows"]
) -> tuple[Int64[Tensor, " here"], Bool[Tensor, " rows"]]:
    """Return the numbers that rows of the whole weight matrix have here, and which of them are held here.

    >>> part = nn.Parameter(torch.ones(3, 2))
    >>> part.sharded_rows = torch.tensor([[2, 3], [0, 4]])
    >>> rows_here(part, torch.tensor([1, 2, 6]))
    (tensor([1, 2]), tensor([ True, False,  True]))
    """
    if not hasattr(parameter, "sharded_rows"):
        return rows_N, torch.ones_like(rows_N, dtype=torch.bool)
    ends, shifts = parameter.sharded_rows
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    piece_N = (torch.searchsorted(begins + shifts, rows_N, right=True) - 1).clamp(min=0)
    place_N = rows_N - shifts[piece_N]
    here_N = (begins[piece_N] <= place_N) & (place_N < ends[piece_N])
    return place_N[here_N], here_N


def _check_fields(fields: Sequence[Field], rows: int) -> None:
    end = 0
    for field in fields:
        if field.start != end:
            raise ConfigError(
                f"{field.parameter}: expected a field that starts at row {end}, found {field.name} at {field.start}; "
                "fields follow one another, so name what lies between them too"
            )
        end += field.rows
    if fields and end != rows:
        raise ConfigError(f"{fields[0].parameter} has {rows} rows, and its fields have {end}; name all of them")


def _sample_rows(names: list[str], after_ND: Tensor, field_N: Tensor) -> tuple[list[str], Tensor, Tensor]:
    """Return rows of each field, evenly over the batch's sorted rows; nothing waits for how many there are."""
    ends_F = torch.searchsorted(field_N, torch.arange(len(names), device=field_N.device), right=True)
    begins_F = torch.cat([ends_F.new_zeros(1), ends_F[:-1]])
    count_F = ends_F - begins_F
    steps_S = torch.arange(SAMPLE, device=field_N.device)
    at_FS = begins_F[:, None] + steps_S * count_F[:, None] // SAMPLE
    return names, after_ND[at_FS.clamp(max=len(field_N) - 1)], count_F > 0


def effective_rank(rows_SD: Float[Tensor, "rows width"]) -> Float[Tensor, ""]:
    """Return exp of the entropy of the singular values, scaled to sum to 1: 1 for a line, D for a ball.

        erank = exp(- sum_i p_i log p_i),    p_i = s_i / sum_j s_j

    NaN where a row is not finite, or all are zero.

    >>> effective_rank(torch.eye(4)), effective_rank(torch.ones(4, 3))
    (tensor(4...), tensor(1...))

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    finite = rows_SD.isfinite().all()
    s = torch.linalg.svdvals(torch.where(finite, rows_SD, 0.0).float())
    entropy = torch.special.entr(s / s.sum()).sum()
    return torch.where(finite, entropy.exp(), torch.nan)


def _row_norms(x_ND: Tensor) -> Float[Tensor, " rows"]:
    norm_N: Tensor = torch.linalg.vector_norm(x_ND.float(), dim=1)
    return norm_N.nan_to_num(nan=torch.inf, posinf=torch.inf)  # what is NaN equals nothing: no row would be found
