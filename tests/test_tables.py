"""Embedding tables against numpy, over random sparse gradients with duplicates."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steadyrank import ClippyAdagrad, ConfigError, RowWiseAdagrad
from steadyrank.monitors.readings import fetch
from steadyrank.monitors.tables import SAMPLE, Field, Tables, effective_rank
from steadyrank.testing import forbid_host_sync

FIELDS = [Field("item", "t", 10, 15), Field("user", "t", 0, 10), Field("rare", "t", 25, 5), Field("one", "t", 30, 1)]
ROWS, WIDTH = 31, 3


def make_table(seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)))


def give_gradient(table: nn.Parameter, rows: list[int], seed: int) -> None:
    values = torch.randn(len(rows), table.shape[1], generator=torch.Generator().manual_seed(seed))
    table.grad = torch.sparse_coo_tensor(torch.tensor([rows]), values, table.shape, check_invariants=True)


def effective_rank_twin(rows: np.ndarray) -> float:
    s = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    p = s / s.sum()
    return float(np.exp(-sum(x * np.log(x) for x in p if x > 0)))


def sample(rows: np.ndarray) -> np.ndarray:
    """Return the rows whose rank is taken: evenly over the batch's sorted rows, duplicates included."""
    return np.sort(rows)[np.arange(SAMPLE) * len(rows) // SAMPLE]


def twin(
    fields: list[Field], rows: np.ndarray, before: np.ndarray, after: np.ndarray, met: dict[int, int], step: int
) -> dict[str, float]:
    found: dict[str, float] = {}
    for field in fields:
        touched = np.unique(rows[(rows >= field.start) & (rows < field.start + field.rows)])
        found[f"rows_touched/{field.name}"] = len(touched)
        values = [math.nan] * 5
        if len(touched):
            norms = np.linalg.norm(after[touched].astype(np.float64), axis=1)
            moved = np.linalg.norm(before[touched].astype(np.float64) - after[touched], axis=1)
            worst = int(touched[norms.argmax()])
            rank = effective_rank_twin(after[sample(rows[np.isin(rows, touched)])])
            values = [moved.max(), norms.max(), worst - field.start, step - met[worst], rank]
        areas = ("row_update_max", "row_norm_max", "row_norm_max_row", "row_norm_max_age_steps", "effective_rank")
        found |= {f"{area}/{field.name}": value for area, value in zip(areas, values, strict=True)}
    return found


def look(tables: Tables, table: nn.Parameter, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
    with forbid_host_sync():
        tables.before()
    optimizer.step()
    with forbid_host_sync():
        found = tables.after(step, rank=True)
    return fetch(found) | fetch(tables.read_rank())


@given(batches=st.lists(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=40), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_every_reading_is_that_of_the_twin(batches: list[list[int]]) -> None:
    table = make_table()
    tables, optimizer = Tables([("t", table)], FIELDS), RowWiseAdagrad([table], lr=0.5)
    met: dict[int, int] = {}
    for i, rows in enumerate(batches):
        step = 50 * (i + 1)
        give_gradient(table, rows, seed=i)
        before = table.detach().numpy().copy()
        for row in rows:
            met.setdefault(row, step)
        found = look(tables, table, optimizer, step)
        expected = twin(FIELDS, np.array(rows), before, table.detach().numpy(), met, step)
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-6, nan_ok=True)


def test_a_table_that_no_field_names_is_one_under_its_own_name() -> None:
    table = make_table()
    tables = Tables([("emb.weight", table)], FIELDS)
    give_gradient(table, [4, 29, 4], seed=0)
    found = look(tables, table, torch.optim.SGD([table], lr=0.1), 10)
    assert found["rows_touched/emb.weight"] == 2
    assert {name.split("/")[1] for name in found} == {"emb.weight"}


def test_only_sparse_gradients_of_matrices_are_read() -> None:
    table, dense, vector = make_table(), nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))
    empty = nn.Parameter(torch.ones(4, 2))
    tables = Tables([("t", table), ("dense", dense), ("vector", vector), ("empty", empty)])
    dense.grad = torch.ones(3, 2)
    vector.grad = torch.sparse_coo_tensor([[1]], [1.0], (4,), check_invariants=True)
    nothing = torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 2)
    empty.grad = torch.sparse_coo_tensor(*nothing, (4, 2), check_invariants=True)
    tables.before()
    assert tables.after(1) == tables.read_rank() == []
    assert tables.state_dict() == {"first": {}}


