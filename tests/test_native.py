"""The C code for rows of tables, against torch and float64."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steadyrank import native
from steadyrank.models.embeddings import LookUp
from steadyrank.native import rows
from steadyrank.optim import RowWiseAdagrad

HAS_C = native.available()
both_ways = pytest.mark.parametrize(
    "c", [pytest.param(True, marks=pytest.mark.skipif(not HAS_C, reason="no compiler")), False]
)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def with_c(c: bool, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Use the C code, or do as if there were no compiler."""
    if not c:
        monkeypatch.setattr(rows, "available", lambda: False)
    return c


def draw(seed: int, n: int, table_rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a table, ids of which many come up often, and a value for each."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(n, generator=generator) ** 3 * table_rows).long()
    return torch.randn(table_rows, width, generator=generator), ids, torch.randn(n, width, generator=generator)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "width"), [(0, 4), (1, 1), (37, 3), (5_000, 16), (3_000, 40)])
def test_gathers_what_indexing_does(with_c: bool, n: int, width: int, dtype: torch.dtype) -> None:
    table, ids, _ = draw(0, n, 1_000, width)
    table[0, 0], table[1, 0], table[2, 0] = math.nan, math.inf, 1e-42
    ids = torch.cat([ids, torch.tensor([0, 1, 2, 999])])
    assert torch.equal(rows.gather(table, ids, dtype).isnan(), table[ids].isnan())
    torch.testing.assert_close(rows.gather(table, ids, dtype), table[ids].to(dtype), rtol=0, atol=0, equal_nan=True)


@both_ways
def test_rounds_to_bfloat16_as_torch_does(with_c: bool) -> None:
    bits = torch.arange(-(2**31), 2**31, 65_521).to(torch.int32)  # every exponent, and ties among them
    ties = (torch.arange(0, 2**16) * 2**16 + 2**15 - 2**31).to(torch.int32)
    table = torch.cat([bits, ties]).view(torch.float32)[:, None]
    found = rows.gather(table, torch.arange(len(table)), torch.bfloat16)
    expected = table.to(torch.bfloat16)
    numbers = ~expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@both_ways
@pytest.mark.parametrize("ids", [[-1], [0, 3], [2**40]])
def test_a_row_outside_of_the_table_is_refused(with_c: bool, ids: list[int]) -> None:
    with pytest.raises((IndexError, RuntimeError)):  # torch's own message where there is no C
        rows.gather(torch.zeros(3, 2), torch.tensor(ids))


@pytest.mark.skipif(not HAS_C, reason="no compiler")
@pytest.mark.parametrize("ids", [[-1], [1, 3], [2**40]])
@pytest.mark.parametrize("is_coalesced", [True, False])
def test_a_gradient_outside_of_the_table_writes_nowhere(ids: list[int], is_coalesced: bool) -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    weight.grad = torch.sparse_coo_tensor(
        torch.tensor([ids]), torch.ones(len(ids), 2), (3, 2), is_coalesced=is_coalesced, check_invariants=False
    )
    with pytest.raises(IndexError, match="expected rows from 0 to 2, came"):
        RowWiseAdagrad([weight], lr=0.1).step()
    assert (weight == 0).all()


