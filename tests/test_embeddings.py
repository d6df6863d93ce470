"""What a seed means for the weights of embedding tables, whoever draws them."""

import pytest
import torch
from torch import Tensor

from steadyrank.distributed.sharded import _draw
from steadyrank.models import embeddings
from steadyrank.models.embeddings import EmbeddingTables, draw_blocks
from steadyrank.schema import Schema
from steadyrank.shards import Rows

TABLES = {"user": 70, "item": 1, "tag": 25, "city": 9}
FEATURES = {name: {"kind": "id", "rows": rows, "hashed": False} for name, rows in TABLES.items()}
SCHEMA = Schema(features=FEATURES, tasks={"click": {"kind": "binary"}}, embedding_width=4)
ROWS = sum(slot.rows for slot in SCHEMA.tables.values())


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_whole(generator: torch.Generator) -> Tensor:
    return EmbeddingTables(SCHEMA, 0.5, generator).weights["width_4"].detach()


def cut(ranks: int) -> list[tuple[Rows, ...]]:
    """Cut every table in even pieces, as TorchRec does: the last ones are smaller, or empty."""
    held: list[list[Rows]] = [[] for _ in range(ranks)]
    for name, slot in SCHEMA.tables.items():
        start, step = SCHEMA.slot(name).start, -(-slot.rows // ranks)
        for rank, each in enumerate(held):
            first = min(rank * step, slot.rows)
            each.append(Rows(name, start, slot.rows, first, min(step, slot.rows - first)))
    return [tuple(each) for each in held]


def test_a_matrix_of_one_block_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", 4 * ROWS)
    plain, ours = seeded(), seeded()
    expected = torch.empty(ROWS, 4).uniform_(-0.5 * 3**0.5, 0.5 * 3**0.5, generator=plain)
    assert torch.equal(draw_whole(ours), expected)
    assert torch.equal(ours.get_state(), plain.get_state())


@pytest.mark.parametrize("block", [4 * ROWS, 4 * ROWS - 4, 64, 30, 3], ids=["one", "two", "even", "odd", "a row each"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 60])
def test_ranks_draw_what_one_process_draws(monkeypatch: pytest.MonkeyPatch, ranks: int, block: int) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", block)
    alone = seeded()
    weight, found = draw_whole(alone), torch.full((ROWS, 4), torch.nan)
    for rows in cut(ranks):
        mine = seeded()
        held = _draw(rows, 4, 0.5, mine, torch.device("cpu"))
        for each, piece in zip(rows, held.split([each.count for each in rows]), strict=True):
            first = each.start + each.first
            assert found[first : first + each.count].isnan().all()
            found[first : first + each.count] = piece
        assert torch.equal(mine.get_state(), alone.get_state())
    assert torch.equal(found, weight)


def test_only_the_blocks_are_drawn_that_held_rows_lie_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", 40)

    def blocks(rows: int, *held: tuple[int, int]) -> list[tuple[int, int]]:
        return [(start, end) for start, end, _ in draw_blocks(rows, 4, seeded(), held)]

    assert blocks(35, (0, 35)) == [(0, 10), (10, 20), (20, 30), (30, 35)]
    assert blocks(35, (9, 10), (10, 10), (30, 31)) == [(0, 10), (30, 35)]
    assert blocks(35, (15, 15)) == blocks(35) == []
    assert blocks(10, (3, 3)) == blocks(10) == [(0, 10)], "one block moves the generator on, and so all draw it"


def test_blocks_have_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", 128)
    drawn = torch.stack([torch.rand(128, generator=own) for *_, own in draw_blocks(64_000, 4, seeded(), [(0, 64_000)])])
    assert drawn.shape == (2000, 128)
    assert len(drawn[:, 0].unique()) > 1990, "first numbers are those of 2,000 draws of 24 bits"
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.003)
    assert drawn.var().item() == pytest.approx(1 / 12, rel=0.01)
    next_to = torch.corrcoef(torch.stack([drawn[:-1].reshape(-1), drawn[1:].reshape(-1)]))[0, 1].item()
    places = torch.corrcoef(drawn.t()).fill_diagonal_(0.0)
    assert abs(next_to) < 0.01, "a block and the next: 256,000 pairs, a standard deviation of .002"
    assert places.abs().max() < 0.12, "the numbers of one block, over 2,000 of them: a standard deviation of .022"
    assert not torch.equal(drawn[0], torch.rand(128, generator=next(draw_blocks(99, 4, seeded(8), [(0, 99)]))[2]))


def test_seeds_of_blocks_differ_in_the_bits_that_a_cpu_looks_at() -> None:
    one, other = seeded(5), seeded(5 | 1 << 32)
    assert torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=other)), "all 64 bits count by now"
    mixed = {embeddings._mix(2**32 - 50_000 + i) for i in range(100_000)}
    assert len(mixed) == 100_000
    assert all(0 <= x < 2**32 for x in mixed)
    # MurmurHash3's published finaliser.
    assert [embeddings._mix(x) for x in (0, 1, 2**32 + 1)] == [0, 0x514E28B7, 0x514E28B7]


def test_a_seed_keeps_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", 40)
    weight = draw_whole(seeded())
    assert weight[[0, 10, ROWS - 1], 0].tolist() == pytest.approx([0.3183785, -0.7018810, 0.1769242], abs=1e-7)