def test_ages_go_on_where_they_were_saved() -> None:
    def run(stop: int | None) -> list[str]:
        table = make_table()
        optimizer = torch.optim.SGD([table], lr=0.1)
        tables, found = Tables([("t", table)], FIELDS), []
        for i in range(8):
            if i == stop:
                state, tables = tables.state_dict(), Tables([("t", table)], FIELDS)
                tables.load_state_dict(state)
            give_gradient(table, [(7 * i) % ROWS, 12, 3 + i], seed=i)
            found.append(repr(look(tables, table, optimizer, 10 * i)))
        return found

    straight = run(None)
    for stop in range(8):
        assert run(stop) == straight


def test_a_row_that_is_lost_is_named_and_does_not_hide_the_others() -> None:
    table = make_table()
    with torch.no_grad():
        table[12, 1] = math.nan
        table[3] = 7.0
    tables = Tables([("t", table)], FIELDS)
    give_gradient(table, [12, 14, 3, 5], seed=0)
    found = look(tables, table, torch.optim.SGD([table], lr=0.1), 10)
    assert found["row_norm_max/item"] == found["row_update_max/item"] == math.inf
    assert found["row_norm_max_row/item"] == 2
    assert math.isnan(found["effective_rank/item"])
    assert found["row_norm_max_row/user"] == 3
    assert math.isfinite(found["effective_rank/user"])
    give_gradient(table, [14], seed=1)
    assert math.isfinite(look(tables, table, torch.optim.SGD([table], lr=0.1), 20)["row_norm_max/item"])


def test_a_refused_gradient_moves_no_row() -> None:
    table = make_table()
    optimizer = ClippyAdagrad([("t", table)], lr=0.5)
    tables = Tables([("t", table)])
    give_gradient(table, [3, 5], seed=0)
    table.grad._values()[0, 0] = math.nan
    tables.before()
    optimizer.step()
    found = fetch(tables.after(10))
    assert found["row_update_max/t"] == 0
    assert found["row_norm_max/t"] > 0


def test_fields_that_leave_rows_out_or_overlap_are_refused() -> None:
    table = make_table()
    with pytest.raises(ConfigError, match="expected a field that starts at row 10, found item at 12"):
        Tables([("t", table)], [Field("user", "t", 0, 10), Field("item", "t", 12, 19)])
    with pytest.raises(ConfigError, match="t has 31 rows, and its fields have 30; name all of them"):
        Tables([("t", table)], [Field("user", "t", 0, 10), Field("item", "t", 10, 20)])


@pytest.mark.parametrize("shape", [(40, 6), (4, 6), (300, 1), (1, 5)])
def test_effective_rank_is_that_of_numpys_singular_values(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 10.0 ** -np.arange(shape[1])
    found = effective_rank(torch.from_numpy(rows.astype(np.float32)))
    assert found.item() == pytest.approx(effective_rank_twin(rows), rel=1e-4)
    assert 1 - 1e-6 <= found <= min(shape)


def test_effective_rank_of_nothing_is_nan() -> None:
    assert effective_rank(torch.zeros(3, 2)).isnan()
    assert effective_rank(torch.tensor([[1.0, math.nan], [0.0, 1.0]])).isnan()
    assert effective_rank(torch.tensor([[1.0, math.inf], [0.0, 1.0]])).isnan()
    assert effective_rank(torch.eye(3).bfloat16()) == pytest.approx(3.0)
