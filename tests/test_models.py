import copy
import tomllib

import numpy as np
import pytest
import tomli_w
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from steadyrank.errors import ConfigError
from steadyrank.losses import multitask_loss
from steadyrank.models import (
    CrossConfig,
    MMoEConfig,
    ModelConfig,
    PLEConfig,
    PositionConfig,
    Ranker,
    SharedBottomConfig,
    paper_model,
)
from steadyrank.models.cross import CrossNet
from steadyrank.models.embeddings import EmbeddingTables, NumberInputs
from steadyrank.models.layers import MLP, Style, make_linear, module_keys
from steadyrank.models.trunks import PLE, MMoE, build_trunk
from steadyrank.schema import Batch, NumberFeature, Ragged, Schema

from .batches import make_batch, make_schema

TRUNKS = {
    "shared_bottom": SharedBottomConfig(widths=(8, 6)),
    "mmoe": MMoEConfig(experts=3, widths=(8, 6)),
    "ple": PLEConfig(levels=2, shared_experts=2, task_experts=1, widths=(6,)),
}
CROSSES = {
    "none": None,
    "full": CrossConfig(layers=2, layer_norm=True),
    "low_rank": CrossConfig(layers=3, rank=2),
}
TASKS = ["click", "like", "watch"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_ranker(schema: Schema, seed: int = 0, **config: object) -> Ranker:
    return Ranker(schema, ModelConfig.model_validate({"trunk": TRUNKS["shared_bottom"], **config}), seeded(seed))


def total_loss(ranker: Ranker, schema: Schema, batch: Batch) -> Tensor:
    return multitask_loss(ranker(batch), batch.labels, batch.weights, tuple(schema.tasks.values())).total


# The whole ranker


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("cross", CROSSES)
@pytest.mark.parametrize("kinds", [(), ("id",), ("ids",), ("number",), ("number", "position")], ids=" ".join)
def test_every_combination_trains(trunk: str, cross: str, kinds: tuple[str, ...]) -> None:
    schema = make_schema(*kinds)
    ranker = make_ranker(schema, trunk=TRUNKS[trunk], cross=CROSSES[cross], tower=(5,), activation="silu")
    batch = make_batch(schema, 16)
    assert ranker(batch).shape == (16, 3)
    total_loss(ranker, schema, batch).backward()
    for name, parameter in ranker.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.is_sparse == (name in ranker.table_names())
        values = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
        assert bool(values.isfinite().all())
        assert bool((values != 0).any()), name


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_single_batches(rows: int) -> None:
    schema = make_schema()
    ranker = make_ranker(schema)
    total_loss(ranker, schema, make_batch(schema, rows)).backward()
    assert ranker(make_batch(schema, rows)).shape == (rows, 3)
    assert bool(ranker(make_batch(schema, 9)).isfinite().all())


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_the_activation_is_the_one_asked_for(activation: str) -> None:
    mlp = MLP(3, (4,), Style(activation), seeded())  # type: ignore[arg-type]
    x = torch.randn(5, 3, generator=seeded())
    linear = mlp.get_submodule("linear_0")
    assert torch.equal(mlp(x), getattr(nn.functional, activation)(linear(x)))


def test_one_seed_makes_one_model() -> None:
    schema = make_schema()
    for trunk in TRUNKS.values():
        config = ModelConfig(trunk=trunk, cross=CROSSES["low_rank"], tower=(4,), layer_norm=True)
        torch.manual_seed(1)
        first = Ranker(schema, config, seeded(7)).state_dict()
        torch.manual_seed(2)
        state = torch.get_rng_state()
        second = Ranker(schema, config, seeded(7)).state_dict()
        other = Ranker(schema, config, seeded(8)).state_dict()
        assert torch.equal(torch.get_rng_state(), state)
        assert list(first) == list(second)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(first["tables.weights.width_4"], other["tables.weights.width_4"])


def test_biases_start_at_zero_and_weights_keep_their_variance() -> None:
    hidden, output = MLP(400, (500,), Style(), seeded()), make_linear(400, 500, seeded())
    assert all(bool((p == 0).all()) for name, p in hidden.named_parameters() if name.endswith("bias"))
    variances = [hidden.get_submodule("linear_0").weight.var(), output.weight.var()]  # type: ignore[operator]
    assert [round(v.item() * 400, 1) for v in variances] == [2.0, 1.0]


def test_serving_leaves_the_position_out() -> None:
    schema = make_schema()
    ranker = make_ranker(schema)
    batch = make_batch(schema, 32)
    ranker(batch)
    with torch.no_grad():
        ranker.position.weight.normal_(generator=seeded())  # type: ignore[union-attr]
    serving = ranker.eval()(batch)
    moved = copy.copy(batch)
    object.__setattr__(moved, "positions", batch.positions.flip(0))
    assert torch.equal(ranker(moved), serving)
    both = ranker.forward_both(batch)
    assert torch.equal(both.serving, serving)
    assert not torch.equal(both.training, serving)
    twin = copy.deepcopy(ranker).train()
    assert torch.equal(twin(batch), both.training)
    got = copy.deepcopy(ranker).train().forward_both(batch)
    assert torch.equal(got.serving, serving)
    assert torch.equal(got.training, both.training)
    assert not torch.equal(twin.numbers.n, ranker.numbers.n)


def test_the_position_bias_is_a_table_of_places() -> None:
    schema = make_schema()
    ranker = make_ranker(schema, position=PositionConfig(tasks=("click", "watch")))
    assert ranker.position is not None
    with torch.no_grad():
        ranker.position.weight.copy_(torch.arange(18.0).view(6, 3) + 1)
    places = torch.tensor([[-(2**63)], [-1], [0], [4], [5], [2**63 - 1]])
    rows = [0, 0, 1, 5, 5, 5]
    expected = [[3.0 * row + 1, 0.0, 3.0 * row + 3] for row in rows]
    assert ranker.position(places).tolist() == expected


def test_without_a_position_both_answers_are_one() -> None:
    schema = make_schema("id")
    both = make_ranker(schema).forward_both(make_batch(schema, 4))
    assert both.serving is both.training
    assert make_ranker(make_schema(), position={"tasks": []}).position is None


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one feature of kind 'id', 'ids' or 'number'"):
        make_ranker(make_schema("position"))
    with pytest.raises(ConfigError, match=r"model\.position\.tasks 'clik'; did you mean 'click'"):
        make_ranker(make_schema(), position={"tasks": ["clik"]})
    with pytest.raises(ConfigError, match="divide must be a power of 2"):
        paper_model("small", divide=3)
    for bad in ({"kind": "mmoe", "levels": 2}, {"kind": "shared_bottom", "widths": []}, {"kind": "moe"}):
        with pytest.raises(ValidationError):
            ModelConfig.model_validate({"trunk": bad})


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_config_survives_its_dump(trunk: str) -> None:
    config = ModelConfig(trunk=TRUNKS[trunk], cross=CROSSES["low_rank"], tower=(4,), position={"tasks": ["click"]})
    dumped = tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
    assert ModelConfig.model_validate(tomllib.loads(dumped)) == config


def test_tasks_of_any_name_get_a_tower() -> None:
    schema = Schema(
        features={"age": {"kind": "number"}}, tasks={n: {"kind": "binary"} for n in ("a.b", "a_b", "keys", "type")}
    )
    for trunk in TRUNKS.values():
        assert make_ranker(schema, trunk=trunk)(make_batch(schema, 3)).shape == (3, 4)
    assert module_keys(["a.b", "a_b", "keys", "click"]) == ["a_b", "a_b_", "keys_", "click"]


@pytest.mark.parametrize(("name", "divide"), [("small", 1), ("small", 8), ("large", 8), ("large_dcn", 8)])
def test_the_papers_models_have_its_layers(name: str, divide: int) -> None:
    ranker = make_ranker(make_schema(), **dict(paper_model(name, divide)))  # type: ignore[arg-type]
    width, depth = (512, 2) if name == "small" else (4096, 4)
    width //= divide
    inputs = ranker.input_width
    assert inputs == 4 * 4 + 3 + 4
    trunk = (inputs + 1) * width + (depth - 1) * (width + 1) * width
    cross = 2 * inputs * (inputs + 1) + 2 * inputs
    expected = {"tables": 4 * (41 + 31 + 13) + 3 * 25, "trunk": trunk, "towers": 3 * (width + 1), "position": 6 * 3}
    if name == "large_dcn":
        expected["cross"] = cross
    summary = ranker.summary()
    assert summary.parts == expected
    assert summary.embedding == expected["tables"]
    assert summary.dense == sum(expected.values()) - expected["tables"]
    assert paper_model("large_dcn").trunk.widths == paper_model("large").trunk.widths == (4096,) * 4


# Embeddings


def slow_embeddings(tables: EmbeddingTables, schema: Schema, batch: Batch) -> Tensor:
    """Look up and pool row by row, width by width, one-valued features before lists."""
    weights = {int(name.removeprefix("width_")): weight for name, weight in tables.weights.items()}
    rows = []
    for b in range(len(batch)):
        parts: list[Tensor] = []
        for width, weight in weights.items():
            for j, name in enumerate(schema.id_features):
                if schema.slot(name).width == width:
                    parts.append(weight[batch.ids[b, j]])
            for (name, feature), ragged in zip(schema.list_features.items(), batch.lists, strict=True):
                if schema.slot(name).width != width:
                    continue
                found = [weight[i] for i in ragged.values[ragged.offsets[b] : ragged.offsets[b + 1]]]
                pooled = sum(found, torch.zeros(width, dtype=weight.dtype))
                parts.append(pooled / max(len(found), 1) if feature.pooling == "mean" else pooled)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("kinds", [(), ("id",), ("ids",)], ids=" ".join)
def test_lookup_and_pooling_equal_a_slow_loop(kinds: tuple[str, ...]) -> None:
    schema = make_schema(*kinds)
    tables = EmbeddingTables(schema, 0.5, seeded()).double()
    batch = make_batch(schema, 30)
    assert all(bool((ragged.offsets.diff() == 0).any()) for ragged in batch.lists)
    got, expected = tables(batch), slow_embeddings(tables, schema, batch)
    assert got.shape[1] == tables.width_out
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(got.shape, dtype=torch.float64, generator=seeded())
    weights = list(tables.parameters())
    sparse = torch.autograd.grad((got * direction).sum(), weights)
    dense = torch.autograd.grad((expected * direction).sum(), weights)
    for one, other in zip(sparse, dense, strict=True):
        torch.testing.assert_close(one.to_dense(), other, rtol=1e-12, atol=1e-12)


def test_the_gradient_touches_the_batchs_rows_only() -> None:
    schema = make_schema()
    ranker = make_ranker(schema)
    batch = make_batch(schema, 6)
    total_loss(ranker, schema, batch).backward()
    assert ranker.table_names() == ["tables.weights.width_4", "tables.weights.width_3"]
    grad = ranker.get_parameter("tables.weights.width_4").grad
    assert grad is not None
    looked_up = torch.cat([batch.ids[:, :2].reshape(-1), *(ragged.values for ragged in batch.lists)])
    assert grad.is_sparse
    # One gradient value for each id looked up, however many rows the table has.
    assert grad._nnz() == len(looked_up)
    assert torch.equal(grad.coalesce().indices()[0], looked_up.unique())


def test_lists_that_are_all_empty_pool_to_zeros() -> None:
    schema = make_schema("ids")
    empty = Ragged(torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    batch = make_batch(schema, 3)
    object.__setattr__(batch, "lists", (empty, empty))
    tables = EmbeddingTables(schema, 0.5, seeded())
    got = tables(batch)
    got.sum().backward()
    assert torch.equal(got, torch.zeros(3, 8))
    assert all(p.grad is not None and p.grad._nnz() == 0 for p in tables.parameters())


def test_a_null_id_has_an_embedding_of_its_own() -> None:
    schema = make_schema("id")
    tables = EmbeddingTables(schema, 0.5, seeded())
    batch = make_batch(schema, 2)
    batch.ids[0] = torch.tensor([schema.slot(name).start for name in schema.id_features])
    row = tables(batch)[0]
    assert torch.equal(row[4:8], tables.weights["width_4"][schema.slot("item").start])
    assert bool((row != 0).all())


def test_tables_start_with_the_standard_deviation_asked_for() -> None:
    ranker = make_ranker(make_schema("id"), embedding_std=0.2)
    weight = torch.cat([w.detach().reshape(-1) for w in ranker.tables.weights.values()])
    assert weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert weight.abs().max() <= 0.2 * 3**0.5


# Numbers


def test_number_statistics_equal_numpys_over_several_batches() -> None:
    features = [NumberFeature(column="a"), NumberFeature(column="b", transform="log1p")]
    inputs = NumberInputs(features)
    generator = np.random.default_rng(0)
    seen: list[np.ndarray] = []
    for rows in (7, 1, 40, 3):
        x = generator.normal(1e4, 3.0, (rows, 2)).astype(np.float32)
        x[generator.random(x.shape) < 0.3] = np.nan
        x[0, 0], x[0, 1] = np.inf, -np.inf
        before = (inputs.mean.clone(), inputs.m2.clone(), inputs.n.clone())
        got = inputs(torch.from_numpy(x)).numpy()
        if seen:
            check_numbers(got, x, *(part.numpy() for part in before))
        seen.append(np.where(np.isfinite(x), x, np.nan).astype(np.float64))
    every = np.concatenate(seen)
    every[:, 1] = np.sign(every[:, 1]) * np.log1p(np.abs(every[:, 1]))
    assert inputs.n.tolist() == np.isfinite(every).sum(0).tolist()
    np.testing.assert_allclose(inputs.mean.numpy(), np.nanmean(every, 0), rtol=1e-12)
    np.testing.assert_allclose((inputs.m2 / inputs.n).numpy(), np.nanvar(every, 0), rtol=1e-9)


def check_numbers(got: np.ndarray, x: np.ndarray, mean: np.ndarray, m2: np.ndarray, n: np.ndarray) -> None:
    missing = ~np.isfinite(x)
    x = np.where(missing, 0.0, x).astype(np.float64)
    x[:, 1] = np.sign(x[:, 1]) * np.log1p(np.abs(x[:, 1]))
    expected = np.where(missing, 0.0, (x - mean) / np.sqrt(m2 / n))
    np.testing.assert_allclose(got[:, :2], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[:, 2:], missing)


def test_number_statistics_survive_and_stand_still_in_evaluation() -> None:
    inputs = NumberInputs([NumberFeature(column="a"), NumberFeature(column="b", standardise=False)])
    x = torch.randn(50, 2, generator=seeded()) * 4 + 9
    inputs(x)
    other = NumberInputs([NumberFeature(column="a"), NumberFeature(column="b", standardise=False)])
    other.load_state_dict(inputs.state_dict())
    assert sorted(inputs.state_dict()) == ["m2", "mean", "n"]
    got = inputs.eval()(x)
    assert torch.equal(other(x), got)
    assert inputs.n.tolist() == [50, 50]
    assert other.n.tolist() == [100, 100]
    assert torch.equal(got[:, 1], x[:, 1])
    filled = inputs(torch.full((1, 2), torch.nan))
    torch.testing.assert_close(filled, torch.tensor([[0.0, float(x[:, 1].double().mean()), 1.0, 1.0]]))


def test_log1p_keeps_the_sign() -> None:
    inputs = NumberInputs([NumberFeature(column="a", transform="log1p", standardise=False)])
    x = torch.tensor([[-99.0], [0.0], [99.0], [3e38]])
    torch.testing.assert_close(inputs(x)[:, :1], x.sign() * x.abs().log1p())


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-30, 16_777_216.0, 3e38])
def test_a_constant_feature_is_not_divided_by_zero(value: float) -> None:
    inputs = NumberInputs([NumberFeature(column="a")])
    for rows in (1, 3, 1000):
        got = inputs(torch.full((rows, 1), value))
        assert bool((got[:, 0].abs() <= max(abs(value) * 1e-6, 1e-6)).all())
        assert torch.equal(got[:, 1], torch.zeros(rows))


