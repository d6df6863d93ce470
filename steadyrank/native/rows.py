"""Rows of embedding tables: look up, sum what belongs to one row, step; in C where that can be used, else in torch.

Shapes: R rows of a table, W numbers in a row (all its dimensions together), N ids, U different rows among them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from . import available, function, is_plain

_FLOATS = (torch.float32, torch.bfloat16)
_MOST = 1 << 32  # ids and their places are sorted as one number


def gather(
    table: Float[Tensor, "R *W"], rows_N: Int64[Tensor, " N"], dtype: torch.dtype | None = None
) -> Float[Tensor, "N *W"]:
    """Return `table[rows_N]`, in `dtype` where one is given.

    Raises:
        IndexError: A row lies outside of the table.

    >>> gather(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 1, 0])).flatten()
    tensor([2., 2., 1.])
    """
    dtype = dtype or table.dtype
    if not (dtype in _FLOATS and _taken(table, rows_N)):
        return table.index_select(0, rows_N).to(dtype)
    out = torch.empty(len(rows_N), *table.shape[1:], dtype=dtype)
    size = (len(table), _width(table), rows_N.data_ptr(), len(rows_N))
    if function("steadyrank_look_up")(
        table.data_ptr(), *size, out.data_ptr(), dtype is torch.bfloat16, torch.get_num_threads()
    ):
        raise _outside(rows_N, len(table))
    return out


def put_back(table: Float[Tensor, "R *W"], rows_U: Int64[Tensor, " U"], values: Float[Tensor, "U *W"]) -> None:
    """Write `values` into the rows of `table`, which are different ones and lie in it.

    >>> table = torch.zeros(3, 1)
    >>> put_back(table, torch.tensor([2]), torch.ones(1, 1))
    >>> table.flatten()
    tensor([0., 0., 1.])
    """
    if not (_taken(table, rows_U) and is_plain(values, torch.float32)):
        table.index_copy_(0, rows_U, values)
        return
    function("steadyrank_put_back")(
        *(table.data_ptr(), _width(table), rows_U.data_ptr(), len(rows_U), values.data_ptr(), torch.get_num_threads())
    )
    _wrote(table)


def sparse_gradient(rows_N: Int64[Tensor, " N"], values: Float[Tensor, "N *W"], size: Sequence[int]) -> Tensor:
    """Return `values` as the gradient of a table of that size: summed by their rows where that is cheap, in C.

    Values in bfloat16 are summed in float32. Where there is no C the gradient is not coalesced.

    >>> sparse_gradient(torch.tensor([4, 1, 4]), torch.ones(3, 1), (5, 1)).to_dense().flatten()
    tensor([0., 1., 0., 0., 2.])
    """
    fits = max(size[0], len(rows_N)) < _MOST and is_plain(rows_N, torch.int64) and is_plain(values, *_FLOATS)
    if not (fits and _usable()):
        return _sparse(rows_N, values.to(torch.promote_types(values.dtype, torch.float32)), size)
    rows_U, sums = torch.empty_like(rows_N), torch.empty(values.shape)
    found = function("steadyrank_sum_rows")(
        *(
            rows_N.data_ptr(),
            len(rows_N),
            size[0],
            values.data_ptr(),
            values.dtype is torch.bfloat16,
            values[:1].numel(),
        ),
        *(rows_U.data_ptr(), sums.data_ptr(), torch.get_num_threads()),
    )
    if found == -2:
        raise _outside(rows_N, size[0])
    if found < 0:
        raise MemoryError("no memory to sum the gradient of an embedding table by its rows")
    return _sparse(rows_U[:found], sums[:found], size, is_coalesced=True)


def coalesce(grad: Tensor) -> Tensor:
    """Return a sparse gradient with each row once, as `grad.coalesce()` does.

    >>> grad = torch.sparse_coo_tensor([[1, 1]], torch.ones(2, 1), (3, 1), check_invariants=False)
    >>> coalesce(grad).values()
    tensor([[2.]])
    """
    if grad.is_coalesced() or grad.sparse_dim() != 1 or grad.dtype is not torch.float32 or not grad.is_cpu:
        return grad.coalesce()
    rows_N = grad._indices()[0]
    if bool((rows_N[1:] > rows_N[:-1]).all()):  # torch forgets that a gradient was coalesced when it accumulates it
        return _sparse(rows_N, grad._values(), grad.shape, is_coalesced=True)
    return sparse_gradient(rows_N, grad._values(), grad.shape).coalesce()


def can_step(table: Float[Tensor, "R *W"], total_R: Float[Tensor, " R"], grad: Tensor) -> bool:
    """Say whether `step_rowwise_adagrad` takes these, `grad` once it is coalesced."""
    plain = is_plain(total_R, torch.float32) and is_plain(grad._values(), torch.float32)
    return plain and len(total_R) == len(table) and _taken(table, grad._indices()[0])


def step_rowwise_adagrad(
    table: Float[Tensor, "R *W"], total_R: Float[Tensor, " R"], grad: Tensor, lr: float, eps: float, limit: float
) -> bool:
    """Make one step of row-wise Adagrad in C, in place, and say whether the gradient was taken.

    Args:
        table: The weights.
        total_R: The accumulator.
        grad: Sparse and coalesced.
        lr: The rate; below 0 to go up.
        eps: Added to the root.
        limit: A gradient with a larger coordinate, or a NaN, is refused, and nothing changed.

    Source: `RowWiseAdagrad`, which has the formula.
    """
    rows_U, values = grad.indices()[0], grad.values()
    refused = function("steadyrank_rowwise_adagrad")(
        *(table.data_ptr(), total_R.data_ptr(), len(table), _width(table)),
        *(rows_U.data_ptr(), len(rows_U), values.data_ptr()),
        *(lr, eps, limit, torch.get_num_threads()),
    )
    if refused == 2:
        raise _outside(rows_U, len(table))
    if not refused:
        _wrote(table, total_R)
    return not refused


def _taken(table: Tensor, rows: Tensor) -> bool:
    return _usable() and is_plain(table, torch.float32) and is_plain(rows, torch.int64)


def _usable() -> bool:
    return not torch.compiler.is_compiling() and available()


def _width(table: Tensor) -> int:
    return table[:1].numel()


def _outside(rows_N: Tensor, count: int) -> IndexError:
    return IndexError(f"expected rows from 0 to {count - 1}, came {int(rows_N.min())} to {int(rows_N.max())}")


def _wrote(*tensors: Tensor) -> None:
    torch.autograd.graph.increment_version(tensors)  # so that autograd notices, as it does after torch's own


def _sparse(rows: Tensor, values: Tensor, size: Sequence[int], is_coalesced: bool | None = None) -> Tensor:
    # Nothing to check: the rows come from a lookup that torch or we have made.
    return torch.sparse_coo_tensor(rows[None], values, tuple(size), is_coalesced=is_coalesced, check_invariants=False)
