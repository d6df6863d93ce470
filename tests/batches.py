"""Tiny schemas and batches for tests."""

import torch

from steadyrank.schema import Batch, IdFeature, IdsFeature, Ragged, Schema

FEATURES = {
    "user": {"kind": "id", "rows": 40},
    "item": {"kind": "id", "rows": 30},
    "hour": {"kind": "id", "rows": 24, "hashed": False, "width": 3},
    "history": {"kind": "ids", "rows": 30, "table": "item", "pooling": "mean"},
    "tags": {"kind": "ids", "rows": 12, "pooling": "sum"},
    "age": {"kind": "number"},
    "price": {"kind": "number", "transform": "log1p", "standardise": False},
    "place": {"kind": "position", "rows": 5},
}
TASKS = {
    "click": {"kind": "binary"},
    "like": {"kind": "binary", "loss_weight": 0.5},
    "watch": {"kind": "regression", "loss": "huber", "only_where": "click"},
}


def make_schema(*kinds: str) -> Schema:
    """Return a schema of the features of `kinds` (all when none is given) and three tasks."""
    features = {name: feature for name, feature in FEATURES.items() if not kinds or feature["kind"] in kinds}
    return Schema(features=features, tasks=TASKS, embedding_width=4)


def make_batch(schema: Schema, rows: int, seed: int = 0) -> Batch:
    """Return random rows that fit `schema`: some ids null, lists empty, numbers missing, places late, labels masked."""
    generator = torch.Generator().manual_seed(seed)

    def draw_rows(feature: str, count: int) -> torch.Tensor:
        # The slot's first row is the null id's, so about one id in `rows` is null.
        slot = schema.slot(feature)
        return slot.start + torch.randint(slot.rows, (count,), generator=generator)

    def draw_list(feature: str) -> Ragged:
        offsets = torch.zeros(rows + 1, dtype=torch.int64)
        offsets[1:] = torch.randint(4, (rows,), generator=generator).cumsum(0)
        return Ragged(draw_rows(feature, int(offsets[-1])), offsets)

    by_kind = {kind: [n for n, f in schema.features.items() if isinstance(f, kind)] for kind in (IdFeature, IdsFeature)}
    numbers = 3.0 + 2.0 * torch.randn(rows, len(schema.number_features), generator=generator)
    numbers[torch.rand(numbers.shape, generator=generator) < 0.1] = torch.nan
    weights = (torch.rand(rows, len(schema.tasks), generator=generator) < 0.8).float()
    binary = torch.tensor([task.kind == "binary" for task in schema.tasks.values()])
    labels = torch.randn(weights.shape, generator=generator)
    ids = [draw_rows(name, rows) for name in by_kind[IdFeature]]
    return Batch(
        ids=torch.stack(ids, 1) if ids else torch.zeros(rows, 0, dtype=torch.int64),
        lists=tuple(draw_list(name) for name in by_kind[IdsFeature]),
        numbers=numbers,
        positions=torch.randint(-1, 9, (rows, len(schema.position_features)), generator=generator),
        labels=torch.where(binary, (labels > 0).float(), labels) * weights,
        weights=weights,
        time=torch.arange(rows),
        group=torch.randint(5, (rows,), generator=generator),
        row=1000 * seed + torch.arange(rows),
    )
