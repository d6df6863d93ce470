"""Checkpoints of several ranks: the same state whole or in any other parts, every damage named, whole or not at all."""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from steadyrank.checkpoints import Checkpoints, Rows, RowShards
from steadyrank.errors import CheckpointError

from .checkpoint_processes import FULL, TABLES, plain, rows_of, whole
from .test_checkpoints import forge
from .together import needs_gloo, run_together

SHARDS = ["shard-00001.safetensors", "shard-00002.safetensors"]
ROWS = ("weight", "moment", "sum", "cube", "seen")

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Return the folder that two processes saved into, and what each of them saw."""
    path = tmp_path_factory.mktemp("two")
    assert run_together("checkpoint_processes", 2, path) == ["", ""]  # torch says nothing
    return path / "checkpoints", [json.loads((path / f"found_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def kept(saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> Checkpoints:
    """Return a copy of the checkpoint of step 1 that may be damaged."""
    shutil.copytree(saved[0] / "step_1", tmp_path / "checkpoints" / "step_1")
    return Checkpoints(tmp_path / "checkpoints")


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


def test_one_process_reads_all_of_it(kept: Checkpoints) -> None:
    state, tensors = kept.load(), whole()
    for name, expected in plain().items():
        if name not in ("w", "again"):
            assert state[name] == expected
    assert same(state["w"], torch.ones(2, 2))
    assert same(state["again"][0], torch.arange(3))
    for name in ROWS:
        assert same(state["tables"][name], tensors[name]), name
    assert same(state["tables"]["again"], tensors["weight"])
    assert same(state["tables"]["turned"], tensors["weight"])
    optimizer, (sums,) = state["optimizer"]
    assert same(sums, tensors["sum"])
    assert list(optimizer["state"]) == ["dense", "columns", "row", "scalar", "copied"]
    for name, found in optimizer["state"].items():
        assert same(found, tensors[name]), name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_ranks_reads_its_rows(kept: Checkpoints, size: int) -> None:
    """Each table cut into blocks, at other places than when it was saved."""
    tensors = whole()
    for rank in range(size):
        cuts = {table: (n * rank // size, n * (rank + 1) // size) for table, _, n in TABLES}
        held = {table: (first, last - first) for table, (first, last) in cuts.items()}
        state = kept.load(1, rows=held)
        for name in ROWS:
            assert same(state["tables"][name], rows_of(tensors[name], held)), (name, rank)
        assert same(state["optimizer"][0]["state"]["columns"], tensors["columns"])
    some = {"page": (1, 2), "item": (1, 3), "elsewhere": (0, 9)}
    assert same(kept.load(1, rows=some)["tables"]["weight"], tensors["weight"][[8, 9, 10, 14, 15]])
    assert kept.load(1, rows={})["tables"]["cube"].shape == (0, 2, 2)


@pytest.mark.parametrize("asked", [(3, 5), (-1, 2), (0, 8)])
def test_rows_that_a_table_does_not_have_are_refused(kept: Checkpoints, asked: tuple[int, int]) -> None:
    with pytest.raises(CheckpointError, match="of table 'user' were wanted, it has 7"):
        kept.load(1, rows={"user": asked})


def test_the_files_are_safetensors_and_json_that_torch_reads_too(kept: Checkpoints) -> None:
    folder, tensors = kept.folder(1), whole()
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", *SHARDS, "state.json", "tensors.safetensors"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["day"]) == (4, "2026-01-02")
    for name, facts in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"]
        if name != "state.json":
            load_file(folder / name)  # which reads nothing but safetensors
    tables = json.loads((folder / "state.json").read_text())["tables"]
    lie = [list(table) for table in TABLES]
    assert tables["sum"] == {"rows": {"name": "tables/sum", "shape": [17], "dtype": "float64", "tables": lie}}
    assert set(load_file(folder / SHARDS[1])) >= {"tables/weight#item", "tables/weight#tiny"}
    assert "tables/weight#user" not in load_file(folder / SHARDS[1])

    found = {
        "tables/moment#item": torch.zeros(5, 3, dtype=torch.bfloat16),
        "optimizer/0/state/dense": torch.zeros(5, 4),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process
        dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert same(found["tables/moment#item"], tensors["moment"][7:12])
    assert same(found["optimizer/0/state/dense"], tensors["dense"])


@pytest.mark.parametrize("name", [*SHARDS, "tensors.safetensors", "state.json", "manifest.json"])
def test_every_damage_is_found_and_named(kept: Checkpoints, name: str) -> None:
    path = kept.folder(1) / name
    data = path.read_bytes()
    flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    for damaged in (flipped, data[:-1], data + b"\0", b"", None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        reads: list[dict[str, tuple[int, int]] | None] = [None, {}, {"user": (0, 1)}]
        for rows in reads:
            if name == "manifest.json" and damaged is None:
                assert kept.load_newest(pytest.fail) is None
                continue
            with pytest.raises(CheckpointError, match=rf"step_1/{name}"):
                kept.load(1, rows=rows)
        path.write_bytes(data)
    assert kept.load(1)


def test_a_forged_checkpoint_is_refused(kept: Checkpoints) -> None:
    """One whose checksums fit."""
    folder = kept.folder(1)
    whole_state = (folder / "state.json").read_text()
    shard = (folder / SHARDS[0]).read_bytes()
    lies = {
        "[17, 3]": "[17, 4]",
        "[3, 5]": "[-3, 5]",
        '["user", 0, 7]': '["user", 0, 9000000000000]',
        '"float64"': '"save"',
        '"bfloat16"': '"float32"',
        '"tables/sum"': '"tables/other"',
        '"shape"': '"form"',
    }
    for old, new in lies.items():
        assert old in whole_state, old
        forge(folder, "state.json", whole_state.replace(old, new).encode())
        with pytest.raises(CheckpointError, match="step_1 cannot be read"):
            kept.load(1)
    forge(folder, "state.json", whole_state.encode())
    for data in (b"", (2).to_bytes(8, "little") + b"{}", (folder / "tensors.safetensors").read_bytes()):
        forge(folder, SHARDS[0], data)
        with pytest.raises(CheckpointError, match="step_1 cannot be read"):
            kept.load(1)
    forge(folder, SHARDS[0], shard)
    assert kept.load(1)
    forge(folder, "../../elsewhere", b"")
    with pytest.raises(CheckpointError, match="elsewhere', which is no file of a checkpoint"):
        kept.load(1)


def test_what_fails_on_one_rank_fails_on_all_and_leaves_nothing(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    expected = {
        "full_0": ("cannot write .*/step_1: .*File too large", FULL),
        "full_1": ("cannot write .*/step_1: .*File too large", FULL),
        "full_plain": ("cannot write .*/step_1: .*File too large", FULL),
        "odd": ("state/b is a builtins.set, which a checkpoint cannot hold", None),
        "shape": r"state/a: 2 rows of 1 tables were expected, not a tensor \[3\]",
        "start": r"which begin at \[0\]; but they begin at \[1\]",
        "missing": "state/a#a: 4 rows, each on one rank, were expected; but the ranks hold 0 to 0, 2 to 2",
        "twice": "state/a#a: 3 rows, each on one rank, were expected; but the ranks hold 0 to 1, 1 to 2",
        "differ": "rank 0 has 1 of them and rank 1 has 1, and they differ in .*'shape': .4, 1.",
        "fewer": "rank 0 has 1 of them and rank 1 has 0",
        "partial": "cannot write .*step_2: rank 0: .*partial placements",
    }
    for rank in (0, 1):
        found = saved[1][rank]
        for name, wanted in expected.items():
            text, number = wanted if isinstance(wanted, tuple) else (wanted, None)
            assert re.search(text, found[name][0], re.DOTALL), (name, found[name])
            assert found[name][1] == number, name
        assert found["unchanged"]


def test_all_ranks_take_the_same_older_one(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in saved[1]:
        assert found["newest"] == 1
        assert found["same"] == ["weight", "moment", "sum"]
        assert found["dense"]
        assert len(found["said"]) == 1
        assert "step_5/shard-00002.safetensors is damaged: sha256" in found["said"][0]


def test_without_parts_it_is_a_checkpoint_as_ever(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    kept = Checkpoints(saved[0])
    assert sorted(p.name for p in kept.folder(3).iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]
    assert kept.manifest(3)["format"] == 3
    assert same(kept.load(3)["only"], torch.ones(2))


def test_one_process_alone_saves_parts_too(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    matrix = torch.arange(12.0).reshape(6, 2)
    rows = (Rows("a", 0, 4, 0, 4), Rows("b", 4, 2, 0, 2))
    kept.save(1, {"x": RowShards(matrix, rows), "x#a": torch.ones(1), "y": {"rows": 3}})
    state = kept.load()
    assert same(state["x"], matrix)
    assert same(state["x#a"], torch.ones(1))
    assert state["y"] == {"rows": 3}
    assert same(kept.load(rows={"b": (1, 1)})["x"], matrix[5:])


def test_a_state_of_one_process_is_written_as_ever(tmp_path: Path) -> None:
    """Also where it looks like what stands for a shard: a reader of before knows no such marks."""
    kept = Checkpoints(tmp_path)
    state = {"cursor": {"rows": 3}, "model": {"shards": [1, 2]}, "w": torch.ones(2)}
    folder = kept.save(1, state)
    text = '{"cursor": {"rows": 3}, "model": {"shards": [1, 2]}, "w": {"tensor": "w"}}'
    assert (folder / "state.json").read_text() == text
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest) == ["format", "steadyrank", "step", "kind", "healthy", "day", "saved", "files", "sha256"]
    assert manifest["format"] == 3
    assert list(manifest["files"]) == ["state.json", "tensors.safetensors"]
    assert kept.load()["cursor"] == {"rows": 3}
    assert same(kept.load(rows={"user": (0, 1)})["w"], torch.ones(2))


def test_what_a_killed_rank_left_is_tidied_up(kept: Checkpoints) -> None:
    draft = kept.path / ".step_2.tmp"
    draft.mkdir()
    for name in SHARDS:
        shutil.copy(kept.folder(1) / name, draft)
    assert kept.steps() == [1]
    kept.mend()
    assert [p.name for p in kept.path.iterdir()] == ["step_1"]
