"""Checkpoints: whole or not at all, every damage found, nothing executed, kept as configured, read without us."""

import hashlib
import json
import math
import pickle
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from steadyrank.checkpoints import FORMAT, Checkpoints, digest_of
from steadyrank.errors import CheckpointError

from .test_runs import files, small_disk


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def state(value: float = 1.0) -> dict[str, object]:
    model = OrderedDict(w=torch.full((100, 100), value), b=torch.zeros(3, dtype=torch.bfloat16))
    cursor = {"file": "a.parquet", "row": 17, "raw": b"\x00", "seen": (1, None), "best": math.inf}
    return {"model": model, "generator": torch.Generator().get_state(), "cursor": cursor, "dtype": torch.float32}


def test_checkpoints_round_trip_newest_first_and_are_pruned(kept: Checkpoints) -> None:
    for step in (9, 10, 100):
        assert kept.save(step, state(float(step))) == kept.path / f"step_{step}"
    assert kept.steps() == [9, 10, 100]
    newest = Checkpoints(kept.path).load()
    torch.testing.assert_close(newest["model"]["w"], torch.full((100, 100), 100.0), rtol=0, atol=0)
    assert newest["cursor"] == state()["cursor"]
    assert newest["dtype"] is torch.float32
    assert float(kept.load(9)["model"]["w"][0, 0]) == 9
    kept.prune(2)
    assert kept.steps() == [10, 100]
    kept.save(100, state(-1))
    assert float(kept.load()["model"]["w"][0, 0]) == -1
    names = {"step_10", "step_100"}
    inside = {f"{n}/{f}" for n in names for f in ("state.json", "tensors.safetensors", "manifest.json")}
    assert files(kept.path) == names | inside
    kept.prune(0)
    assert kept.steps() == []


def test_a_missing_checkpoint_is_named(kept: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint +\(there are: \[\]\)"):
        kept.load()
    kept.save(5, {})
    with pytest.raises(CheckpointError, match=r"no checkpoint 6 \(there are: \[5\]\)"):
        kept.load(6)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("where", [0, 100, -1])
def test_a_flipped_byte_is_found(kept: Checkpoints, name: str, where: int) -> None:
    path = kept.save(5, state()) / name
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"step_5/{name} is damaged: sha256"):
        kept.load()


def test_whatever_is_damaged_the_one_before_is_used_and_it_is_said(kept: Checkpoints) -> None:
    """Random flips and truncations of any of the files, the manifest too."""
    draw = random.Random(0)
    kept.save(1, state(1.0))
    for trial in range(40):
        folder = kept.save(2, state(2.0))
        path = folder / draw.choice(["state.json", "tensors.safetensors", "manifest.json"])
        data = bytearray(path.read_bytes())
        if trial % 2:
            data = data[: draw.randrange(len(data))]
        else:
            data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
        path.write_bytes(data)
        said: list[str] = []
        found = kept.load_newest(said.append)
        assert found is not None
        step, loaded = found
        assert (step, float(loaded["model"]["w"][0, 0])) == (1, 1.0)
        assert len(said) == 1
        assert "step_2" in said[0]


def test_a_missing_file_is_named(kept: Checkpoints) -> None:
    for name in ("state.json", "tensors.safetensors"):
        (kept.save(5, state()) / name).unlink()
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read"):
            kept.load()


@pytest.mark.parametrize("version", [1, 2, FORMAT + 1, "3", None])
def test_a_checkpoint_of_another_format_is_refused(kept: Checkpoints, version: object) -> None:
    path = kept.save(5, state()) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": version}))
    with pytest.raises(CheckpointError, match=rf"manifest\.json: format {FORMAT} was expected, but it says"):
        kept.load()


def test_a_full_disk_leaves_no_half_checkpoint(kept: Checkpoints) -> None:
    kept.save(1, state(1))
    before = files(kept.path)
    for step in (1, 2):
        with small_disk(20_000), pytest.raises(CheckpointError, match=f"cannot write .*step_{step}.*space"):
            kept.save(step, state(2))
    assert files(kept.path) == before
    assert float(kept.load()["model"]["w"][0, 0]) == 1


class Evil:
    ran = False

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import tests.test_checkpoints as t; t.Evil.ran = True",)


