"""What every optimizer must hold (`check_optimizer`), slow float64 twins, a tiny problem."""

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

FloatArray = Float64[np.ndarray, "*shape"]
MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
"""Builds the optimizer under test over parameters, (name, parameter) pairs or groups, as `torch.optim` takes them."""


class ClippyTwin(NamedTuple):
    """What one step of Clippy leaves: weights, accumulator, and the factor it used."""

    weight: FloatArray
    accumulator: FloatArray
    factor: float


def step_clippy_twin(
    weight: FloatArray,
    accumulator: FloatArray,
    grad: FloatArray,
    *,
    lr: float,
    variable_relative_threshold: float,
    absolute_threshold: float,
    accumulator_relative_threshold: float,
    eps: float,
    form: str,
    weight_decay: float = 0.0,
) -> ClippyTwin:
    """Make one step of `ClippyAdagrad` in float64, coordinate by coordinate (Algorithm 1, and the authors' code).

    >>> paper = dict(variable_relative_threshold=0.5, absolute_threshold=0.01, accumulator_relative_threshold=0.0)
    >>> one = np.ones(1)
    >>> float(step_clippy_twin(one, one, one, lr=1.02, eps=0.0, form="delayed", **paper).factor)
    0.5
    """
    if form == "standard":
        accumulator = accumulator + grad**2
    scale = (accumulator + eps) ** -0.5
    delta = lr * (grad * scale + weight_decay * weight)
    bound = variable_relative_threshold * abs(weight) + accumulator_relative_threshold * scale + absolute_threshold
    factor = find_factor_twin(delta, bound)
    if form != "standard":
        accumulator = accumulator + (grad * (factor if form == "delayed_clipped" else 1.0)) ** 2
    return ClippyTwin(weight - factor * delta, accumulator, factor)


def find_factor_twin(delta: FloatArray, bound: FloatArray) -> float:
    """Return min(1, min_i bound_i / |delta_i|), coordinate by coordinate; a zero step sets no limit.

    >>> find_factor_twin(np.array([4.0, 0.0]), np.array([1.0, 0.0]))
    0.25
    """
    factor = 1.0
    for step, most in zip(delta.flat, bound.flat, strict=True):
        if step != 0:
            factor = min(factor, float(most / abs(step)))
    return factor


class ClippyAdamTwin(NamedTuple):
    """What one step of Clippy on Adam leaves: weights, both moments, and the factor it used."""

    weight: FloatArray
    mean: FloatArray
    square: FloatArray
    factor: float


def step_clippy_adam_twin(
    weight: FloatArray,
    mean: FloatArray,
    square: FloatArray,
    grad: FloatArray,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    variable_relative_threshold: float,
    absolute_threshold: float,
    weight_decay: float = 0.0,
    clip_moments: bool = False,
) -> ClippyAdamTwin:
    """Make the `step`-th step (from 1) of `ClippyAdam` in float64.

    >>> zero, limits = np.zeros(1), dict(variable_relative_threshold=0.1, absolute_threshold=0.001)
    >>> twin = step_clippy_adam_twin(zero, zero, zero, np.ones(1), 1, lr=0.01, betas=(0.9, 0.999), eps=0.0, **limits)
    >>> round(twin.factor, 6), twin.weight.round(6).tolist()
    (0.1, [-0.001])
    """

    def moments(g: FloatArray) -> tuple[FloatArray, FloatArray]:
        return betas[0] * mean + (1 - betas[0]) * g, betas[1] * square + (1 - betas[1]) * g**2

    m, v = moments(grad)
    delta = lr * m / (1 - betas[0] ** step) / (np.sqrt(v / (1 - betas[1] ** step)) + eps) + lr * weight_decay * weight
    factor = find_factor_twin(delta, variable_relative_threshold * abs(weight) + absolute_threshold)
    if clip_moments:
        m, v = moments(factor * grad)
    return ClippyAdamTwin(weight - factor * delta, m, v, factor)


def step_rowwise_twin(
    weight: Float64[np.ndarray, "rows width"],
    accumulator: Float64[np.ndarray, " rows"],
    grad: Float64[np.ndarray, "rows width"],
    *,
    lr: float,
    eps: float,
) -> tuple[Float64[np.ndarray, "rows width"], Float64[np.ndarray, " rows"]]:
    """Make one step of `RowWiseAdagrad` in float64, row by row; return weights and accumulator.

    >>> weight, accumulator = step_rowwise_twin(np.zeros((1, 2)), np.zeros(1), np.array([[1.0, 7.0]]), lr=0.1, eps=0.0)
    >>> accumulator.tolist(), weight.round(6).tolist()
    ([25.0], [[-0.02, -0.14]])
    """
    weight, accumulator = weight.copy(), accumulator.copy()
    for row in range(len(weight)):
        accumulator[row] += np.mean(grad[row] ** 2)
        weight[row] -= lr * grad[row] / (np.sqrt(accumulator[row]) + eps)
    return weight, accumulator


