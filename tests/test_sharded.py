"""Tables that TorchRec cuts over processes look up, learn and step as one process's tables do."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from steadyrank.distributed.planning import describe, plan_for
from steadyrank.errors import ConfigError
from steadyrank.schema import Schema

from .together import run_together

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchrec") is None, reason="TorchRec is not installed")

GB = 10**9


def find(size: int, path: Path) -> dict[str, Any]:
    run_together("sharded_processes", size, path)
    read: dict[str, Any] = json.loads(path.read_text())
    return read


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return find(2, tmp_path_factory.mktemp("sharded") / "found.json")


def check_tables(case: dict[str, Any]) -> None:
    assert case["names"] == case["state_dict"] == case["table_names"]
    assert case["names"] == ["weights.width_4", "weights.width_8", "weights.width_2"]
    assert case["same_state"]
    assert case["start"] == 0.0
    assert case["forward"] <= 2e-7
    assert case["gradient"] <= 2e-6
    assert case["half"][0] == "torch.bfloat16"
    assert case["half"][1] <= 2**-8, "one step of bfloat16 below 1"
    assert not case["dense"], "a gradient as large as the table"


def check_training(name: str, case: dict[str, Any]) -> None:
    """One process moves its weights by about 1, and rounding adds up over steps."""
    limit = 2e-6 if name in ("rowwise", "adagrad_row", "adagrad_tensor", "adam_tensor") else 1e-5
    assert case["gap"] <= limit * max(1.0, case["moved"]), f"{name}: {case['gap']} of {case['moved']}"
    assert case["moved"] > 0.03, name
    one, many = case["scalars"]
    assert many == pytest.approx(one, rel=1e-4, abs=1e-6), name
    assert case["alike"], f"{name}: ranks differ in what holds for a whole table"


def test_cut_tables_are_those_of_one_process(found: dict[str, Any]) -> None:
    check_tables(found["once/forced"])
    check_tables(found["once/planned"])
    assert found["once/forced"]["plan"] == {
        "user": "row_wise", "item.id": "table_wise", "tiny": "row_wise", "country": "table_wise",
        "phone": "table_wise", "tags": "row_wise",
    }  # fmt: skip
    assert found["once/forced"]["empty"], "no rank is without rows of a width"


def test_cut_tables_learn_as_those_of_one_process(found: dict[str, Any]) -> None:
    cases = {name.removeprefix("train/"): case for name, case in found.items() if name.startswith("train/")}
    assert len(cases) > 15
    for name, case in cases.items():
        check_training(name, case)
    one, many = cases["adagrad_tensor"]["scalars"]
    assert one["1/bad_steps"] == many["1/bad_steps"] == 1, "a NaN in one rank's rows is refused by all"
    assert one["0/bad_steps"] == many["0/bad_steps"] == 0


def test_what_cannot_be_done_over_ranks_is_refused(found: dict[str, Any]) -> None:
    refused = found["refused"]
    assert "granularity to 'row'" in refused["quantile"]
    assert "no other rank has a part of" in refused["fused"]
    assert (
        "2 x (1,500 bytes less 500 bytes for the dense layers) = 2,000 bytes; 488 bytes are missing"
        in (refused["memory"])
    )


OWN = [f"tables.embedding_bags.{name}.weight" for name in ("user", "item", "tag", "city", "place", "one")]


@pytest.mark.parametrize("name", ["row", "tensor", "rowwise", "torch", "norm"])
def test_tables_of_an_own_loop_learn_as_torchs_do_in_one_process(found: dict[str, Any], name: str) -> None:
    case = found[f"own/{name}"]
    assert case["names"] == OWN
    assert case["rows"] == [[6, 7, 5, 0, 2, 1], [5, 0, 0, 6, 1, 0]], "each rank is without rows of some tables"
    assert case["rest"] == [2, 2], "the dense layer is not among the tables"
    assert case["loaded"] == case["again"] == 0.0, "TorchRec's state_dict is loaded by whoever holds the rows"
    assert case["sparse"]
    assert case["gap"] <= 1e-6
    assert case["moved"] > 1
    one, many = case["scalars"]
    assert many == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert case["alike"]
    if name in ("row", "tensor"):
        assert 0 < many["0/clip_factor"] < 0.1, "nothing was clipped"


def test_tables_of_an_own_loop_start_and_look_up_as_torchrecs_do(found: dict[str, Any]) -> None:
    begun = found["own/begin"]
    assert begun["bounds"], "TorchRec starts a table of R rows between -1/sqrt(R) and 1/sqrt(R)"
    assert begun["asked"], "init_fn is not used"
    assert begun["as_fused"] == 0.0
    assert begun["keys"], "the state_dict has other names"
    assert begun["beside"] == [name for name in OWN if "tag" not in name], "data-parallel tables are left alone"
    assert begun["put_back"]


def test_the_example_of_an_own_loop_shows_what_it_says(found: dict[str, Any]) -> None:
    case = found["own/example"]
    (fused, none), (loss, factor) = case["fused"], case["row"]
    assert none == 1.0
    assert 0 < factor < 0.01
    assert loss < 0.2 < 10 < fused


def test_tables_that_cannot_have_sparse_gradients_are_refused(found: dict[str, Any]) -> None:
    refused = found["own/refused"]
    assert "table 'tag' is planned as 'column_wise' with the kernel 'fused'" in refused["columns"]
    assert "compute_kernels=['fused']" in refused["dense"]
    assert "table 'user' has weights in FP16" in refused["half"]
    assert "the optimizer exact_sgd for the fused kernel, which would never step" in refused["optimizer"]
    assert "an EmbeddingCollection cannot be sharded" in refused["sequence"]
    assert "inside of `with sparse_gradients():`" in refused["none"]


@pytest.mark.slow
def test_four_processes_on_two_machines(tmp_path: Path) -> None:
    found = find(4, tmp_path / "found.json")
    check_tables(found["once/forced"])
    assert found["once/forced"]["plan"]["user"] == "table_row_wise"
    for name in ("adagrad_tensor", "adam_tensor", "global_norm"):
        check_training(name, found[f"train/{name}"])


def make_schema(rows: int) -> Schema:
    features = {
        "user": {"kind": "id", "rows": rows},
        "item": {"kind": "id", "rows": rows // 100},
        "history": {"kind": "ids", "rows": rows // 100, "table": "item", "max_length": 50},
        "country": {"kind": "id", "rows": 300, "width": 8},
    }
    return Schema(features=features, tasks={"click": {"kind": "binary"}}, embedding_width=16)


@pytest.mark.parametrize(("ranks", "rows"), [(8, 10**9), (64, 10**10)])
def test_a_world_that_is_not_there_can_be_planned(ranks: int, rows: int) -> None:
    plan = plan_for(make_schema(rows), ranks, 72 * GB, ranks_per_host=8, batch_rows=4096, state_bytes=lambda _: 4.0)
    told = json.loads(json.dumps(describe(plan)))
    assert [each["table"] for each in told["tables"]] == ["user", "item", "country"]
    for each in told["tables"]:
        assert sum(each["rows_per_rank"]) == each["rows"]
        assert len(each["ranks"]) == len(each["bytes"]) == len(each["time_ms"]) == len(each["rows_per_rank"])
        assert each["sharding"] in ("table_wise", "row_wise", "table_row_wise")
    assert max(told["bytes"]) <= told["budget_bytes"] == 72 * GB
    assert sum(told["bytes"]) >= rows * 68
    assert min(told["time_ms"]) >= 0
    assert max(told["time_ms"]) > 0
    held = [plan.rows_of(rank, 16) for rank in range(ranks)]
    assert [each.table for each in held[0]] == ["user", "item"]
    assert held[0][1].start == rows + 1
    for table in range(2):  # each row is held by one rank
        pieces = sorted((each[table].first, each[table].count) for each in held if each[table].count)
        ends = [first + count for first, count in pieces]
        assert [first for first, _ in pieces] == [0, *ends[:-1]]
        assert ends[-1] == held[0][table].rows


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError) as error:
        plan_for(make_schema(10**10), 8, 72 * GB, dense_bytes=2 * GB, state_bytes=lambda width: 4.0 * width)
    said = str(error.value)
    assert "do not fit on 8 ranks. They take 1,292.8 GB: 'user' 10,000,000,001 rows x (16 x 4 bytes + 64" in said
    assert "There are 8 x (72.0 GB less 2.0 GB for the dense layers) = 560.0 GB; 732.8 GB are missing" in said
    assert "Take at least 24 ranks" in said
    assert "rowwise_adagrad" in said
    plan_for(make_schema(10**10), 24, 72 * GB, dense_bytes=2 * GB, state_bytes=lambda width: 4.0 * width)