def forge(folder: Path, name: str, data: bytes) -> None:
    """Replace a file as somebody would who writes a checkpoint with a matching checksum."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest["sha256"] = digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_no_pickled_code_is_executed(kept: Checkpoints, tmp_path: Path) -> None:
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    for data in (pickle.dumps(Evil()), (tmp_path / "evil.pt").read_bytes()):
        for name in ("tensors.safetensors", "state.json"):
            forge(kept.save(5, {"a": torch.ones(1)}), name, data)
            with pytest.raises(CheckpointError, match=r"cannot be read|damaged"):
                kept.load()
    assert not Evil.ran
    pickle.loads(pickle.dumps(Evil()))  # the trap itself works
    assert Evil.ran


LIES = [
    (2**62).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"{}" + b"x" * 10,
    b"".join(
        [(77).to_bytes(8, "little"), b'{"a":{"dtype":"F32","shape":[1073741824,1073741824],"data_offsets":[0,4]}}   ']
    ),
    b"",
]


@pytest.mark.parametrize("data", LIES, ids=range(len(LIES)))
def test_a_lying_header_allocates_nothing(kept: Checkpoints, data: bytes) -> None:
    forge(kept.save(5, {"a": torch.ones(1)}), "tensors.safetensors", data)
    with pytest.raises(CheckpointError, match="cannot be read"):
        kept.load()


@pytest.mark.parametrize(
    "text",
    ['{"a": {"tensor": "b"}}', '{"a": {"tensor": ["a"]}}', '{"a": {"dtype": "save"}}', '{"a": {"dtype": 3}}',
     '{"a": {"items": 3}}', '{"a": {"items": [[{"b": 1}, 2]]}}', '{"a": {"bytes": "zz"}}', '{"a": {"float": "x"}}',
     '{"a": {"tuple": 1}}', "[]", "3", "{"],
)  # fmt: skip
def test_a_forged_state_is_refused(kept: Checkpoints, text: str) -> None:
    forge(kept.save(5, {"a": torch.ones(1)}), "state.json", text.encode())
    with pytest.raises(CheckpointError):
        kept.load()


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(2), Path("x"), {1}, Evil()])
def test_what_could_not_be_loaded_is_not_saved(kept: Checkpoints, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"state/a/1 is a .*, which a checkpoint cannot hold"):
        kept.save(5, {"a": [0, value]})
    assert kept.steps() == []


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.sampled_from(["tensor", "items", "float"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(value=PLAIN)
def test_any_plain_value_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    kept = Checkpoints(tmp_path_factory.mktemp("kept"))
    kept.save(1, {"value": value})
    found = kept.load()["value"]
    assert found == value
    assert repr(found) == repr(value)  # a tuple is no list, 1 is not 1.0, -0.0 is not 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_tensors_come_back_bit_for_bit(kept: Checkpoints, dtype: torch.dtype) -> None:
    whole = torch.arange(12).reshape(3, 4).to(dtype)
    tensors = {"whole": whole, "view": whole.T, "row": whole[1], "again": whole, "empty": whole[:0], "one": whole[0, 1]}
    kept.save(1, tensors)
    for name, found in kept.load().items():
        assert found.dtype == dtype
        assert torch.equal(found, tensors[name]), name
    kept.save(2, {"nan": torch.tensor([math.nan, math.inf, -0.0])})
    bits = kept.load()["nan"].view(torch.int32)
    assert torch.equal(bits, torch.tensor([math.nan, math.inf, -0.0]).view(torch.int32))


def test_a_checkpoint_is_read_without_us(kept: Checkpoints) -> None:
    """The layout of docs/survival.md, by safetensors and json alone."""
    folder = kept.save(5, {"model": {"w": torch.ones(2)}, "step": 5, "pair": (1, math.inf)}, day="2026-01-02")
    plain = json.loads((folder / "state.json").read_text())
    assert plain == {"model": {"w": {"tensor": "model/w"}}, "step": 5, "pair": {"tuple": [1, {"float": "inf"}]}}
    assert torch.equal(load_file(folder / "tensors.safetensors")["model/w"], torch.ones(2))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["day"], manifest["healthy"], manifest["kind"]) == (
        5,
        "2026-01-02",
        True,
        "regular",
    )
    for name, facts in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"]


def test_the_last_healthy_one_is_never_deleted(kept: Checkpoints) -> None:
    kept.save(1, {}, healthy=True)
    for step in (2, 3, 4):
        kept.save(step, {}, healthy=False)
        kept.prune(1)
        assert kept.steps() == [1, step]
    kept.save(5, {})
    kept.prune(1)
    assert kept.steps() == [5]


def test_days_are_kept_besides_and_what_was_made_aside_goes_with_the_next(kept: Checkpoints) -> None:
    for step in range(1, 9):
        kept.save(step, {}, kind="aside" if step in (3, 8) else "regular", day=f"2026-01-0{step}" if step % 2 else "")
    kept.prune(2, keep_days=2)
    assert kept.steps() == [5, 6, 7, 8]  # the last two days (3 was made aside), the last two regular ones, the newest
    kept.save(9, {})
    kept.prune(2, keep_days=2)
    assert kept.steps() == [5, 7, 9]


def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_checkpoint(kept: Checkpoints) -> None:
    folder = kept.save(5, state())
    folder.rename(kept.path / ".step_6.tmp")  # killed before the last rename
    assert kept.steps() == []
    kept.save(6, state(6.0))
    assert kept.steps() == [6]
    assert not list(kept.path.glob(".*"))