def test_a_feature_never_seen_is_zero_until_it_comes() -> None:
    inputs = NumberInputs([NumberFeature(column="a")])
    assert torch.equal(inputs(torch.full((4, 1), torch.nan)), torch.tensor([[0.0, 1.0]] * 4))
    assert inputs.n.tolist() == [0.0]
    assert inputs(torch.tensor([[1.0], [3.0]]))[:, 0].tolist() == [-1.0, 1.0]


# Cross layers


@pytest.mark.parametrize("config", [CrossConfig(layers=3), CrossConfig(layers=2, rank=2, layer_norm=True)])
def test_cross_layers_equal_a_slow_twin(config: CrossConfig) -> None:
    net = CrossNet(4, config, seeded()).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=seeded(1)))
    x0 = torch.randn(5, 4, dtype=torch.float64, generator=seeded(2)).requires_grad_()
    expected = torch.stack([slow_cross(net, row) for row in x0])
    torch.testing.assert_close(net(x0), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(net, (x0,))


def slow_cross(net: CrossNet, x0: Tensor) -> Tensor:
    x = x0
    for layer in net.layers:
        products = [p for name, p in layer.named_parameters() if name.endswith("weight")]
        (bias,) = (p for name, p in layer.named_parameters() if name.endswith("bias"))
        matrix = products[0] if len(products) == 1 else products[1] @ products[0]
        x = torch.stack([x0[i] * ((matrix[i] * x).sum() + bias[i]) + x[i] for i in range(len(x))])
    if isinstance(net.norm, nn.LayerNorm):
        x = (x - x.mean()) / (x.var(correction=0) + net.norm.eps).sqrt() * net.norm.weight + net.norm.bias
    return x


# Trunks


def mixture(gate: nn.Module, x: Tensor, experts: list[nn.Module], inputs: list[Tensor]) -> Tensor:
    """Mix experts row by row, from the softmax's own formula."""
    rows = []
    for b, row in enumerate(x):
        powers = [score.exp() for score in gate.get_parameter("linear.weight") @ row]
        outputs = [expert(one)[b] for expert, one in zip(experts, inputs, strict=True)]
        rows.append(sum((p * o for p, o in zip(powers, outputs, strict=True)), torch.zeros(1)) / sum(powers))
    return torch.stack(rows)


def test_mmoe_equals_a_slow_twin() -> None:
    trunk = MMoE(5, MMoEConfig(experts=3, widths=(4, 2)), TASKS, Style("gelu", layer_norm=True), seeded()).double()
    x = torch.randn(6, 5, dtype=torch.float64, generator=seeded())
    for got, gate in zip(trunk(x), trunk.gates.values(), strict=True):
        torch.testing.assert_close(gate(x).sum(1), torch.ones(6, dtype=torch.float64))
        assert bool((gate(x) > 0).all())
        torch.testing.assert_close(got, mixture(gate, x, list(trunk.experts), [x] * 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 3])
def test_ple_equals_a_slow_twin(levels: int) -> None:
    config = PLEConfig(levels=levels, shared_experts=1, task_experts=2, widths=(4, 3))
    trunk = PLE(5, config, TASKS, Style("silu"), seeded()).double()
    x = torch.randn(6, 5, dtype=torch.float64, generator=seeded())
    streams = [x] * 4
    for number, level in enumerate(trunk.levels):
        shared, x_shared = list(level.shared_experts), streams[-1]  # type: ignore[arg-type]
        own = [list(experts) for experts in level.task_experts.values()]  # type: ignore[operator, union-attr]
        gates = list(level.gates.values())  # type: ignore[operator, union-attr]
        mixed = [
            mixture(gates[k], streams[k], own[k] + shared, [streams[k]] * 2 + [x_shared]) for k in range(len(TASKS))
        ]
        if number < levels - 1:
            every, inputs = [e for experts in own for e in experts], [s for s in streams[:-1] for _ in range(2)]
            mixed.append(mixture(level.shared_gate, x_shared, every + shared, [*inputs, x_shared]))  # type: ignore[arg-type]
        streams = mixed
    assert trunk.levels[-1].shared_gate is None
    for got, expected in zip(trunk(x), streams, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", TRUNKS)
def test_gradients_of_trunks_equal_finite_differences(kind: str) -> None:
    trunk = build_trunk(3, TRUNKS[kind], TASKS, Style("gelu", layer_norm=True), seeded()).double()
    x = torch.randn(2, 3, dtype=torch.float64, generator=seeded()).requires_grad_()
    names = [name for name, _ in trunk.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in trunk.parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        # Each task weighs in differently, so that the tasks' gradients cannot cancel.
        outputs = torch.func.functional_call(trunk, dict(zip(names, parameters, strict=True)), (x,))
        return sum((k + 1) * h.square() for k, h in enumerate(outputs))  # type: ignore[return-value]

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)