@both_ways
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "table_rows", "width"), [(0, 5, 4), (1, 1, 1), (50, 7, 3), (6_000, 1_000, 16), (6_000, 5_000_000, 2)]
)
def test_sums_what_belongs_to_one_row(
    with_c: bool, n: int, table_rows: int, width: int, dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(n)
    ids = (torch.rand(n, generator=generator) ** 3 * table_rows).long()
    values = torch.randn(n, width, generator=generator).to(dtype)
    found = rows.coalesce(rows.sparse_gradient(ids, values, (table_rows, width)))
    assert found.dtype is torch.float32
    assert found.is_coalesced()
    unique, inverse = ids.unique(return_inverse=True)
    twin = torch.zeros(len(unique), width, dtype=torch.float64).index_add_(0, inverse, values.double())
    assert torch.equal(found.indices()[0], unique)
    torch.testing.assert_close(found.values().double(), twin, rtol=1e-5, atol=1e-4)


@given(st.lists(st.integers(0, 2**32 - 2), max_size=200))
@settings(max_examples=50, deadline=None)
def test_ids_of_any_size_are_sorted(ids: list[int]) -> None:
    ids_N = torch.tensor(ids, dtype=torch.int64)
    found = rows.coalesce(rows.sparse_gradient(ids_N, torch.ones(len(ids), 1), (2**32 - 1, 1)))
    assert found.indices()[0].tolist() == sorted(set(ids))
    assert found.values().flatten().tolist() == [ids.count(i) for i in sorted(set(ids))]


def test_a_gradient_that_c_does_not_take_is_coalesced_by_torch() -> None:
    ids = torch.tensor([[1, 1, 0]])
    for values in (torch.ones(3, 2, dtype=torch.float64), torch.ones(3, 2).t().contiguous().t()):
        grad = torch.sparse_coo_tensor(ids, values, (2, 2), check_invariants=False)
        found = rows.coalesce(grad)
        assert found.dtype is values.dtype
        assert found.values().tolist() == [[1.0, 1.0], [2.0, 2.0]]


@both_ways
def test_puts_rows_back(with_c: bool) -> None:
    table, ids, _ = draw(1, 4_000, 9_000, 5)
    ids = ids.unique()
    values, version = torch.randn(len(ids), 5), table._version
    expected = table.clone().index_copy_(0, ids, values)
    rows.put_back(table, ids, values)
    assert torch.equal(table, expected)
    assert table._version > version  # autograd notices


@pytest.mark.skipif(not HAS_C, reason="no compiler")
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"eps": 0.1, "initial_accumulator_value": 0.0}])
@pytest.mark.parametrize("shape", [(5_000, 16), (50, 3), (50, 2, 3), (7,)])
def test_row_wise_adagrad_in_c_is_that_in_torch(
    shape: tuple[int, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ways = []
    for c in (True, False):
        monkeypatch.setattr(rows, "available", lambda c=c: c)
        weight = torch.nn.Parameter(start.clone())
        optimizer = RowWiseAdagrad([weight], lr=0.1, **options)
        draws = torch.Generator().manual_seed(1)
        for _ in range(5):
            ids = torch.randint(0, shape[0], (3_000,), generator=draws)
            values = torch.randn(3_000, *shape[1:], generator=draws)
            weight.grad = torch.sparse_coo_tensor(ids[None], values, shape, check_invariants=False)
            optimizer.step()
        ways.append((weight.detach(), optimizer.state[weight]["sum"], optimizer.state[weight]["step"]))
    for mine, torchs in zip(*ways, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-6)


@both_ways
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e19])
def test_a_bad_gradient_changes_nothing_and_is_counted(with_c: bool, bad: float) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 16))
    optimizer = RowWiseAdagrad([weight], lr=0.1)
    before = weight.detach().clone()
    values = torch.ones(2, 16)
    values[1, 3] = bad
    weight.grad = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), values, (4, 16), check_invariants=False)
    optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert optimizer.state[weight]["bad_steps"] == 1
    assert (optimizer.state[weight]["sum"] == 0.1).all()


@both_ways
def test_a_rate_that_is_no_number_changes_nothing(with_c: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(4, 2))
    rate = torch.tensor(0.1)
    optimizer = RowWiseAdagrad([weight], lr=rate)
    rate.fill_(math.nan)
    weight.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (4, 2), check_invariants=False)
    optimizer.step()
    assert (weight == 1).all()


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lookup_has_the_gradient_of_an_embedding(with_c: bool, dtype: torch.dtype) -> None:
    table, ids, values = draw(2, 500, 90, 8)
    weight, twin = (torch.nn.Parameter(table.clone()) for _ in range(2))
    found: Tensor = LookUp.apply(weight, ids, dtype)
    expected = torch.nn.functional.embedding(ids, twin).to(dtype)
    assert torch.equal(found, expected)
    for out in (found, expected):
        out.backward(values.to(dtype))
    assert weight.grad is not None
    assert weight.grad.is_sparse
    torch.testing.assert_close(weight.grad.to_dense(), twin.grad, rtol=1e-5, atol=1e-4)
