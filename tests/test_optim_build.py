"""Row-wise Adagrad, and how optimizers are built by name."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from steadyrank.errors import ConfigError
from steadyrank.monitors.dynamics import ClipFactors
from steadyrank.optim import (
    PRESETS,
    AdagradConfig,
    AdamConfig,
    AdamWConfig,
    ClipGradients,
    ClippyAdagrad,
    ClippyAdagradConfig,
    ClippyAdam,
    ClippyAdamConfig,
    ClippyAdamWConfig,
    ClipUpdates,
    LambAdagradConfig,
    LambConfig,
    OptimizerConfig,
    RowWiseAdagrad,
    RowWiseAdagradConfig,
    SGDConfig,
    StableAdamWConfig,
    build_optimizer,
    configs,
    split_parameters,
)
from steadyrank.testing import TinyProblem, check_optimizer, forbid_host_sync, step_rowwise_twin

GUARDED = (
    ClippyAdagradConfig,
    ClippyAdamConfig,
    ClippyAdamWConfig,
    RowWiseAdagradConfig,
    LambAdagradConfig,
    LambConfig,
    StableAdamWConfig,
)
CONFIGS = (*GUARDED, AdagradConfig, AdamConfig, AdamWConfig, SGDConfig)
CLIPS: dict[str, dict[str, Any]] = {
    "value": {"limit": 0.1},
    "global_norm": {"max_norm": 0.5},
    "tensor_norm": {"max_norm": 0.25},
    "agc": {"clipping": 0.02},
    "cow_clip": {"ratio": 0.5},
    "ada_gc": {"warmup": 3},
    "z_clip": {"threshold": 3.0},
    "spike_clip": {"warmup": 4},
    "skip_spikes": {"window": 16},
}
ADAPTER: TypeAdapter[Any] = TypeAdapter(OptimizerConfig)


@pytest.fixture(autouse=True)
def _sparse_checks_chosen() -> Any:
    # torch's own Adagrad builds sparse tensors and warns unless somebody chose whether they are to be checked.
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sparse", [False, True])
def test_rowwise_equals_its_twin_step_by_step(dtype: torch.dtype, sparse: bool) -> None:
    draw = torch.Generator().manual_seed(6)
    table = nn.Parameter(torch.randn(9, 4, generator=draw).to(dtype))
    optimizer = RowWiseAdagrad([table], lr=0.2, initial_accumulator_value=0.1, eps=1e-8)
    weight, total = table.detach().double().numpy().copy(), np.full(9, 0.1)
    moved = 0.0
    for _ in range(20):
        rows = torch.randint(0, 6, (5,), generator=draw)  # duplicates, and rows that are never touched
        values = torch.randn(5, 4, generator=draw).to(dtype)
        grad = torch.zeros_like(table).index_add_(0, rows, values)
        table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape) if sparse else grad
        optimizer.step()
        before = weight
        weight, total = step_rowwise_twin(weight, total, grad.double().numpy(), lr=0.2, eps=1e-8)
        moved += np.abs(weight - before).max()
        close, ulp = (1e-12, 0.0) if dtype == torch.float64 else (1e-5, 2**-23)
        np.testing.assert_allclose(table.detach(), weight, rtol=0, atol=close * moved + ulp * np.abs(weight).max())
        np.testing.assert_allclose(optimizer.state[table]["sum"], total, rtol=close, atol=0)


def test_rowwise_on_rows_of_one_is_torchs_adagrad() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64)) for _ in range(2))
    optimizers = (
        RowWiseAdagrad([ours], lr=0.2, initial_accumulator_value=0.1, eps=1e-3),
        torch.optim.Adagrad([theirs], lr=0.2, initial_accumulator_value=0.1, eps=1e-3),
    )
    for step in range(5):
        ours.grad = theirs.grad = torch.linspace(-2, 3, 5, dtype=torch.float64) * step
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)


def test_rowwise_refuses_a_row_whose_squares_overflow_together() -> None:
    table = nn.Parameter(torch.ones(2, 8))
    optimizer = RowWiseAdagrad([table], lr=0.1)
    table.grad = torch.full((2, 8), 1.5e19)  # the square of one fits float32, the sum of eight does not
    optimizer.step()
    state = optimizer.state[table]
    assert torch.equal(table, torch.ones(2, 8))
    assert torch.equal(state["sum"], torch.full((2,), 0.1))
    assert state["bad_steps"] == 1


def test_rowwise_takes_tables_without_width_and_refuses_scalars() -> None:
    table = nn.Parameter(torch.ones(3, 0))
    optimizer = RowWiseAdagrad([table], lr=0.1)
    table.grad = torch.ones(3, 0)
    optimizer.step()
    assert torch.equal(optimizer.state[table]["sum"], torch.full((3,), 0.1))
    with pytest.raises(ConfigError, match="parameter 'scale' is a scalar"):
        RowWiseAdagrad([("scale", nn.Parameter(torch.ones(())))])


@pytest.mark.parametrize("config_class", CONFIGS)
def test_what_is_built_holds_every_promise(config_class: Any) -> None:
    def make(params: Any) -> Any:
        params = list(params)
        if isinstance(params[0], tuple):
            return build_optimizer(config_class(), params)
        return type(build_optimizer(config_class(), [("w", nn.Parameter(torch.ones(1)))]))(params, lr=0.05)

    check_optimizer(make, guarded=config_class in GUARDED, sparse=config_class not in (AdamConfig, AdamWConfig))


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_option_of_a_config_reaches_the_optimizer(config_class: Any) -> None:
    config = config_class(lr=0.25)
    optimizer = build_optimizer(config, TinyProblem().named_parameters())
    group = optimizer.param_groups[0]
    for option, value in config.model_dump(exclude={"name", "clip", "preset"}, exclude_none=True).items():
        assert group[option] == value
    assert group["param_names"] == ["table", "weight", "bias", "empty"]
    assert ADAPTER.validate_python(config.model_dump()) == config


def test_defaults_are_the_classes_own_but_for_the_papers_accumulator() -> None:
    for config, made in ((ClippyAdagradConfig(), ClippyAdagrad), (ClippyAdamConfig(), ClippyAdam)):
        options = config.model_dump(exclude={"name", "clip", "preset"}, exclude_none=True)
        assert options.items() <= made([torch.ones(1)]).defaults.items()
    assert AdagradConfig().initial_accumulator_value == 0.1
    assert AdamConfig().betas == (0.9, 0.999)


def test_a_preset_sets_what_is_not_given() -> None:
    config = ADAPTER.validate_python({"name": "clippy_adagrad", "preset": "authors_code", "lr": 0.5})
    group = build_optimizer(config, TinyProblem().named_parameters()).param_groups[0]
    assert (group["lr"], group["absolute_threshold"], group["accumulator"]) == (0.5, 1e-7, "delayed")
    assert ADAPTER.validate_python(config.model_dump()) == config
    paper = ADAPTER.validate_python({"name": "clippy_adamw", "preset": "paper"})
    assert paper.absolute_threshold == PRESETS["paper"]["absolute_threshold"]


@pytest.mark.parametrize("name", CLIPS)
def test_every_rule_is_built_by_its_name_with_its_options(name: str) -> None:
    assert set(CLIPS) == set(configs.RULES)
    config = ADAPTER.validate_python({"name": "adagrad", "lr": 0.1, "clip": {"name": name, **CLIPS[name]}})
    assert ADAPTER.validate_python(config.model_dump()) == config
    problem = TinyProblem(sparse=True)
    optimizer = build_optimizer(config, problem.named_parameters(), sparse=True)
    assert isinstance(optimizer, ClipGradients)
    assert type(optimizer.rule) is configs.RULES[name]
    for option, value in config.clip.model_dump(exclude={"name"}, exclude_none=True).items():
        assert getattr(optimizer.rule, option) == value
    for step in range(3):
        problem.backward(step)
        optimizer.step()
    assert torch.isfinite(problem.table).all()


def test_updates_are_bounded_around_an_optimizer_that_has_no_clippy() -> None:
    clip = {"name": "updates", "granularity": "row", "absolute_threshold": 0.5}
    config = ADAPTER.validate_python({"name": "sgd", "lr": 0.1, "momentum": 0.9, "clip": clip})
    optimizer = build_optimizer(config, TinyProblem().named_parameters())
    assert isinstance(optimizer, ClipUpdates)
    group = optimizer.param_groups[0]
    assert (group["granularity"], group["absolute_threshold"], group["momentum"]) == ("row", 0.5, 0.9)
    with pytest.raises(ConfigError, match="bounds its updates already"):
        build_optimizer(ClippyAdagradConfig(clip=configs.ClipUpdatesConfig()), TinyProblem().named_parameters())


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"name": "adam", "momentum": 0.9}, ("adam", "momentum")),
        ({"name": "clippy_adagrad", "absolute_treshold": 0.1}, ("clippy_adagrad", "absolute_treshold")),
        ({"name": "sgd", "lr": -1.0}, ("sgd", "lr")),
        ({"name": "adamw", "betas": [0.9, 1.0]}, ("adamw", "betas", 1)),
        ({"name": "clippy_adagrad", "accumulator": "late"}, ("clippy_adagrad", "accumulator")),
        ({"name": "adagrat"}, ()),
        ({"name": "clippy_adagrad", "preset": "adam"}, ("clippy_adagrad", "preset")),
        ({"name": "adam", "clip": {"name": "value"}}, ("adam", "clip", "value", "limit")),
        ({"name": "adam", "clip": {"name": "acg"}}, ("adam", "clip")),
    ],
)
def test_a_config_refuses_what_its_optimizer_does_not_have(wrong: dict[str, Any], where: tuple[Any, ...]) -> None:
    with pytest.raises(ValidationError) as refusal:
        ADAPTER.validate_python(wrong)
    assert [error["loc"] for error in refusal.value.errors()] == [where]


@pytest.mark.parametrize("config", [AdamConfig(), AdamWConfig(), SGDConfig(momentum=0.9)])
def test_sparse_tables_are_refused_with_what_to_choose(config: Any) -> None:
    problem = TinyProblem(sparse=True)
    with pytest.raises(ConfigError, match=r"no sparse gradients, which 'table' has; choose 'rowwise_adagrad'"):
        build_optimizer(config, [("table", problem.table)], sparse=True)


@pytest.mark.parametrize("config", [ClippyAdagradConfig(), AdagradConfig(), RowWiseAdagradConfig(), SGDConfig()])
def test_sparse_tables_train_and_only_their_touched_rows_move(config: Any) -> None:
    problem = TinyProblem(sparse=True)
    optimizer = build_optimizer(config, [("table", problem.table)], sparse=True)
    start = copy.deepcopy(problem.table)
    for step in range(3):
        problem.backward(step)
        optimizer.step()
    assert not torch.equal(problem.table[:8], start[:8])
    assert torch.equal(problem.table[8:], start[8:])


def test_nothing_to_optimize_is_an_error() -> None:
    with pytest.raises(ConfigError, match="optimizer 'sgd': expected at least one parameter"):
        build_optimizer(SGDConfig(), [])


def test_parameters_split_into_dense_and_tables() -> None:
    model = nn.ModuleDict({"tables": nn.ParameterDict({"w16": torch.ones(2, 2)}), "tables_top": nn.Linear(2, 1)})
    for names in (["tables"], ["tables.w16"]):
        dense, tables = split_parameters(model, names)
        assert [name for name, _ in dense] == ["tables_top.weight", "tables_top.bias"]
        assert [name for name, _ in tables] == ["tables.w16"]
        assert tables[0][1] is model["tables"]["w16"]
    assert split_parameters(model, []) == (list(model.named_parameters()), [])
    with pytest.raises(ConfigError, match=r"no parameter or submodule 'tables.w32'; did you mean 'tables.w16'\?"):
        split_parameters(model, ["tables.w32"])


class _Careless(torch.optim.Optimizer):
    """Gradient descent that multiplies bad numbers away, and asks for them on the host."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    good = bool(torch.isfinite(param.grad).all())
                    param.sub_(group["lr"] * param.grad * (1.0 if good else 0.0))
        return loss


def test_the_check_itself_finds_broken_promises() -> None:
    with pytest.raises(AssertionError, match="changed the weights"):
        check_optimizer(lambda params: _Careless(params, {"lr": 0.1}))
    problem = TinyProblem()
    optimizer = _Careless(problem.parameters(), {"lr": 0.1})
    problem.backward(0)
    with forbid_host_sync(), pytest.raises(AssertionError, match="host sync"):
        optimizer.step()
    with pytest.raises(AssertionError, match="descends"):
        check_optimizer(lambda params: torch.optim.SGD(params, lr=0.001, maximize=True), guarded=False)


def test_a_clip_factor_is_read_through_a_wrapper() -> None:
    problem = TinyProblem()
    config = ADAPTER.validate_python({"name": "clippy_adagrad", "lr": 5.0, "clip": {"name": "value", "limit": 9.0}})
    optimizer = build_optimizer(config, problem.named_parameters())
    problem.backward(0)
    optimizer.step()
    factors = ClipFactors(problem.named_parameters(), [optimizer]).read()
    assert factors.keys() == {"table", "weight", "bias", "empty"}
    assert factors["table"] < 1