class TinyProblem(nn.Module):
    """A table of 12 rows, a layer on top, and a parameter without elements; `loss(step)` is the same for the same step.

    Args:
        dtype: of every parameter.
        sparse: whether the table's gradient is sparse.

    >>> problem = TinyProblem()
    >>> bool(problem.loss(0) == problem.loss(0)), [name for name, _ in problem.named_parameters()]
    (True, ['table', 'weight', 'bias', 'empty'])
    """

    def __init__(self, dtype: torch.dtype = torch.float32, sparse: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.sparse = sparse
        self.table = nn.Parameter(torch.randn(12, 4, generator=draw).to(dtype))
        self.weight = nn.Parameter(torch.randn(2, 4, generator=draw).to(dtype))
        self.bias = nn.Parameter(torch.zeros(2, dtype=dtype))
        self.empty = nn.Parameter(torch.zeros(0, 4, dtype=dtype))

    def loss(self, step: int) -> Float[Tensor, ""]:
        """Return the mean square error on the batch that belongs to `step`; rows of the table come up repeatedly."""
        draw = torch.Generator().manual_seed(1000 + step)
        rows = torch.randint(0, 8, (10,), generator=draw)
        target = torch.randn(10, 2, generator=draw).to(self.bias.dtype)
        found = nn.functional.embedding(rows, self.table, sparse=self.sparse)
        error = found @ self.weight.T + self.bias - target
        return error.square().mean() + self.empty.sum()

    def backward(self, step: int) -> None:
        """Leave the gradients of `loss(step)`, and nothing else, in the parameters."""
        self.zero_grad()
        self.loss(step).backward()


class _HostSyncGuard(TorchDispatchMode):
    _waiting = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.name() in self._waiting:
            raise AssertionError(f"host sync: {func}")
        return func(*args, **(kwargs or {}))


def forbid_host_sync() -> AbstractContextManager[Any]:
    """Return a context in which waiting for a value or a shape raises AssertionError, on the CPU as on a GPU.

    >>> with forbid_host_sync():
    ...     bool(torch.ones(()) > 0)
    Traceback (most recent call last):
    ...
    AssertionError: host sync: aten._local_scalar_dense.default
    """
    return _HostSyncGuard()


def check_optimizer(make: MakeOptimizer, *, guarded: bool = True, sparse: bool = False, compiled: bool = False) -> None:
    """Check that an optimizer holds what users of PyTorch rely on, and with `guarded`, what this package promises.

    It trains in float32, float64 and bfloat16, respects groups, is deterministic, resumes bit for bit from its
    `state_dict`, can be copied and pickled, takes closures, hooks, schedulers and a `GradScaler`.

    Args:
        make: builds the optimizer. It is called with a module's named parameters, and with two groups that set `lr`.
        guarded: also check that a gradient which is not finite leaves weights and state as they were, that it is
            counted (under a key that ends with "bad_steps"), and that a dense step never makes the host wait. torch's
            own optimizers do neither.
        sparse: repeat everything with a sparse gradient for the table.
        compiled: also check that `torch.compile(optimizer.step)` does what `step` does; takes some seconds.

    Raises:
        AssertionError: a promise is broken; the message says which.

    >>> check_optimizer(lambda params: torch.optim.Adagrad(params, lr=0.1), guarded=False)
    """
    for with_sparse in (False, True) if sparse else (False,):
        for promise in _PROMISES:
            promise(make, with_sparse)
    if guarded:
        for with_sparse in (False, True) if sparse else (False,):
            _check_refuses(make, with_sparse)
        _check_no_host_sync(make)
    if compiled:
        _check_compiles(make)


def train_tiny(problem: TinyProblem, optimizer: Optimizer, steps: Iterable[int]) -> None:
    """Make the steps on the batches that belong to them."""
    for step in steps:
        problem.backward(step)
        optimizer.step()


def same(a: Any, b: Any) -> bool:
    """Compare nested states bit for bit, dtypes included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.allclose(a, b, 0, 0, equal_nan=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)


def _expect_same(promise: str, problems: tuple[TinyProblem, ...], optimizers: tuple[Optimizer, ...]) -> None:
    first, second = ({**problem.state_dict()} for problem in problems)
    assert same(first, second), f"{promise}: the weights differ"
    first, second = (optimizer.state_dict() for optimizer in optimizers)
    assert same(first, second), f"{promise}: the states differ"


def _check_trains(make: MakeOptimizer, sparse: bool) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        problem = TinyProblem(dtype, sparse)
        before = problem.loss(0).item()
        optimizer = make(problem.named_parameters())
        train_tiny(problem, optimizer, [0] * 8)
        for name, param in problem.named_parameters():
            assert param.dtype == dtype, f"keeps the dtype: {name} was {dtype}, is {param.dtype}"
            assert bool(param.isfinite().all()), f"stays finite: {name} in {dtype}"
        assert problem.loss(0).item() < before, f"descends: the loss of 8 steps on one batch did not fall in {dtype}"


def _check_groups(make: MakeOptimizer, sparse: bool) -> None:
    problem = TinyProblem(sparse=sparse)
    start = copy.deepcopy(problem)
    groups = [{"params": [problem.table], "lr": 0.05}, {"params": [problem.weight], "lr": 0.0}]
    optimizer = make(groups)
    optimizer.add_param_group({"params": [problem.empty], "lr": 0.05})
    train_tiny(problem, optimizer, range(3))
    assert not torch.equal(problem.table, start.table), "groups: the parameter with a learning rate did not move"
    assert torch.equal(problem.weight, start.weight), "groups: the parameter with a learning rate of 0 moved"
    assert torch.equal(problem.bias, start.bias), "groups: a parameter in no group moved"
    problem.zero_grad()
    held = problem.table.detach().clone()
    optimizer.step()
    assert torch.equal(problem.table, held), "absent gradients: a parameter without a gradient moved"


def _check_deterministic(make: MakeOptimizer, sparse: bool) -> None:
    problems = TinyProblem(sparse=sparse), TinyProblem(sparse=sparse)
    optimizers = make(problems[0].named_parameters()), make(problems[1].named_parameters())
    for problem, optimizer in zip(problems, optimizers, strict=True):
        train_tiny(problem, optimizer, range(5))
    _expect_same("deterministic", problems, optimizers)


def _check_resumes(make: MakeOptimizer, sparse: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        through = TinyProblem(dtype, sparse)
        optimizer = make(through.named_parameters())
        train_tiny(through, optimizer, range(4))
        file = io.BytesIO()
        torch.save({"model": through.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = TinyProblem(dtype, sparse)
        resumed.load_state_dict(saved["model"])
        # Another learning rate, which the loaded state has to overrule.
        fresh = make([{"params": list(resumed.named_parameters()), "lr": 0.123}])
        fresh.load_state_dict(saved["optimizer"])
        _expect_same(f"resumes in {dtype}, at once", (through, resumed), (optimizer, fresh))
        train_tiny(through, optimizer, range(4, 8))
        train_tiny(resumed, fresh, range(4, 8))
        _expect_same(f"resumes in {dtype}", (through, resumed), (optimizer, fresh))


def _check_copies(make: MakeOptimizer, sparse: bool) -> None:
    problem = TinyProblem(sparse=sparse)
    optimizer = make(problem.named_parameters())
    train_tiny(problem, optimizer, range(3))
    problem.zero_grad()
    copies = {
        "deepcopy": copy.deepcopy((problem, optimizer)),
        "pickle": pickle.loads(pickle.dumps((problem, optimizer))),
    }
    train_tiny(problem, optimizer, range(3, 6))
    for how, (other, its_optimizer) in copies.items():
        train_tiny(other, its_optimizer, range(3, 6))
        _expect_same(how, (problem, other), (optimizer, its_optimizer))


def _check_closure_and_hooks(make: MakeOptimizer, sparse: bool) -> None:
    problem = TinyProblem(sparse=sparse)
    optimizer = make(problem.named_parameters())
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure() -> float:
        called.append("closure")
        problem.backward(0)
        return problem.loss(0).item()

    expected = problem.loss(0).item()
    assert optimizer.step(closure) == expected, "closure: step did not return its loss"
    assert called == ["before", "closure", "after"], f"closure and hooks: called in the order {called}"


def _check_scheduler(make: MakeOptimizer, sparse: bool) -> None:
    problems = TinyProblem(sparse=sparse), TinyProblem(sparse=sparse)
    optimizers = make(problems[0].named_parameters()), make(problems[1].named_parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], step_size=1, gamma=0.5)
    for step in range(3):
        for problem, optimizer in zip(problems, optimizers, strict=True):
            train_tiny(problem, optimizer, [step])
        scheduler.step()
        for group in optimizers[1].param_groups:
            group["lr"] = group["lr"] * 0.5
    assert same(problems[0].state_dict(), problems[1].state_dict()), "scheduler: its rates did not reach the step"


def _check_accumulation(make: MakeOptimizer, sparse: bool) -> None:
    problems = TinyProblem(sparse=sparse), TinyProblem(sparse=sparse)
    optimizers = make(problems[0].named_parameters()), make(problems[1].named_parameters())
    for step in range(3):
        # Quarters and halves, so that the sum of the parts is the whole bit for bit.
        train_tiny(problems[0], optimizers[0], [step])
        problems[1].zero_grad()
        for part in (0.25, 0.25, 0.5):
            (part * problems[1].loss(step)).backward()
        optimizers[1].step()
    for (name, one), two in zip(problems[0].named_parameters(), problems[1].parameters(), strict=True):
        near = torch.allclose(one, two, rtol=0, atol=1e-5)
        assert near, f"gradient accumulation: {name} differs from one backward pass over the whole"


def _check_scaler(make: MakeOptimizer, sparse: bool) -> None:
    problems = TinyProblem(sparse=sparse), TinyProblem(sparse=sparse)
    optimizers = make(problems[0].named_parameters()), make(problems[1].named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # a power of two, so that nothing is rounded
    for step in range(4):
        train_tiny(problems[0], optimizers[0], [step])
        problems[1].zero_grad()
        scaler.scale(problems[1].loss(step)).backward()
        scaler.step(optimizers[1])
        scaler.update()
    _expect_same("GradScaler", problems, optimizers)


def _check_compiles(make: MakeOptimizer) -> None:
    problems = TinyProblem(), TinyProblem()
    optimizers = make(problems[0].named_parameters()), make(problems[1].named_parameters())
    torch.compiler.reset()
    step = torch.compile(optimizers[1].step, backend="aot_eager")
    for number in range(3):
        train_tiny(problems[0], optimizers[0], [number])
        problems[1].backward(number)
        step()
    torch.compiler.reset()
    for (name, plain), traced in zip(problems[0].named_parameters(), problems[1].parameters(), strict=True):
        moved = (plain - getattr(TinyProblem(), name)).abs().amax() if plain.numel() else 0.0
        near = torch.allclose(plain, traced, rtol=0, atol=float(1e-5 * moved + 2**-22))
        assert near, f"torch.compile: {name} differs from what step() makes of it"


# What only describes the last step, refused or not.
_OF_THE_LAST_STEP = ("clip_factor", "grad_factor", "trust_ratio", "bind_frac", "binding")


def _state_of(optimizer: Optimizer, index: int) -> dict[str, Any]:
    return copy.deepcopy(dict(optimizer.state_dict()["state"].get(index, {})))


def _check_refuses(make: MakeOptimizer, sparse: bool) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        problem = TinyProblem(sparse=sparse)
        optimizer = make(problem.named_parameters())
        train_tiny(problem, optimizer, range(2))
        weight, state = problem.table.detach().clone(), _state_of(optimizer, 0)
        bias = problem.bias.detach().clone()
        problem.backward(2)
        assert problem.table.grad is not None
        values = problem.table.grad._values() if sparse else problem.table.grad
        values[0, 1] = bad
        optimizer.step()
        after = _state_of(optimizer, 0)
        what = f"a gradient with {bad}, {'sparse' if sparse else 'dense'}"
        counts = [key for key in state if key.endswith("bad_steps")]
        assert torch.equal(problem.table, weight), f"{what}: it changed the weights"
        assert counts, f"{what}: nothing counts it; expected a state whose key ends with 'bad_steps'"
        assert any(int(after[key]) == int(state[key]) + 1 for key in counts), f"{what}: it was not counted"
        for key in after.keys() - {"step", *counts, *_OF_THE_LAST_STEP}:
            assert same(after[key], state[key]), f"{what}: it changed the state '{key}'"
        assert not torch.equal(problem.bias, bias), f"{what}: it stopped another parameter"


def _check_no_host_sync(make: MakeOptimizer) -> None:
    problem = TinyProblem()
    optimizer = make(problem.named_parameters())
    for step in range(2):
        problem.backward(step)
        with forbid_host_sync():
            optimizer.step()


_PROMISES: tuple[Callable[[MakeOptimizer, bool], None], ...] = (
    _check_trains,
    _check_groups,
    _check_deterministic,
    _check_resumes,
    _check_copies,
    _check_closure_and_hooks,
    _check_scheduler,
    _check_accumulation,
    _check_scaler,
)
