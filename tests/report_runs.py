"""Made-up runs for the tests of the report: every table, event and file of the instruments' contract, seeded.

In an eventful run the second task dips around 40 % of the run and comes back; from 76 % on the first one is lost. The
layer `BLAMED` leads both.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steadyrank.runs import RunFolder

TASKS = ("click", "like", "watch_time")
BLAMED = "trunk.layers.linear_1.weight"
PARAMETERS = (
    *(f"cross.layers.{i}.{part}" for i in range(2) for part in ("weight", "bias")),
    *(f"trunk.layers.linear_{i}.{part}" for i in range(4) for part in ("weight", "bias")),
    *(f"towers.{task}.linear_{i}.{part}" for task in TASKS for i in range(2) for part in ("weight", "bias")),
)
EMBEDDINGS = ("item", "user", "cross_14", "bag_15", "bucket_19")
Tables = dict[str, dict[str, np.ndarray]]


def make_tables(
    tasks: Sequence[str] = TASKS,
    parameters: Sequence[str] = PARAMETERS,
    *,
    steps: int = 6000,
    every: int = 20,
    dynamics_every: int = 20,
    eventful: bool = True,
    clips: bool = True,
    seed: int = 0,
) -> Tables:
    """Return all tables of a run as columns; the last task is a regression."""
    rng = np.random.default_rng(seed)
    made = {
        "steps": np.arange(every, steps + 1, every),
        "dynamics": np.arange(dynamics_every, steps + 1, dynamics_every),
    }
    made |= {"windows": np.arange(100, steps + 1, 100), "tasks": np.arange(100, steps + 1, 100)}
    made |= {"curvature": np.arange(200, steps + 1, 200)}
    tables: Tables = {name: {"step": at, "time": 1.7e9 + at.astype(float)} for name, at in made.items()}
    for name, fill in (("steps", _steps), ("windows", _windows), ("tasks", _tasks), ("curvature", _curvature)):
        tables[name] |= fill(tables[name]["step"] / steps, tasks, eventful, rng)
    tables["dynamics"] |= _dynamics(tables["dynamics"]["step"] / steps, tasks, parameters, eventful, rng)
    if clips:
        for name in parameters:
            factor = tables["dynamics"][f"factor_clippy/{name}"]
            tables["steps"][f"clip_factor/{name}"] = np.repeat(factor, dynamics_every // every)
    return tables


def write_run(path: Path, tables: Tables, *, eventful: bool = True, optimizer: str = "clippy_adagrad") -> RunFolder:
    """Write a run folder with these tables, and with events, cause reports and a summary that fit them."""
    run = RunFolder.create(path)
    for table, columns in tables.items():
        names = [name for name in columns if name not in ("step", "time")]
        for i, step in enumerate(columns["step"]):
            run.append(table, int(step), {name: float(columns[name][i]) for name in names})
    run.flush()
    end = int(tables["steps"]["step"][-1])
    tasks = [name[5:] for name in tables["steps"] if name.startswith("loss/") and name != "loss/total"]
    if eventful:
        for event in make_events(tasks, end):
            run.event(**event)
        for cause in make_causes(tasks, end):
            run.write_cause(cause["step"], cause)
    run.write_summary(make_summary(path.name, tasks, end, eventful, optimizer))
    run.write_config(
        f"name = '{path.name}'\n[optimizer.dense]\nname = '{optimizer}'\nlr = {0.1 if eventful else 0.02}\n"
    )
    return run


def write_old_run(path: Path) -> RunFolder:
    """Write a small run as it was recorded before there were instruments: 30 steps, 6 windows, no verdicts."""
    run = RunFolder.create(path)
    for step in range(1, 31):
        loss = math.inf if step == 12 else 1 / step
        factor = 0.001 if step == 12 else 1 - 0.01 * step
        row = {"loss/total": 2 * loss, "loss/click": loss, "loss/watch": loss, "speed/rows_per_s": 1000.0}
        run.append("steps", step, row | {"clip_factor/cross.weight": factor, "clip_factor/tower.bias": 1.0})
        if step % 5 == 0:
            row = {"auc/click": 0.6 + step / 300, "baseline_auc/click": 0.61, "attainable_auc/click": 0.75}
            row |= {"normalised_entropy/click": 0.9, "calibration/click": 1.1}
            row |= {"rmse/watch": 2.0, "normalised_rmse/watch": 0.8, "baseline_rmse/watch": 2.25}
            run.append("windows", step, row | {"log/rows": 100.0 * step, "log/time_s": 1.7e9 + step})
    run.flush()
    return run


def old_summary() -> dict[str, Any]:
    """Return what such a run's summary.json held."""
    return {
        "name": "demo",
        "status": "diverged",
        "message": "the loss of click is inf",
        "steps": 30,
        "rows": 3000,
        "seconds": 4000.0,
        "rows_per_s": 1000.0,
        "parameters": {"dense": 12345, "embedding": 10},
        "optimizer": {"dense": "clippy", "tables": "adagrad"},
        "first_time_s": 0.0,
        "last_time_s": 86400.0,
        "missing": {"click": {"null": 3, "non_finite": 1}},
        "tasks": {
            "click": {
                "kind": "binary",
                "run": {"auc": 0.7, "normalised_entropy": 0.9, "gauc": math.nan},
                "last_day": {"auc": 0.72},
                "baseline": {"feature": "item", "auc": 0.65},
                "attainable": {"auc": 0.75},
            },
            "watch": {
                "kind": "regression",
                "run": {"rmse": 2.5, "normalised_rmse": 1.1},
                "last_day": {"rmse": 2.0},
                "baseline": {"feature": "global", "rmse": 2.25},
            },
        },
    }


def make_events(tasks: Sequence[str], end: int) -> list[dict[str, Any]]:
    """Return warnings, verdicts and a step left out, first to last."""
    dip, fall = int(0.40 * end), int(0.76 * end)
    far = {"update_over_weight_max": 0.31, "factor_clippy": 0.02}
    at = {"task": tasks[1], "layer": BLAMED}
    events: list[dict[str, Any]] = [
        {"step": s, "kind": "warning", "message": "updates grow faster than weights", "level": "notice", **at}
        for s in range(dip - 180, dip + 100, 20)
    ]
    reason = "the largest update left its usual range (12 robust deviations)"
    events += [
        {"step": dip - 60, "kind": "warning", "message": reason, "level": "alarm", "quantities": far, **at},
        {"step": dip + 100, "kind": "verdict", "message": f"{tasks[1]} is worse than a constant", "task": tasks[1]}
        | {"verdict": "micro_divergence", "since": dip},
        {"step": dip + 400, "kind": "verdict", "message": f"{tasks[1]} has come back", "task": tasks[1]}
        | {"verdict": "recovered", "since": dip},
        {"step": fall - 200, "kind": "warning", "message": reason, "level": "alarm", "task": "", "layer": BLAMED}
        | {"quantities": far},
        {"step": fall, "kind": "bad_step", "message": f"step {fall}: the gradient of {BLAMED} is not finite"},
        {"step": fall, "kind": "cause", "message": f"{tasks[0]} led, through item 4711", "task": tasks[0]}
        | {"layer": BLAMED, "feature": "item", "file": f"causes/step_{fall}.json"},
        {"step": fall + 200, "kind": "verdict", "message": f"{tasks[0]} is lost", "task": tasks[0]}
        | {"verdict": "full_divergence", "since": fall},
        {"step": fall + 400, "kind": "rollback", "message": "back to the checkpoint of step 4,000 at half the rate"},
    ]
    return sorted(events, key=lambda event: event["step"])


def make_causes(tasks: Sequence[str], end: int) -> list[dict[str, Any]]:
    """Return two cause reports, as `monitors.cause` writes them."""
    fall = int(0.76 * end)
    rows = [
        {"row": 4_600_000 + 7 * i, "loss": 41.5 - i, "gradient": 3.2 - 0.1 * i, "task": tasks[0], "holds": ["item"]}
        | {"columns": {"user": 90 + i, "item": 4711, "note": None}}
        for i in range(12)
    ]
    features = [
        {"feature": "item", "view": "share", "score": 26.8, "value": 4711, "now": 0.42, "usual": 0.0014}
        | {"held_frac": 0.44, "held_worst": 10, "same_as": ["item_hash"]},
        {"feature": "hour", "view": "middle", "score": 5.1, "value": None, "now": 3.0, "usual": 14.0}
        | {"held_frac": 0.6, "held_worst": 7, "same_as": []},
    ]
    readings = {
        task: {"loss": 3.4 - k, "usual_loss": 0.36, "loss_score": 22.0 - 9 * k, "gradient_frac": 0.9 / (1 + 9 * k)}
        | {"gradient_score": 31.0 - 12 * k}
        for k, task in enumerate(tasks[:2])
    }
    sentence = (
        f"{tasks[0]} led: its loss was 38 times its usual one. {BLAMED} left its range first, at step {fall - 40}: its "
        "update over weight, by 12.3 deviations. item 4711 has 42.0% of the rows, usually 0.1% (44% of the rows, 10 of "
        "the 10 worst; item_hash likewise). The same batch is bad on the state of 100 steps earlier too: the data."
    )
    layer = {"name": BLAMED, "measure": "update over weight", "step": fall - 40, "score": 12.3}
    one = {"step": fall, "why": "the largest update left its usual range", "task": tasks[0], "layer": layer}
    one |= {"state_or_data": "data", "earlier_steps": 100, "tasks": readings, "rows": rows, "odd_rows": rows[:3]}
    one |= {"features": features, "sentence": sentence, "feature": "item"}
    other = {"step": fall + 40, "why": "its loss is not finite", "task": "", "layer": None, "state_or_data": "unknown"}
    return [one, other | {"rows": [], "features": [], "tasks": {}, "sentence": "No feature and no label is unusual."}]


def make_summary(name: str, tasks: Sequence[str], end: int, eventful: bool, optimizer: str) -> dict[str, Any]:
    """Return the summary of a finished run."""
    dip, fall = int(0.40 * end), int(0.76 * end)
    healthy: dict[str, Any] = {"verdict": "healthy", "since": None, "episodes": []}
    verdicts = dict.fromkeys(tasks, healthy)
    if eventful:
        reason = "normalised entropy 2.1, worse than a constant"
        verdicts[tasks[0]] = {"verdict": "full_divergence", "since": fall} | {
            "episodes": [{"first": fall, "last": None, "reason": reason}]
        }
        verdicts[tasks[1]] = {"verdict": "micro_divergence", "since": dip} | {
            "episodes": [{"first": dip, "last": dip + 400, "reason": "a window 11 deviations above those before"}]
        }
    return {
        "name": name,
        "status": "finished",
        "message": "",
        "steps": end,
        "rows": end * 512,
        "seconds": end / 40,
        "rows_per_s": 20480.0,
        "parameters": {"dense": 1_234_567, "embedding": 45_000_000},
        "optimizer": {"dense": optimizer, "tables": "adagrad"},
        "first_time_s": 1.7e9,
        "last_time_s": 1.7e9 + end * 60,
        "bad_steps": int(eventful),
        "missing": {"item": {"null": 30, "non_finite": 0}},
        "tasks": {task: _outcome(task, task == tasks[-1], i, verdicts[task]) for i, task in enumerate(tasks)},
    }


def _outcome(task: str, regression: bool, place: int, verdict: Mapping[str, Any]) -> dict[str, Any]:
    if regression:
        run, base = {"rmse": 1.2, "normalised_rmse": 0.82, "mae": 0.9, "rows": 9000}, {"feature": "item", "rmse": 1.3}
        return {"kind": "regression", "run": run, "last_day": {"rmse": 1.1}, "baseline": base, "verdict": verdict}
    run = {"auc": 0.70 + 0.01 * place, "gauc": 0.66, "log_loss": 0.4, "normalised_entropy": 0.9, "calibration": 1.01}
    return {"kind": "binary", "run": run, "last_day": {"auc": 0.72}, "baseline": {"feature": "item", "auc": 0.68}} | {
        "verdict": verdict
    }


def _disturbance(share: np.ndarray, place: int, eventful: bool) -> np.ndarray:
    """Return how far a task at a place is off, 0 to 1: the second dips, the first is lost."""
    if not eventful or place > 1:
        return np.zeros(len(share))
    if place == 0:
        return np.clip((share - 0.76) / 0.02, 0, 1)
    return np.exp(-(((share - 0.43) / 0.02) ** 2))


def _steps(share: np.ndarray, tasks: Sequence[str], eventful: bool, rng: np.random.Generator) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for place, task in enumerate(tasks):
        off = _disturbance(share, place, eventful)
        loss = 0.35 + 0.05 * place + 0.3 * np.exp(-share * 12) + rng.normal(0, 0.01, len(share)) + 3 * off
        columns[f"loss/{task}"] = loss
        columns[f"loss_max/{task}"] = loss * (1.1 + rng.exponential(0.05, len(share)))
        columns[f"logit_max/{task}"] = 4 + 40 * off + rng.normal(0, 0.1, len(share))
    columns["loss/total"] = np.sum([columns[f"loss/{task}"] for task in tasks], axis=0)
    columns |= {"bad_steps/total": (share > 0.76) * float(eventful), "log/rows": share * 3e6}
    return columns | {"speed/rows_per_s": 20_000 + rng.normal(0, 400, len(share))}


def _windows(
    share: np.ndarray, tasks: Sequence[str], eventful: bool, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {"log/rows": share * 3e6, "log/time_s": 1.7e9 + share * 86400 * 3}
    for place, task in enumerate(tasks):
        off = _disturbance(share, place, eventful)
        learned = 1 - np.exp(-share * 8)
        if task == tasks[-1]:
            columns[f"normalised_rmse/{task}"] = 1.02 - 0.2 * learned + rng.normal(0, 0.004, len(share))
            columns[f"rmse/{task}"] = 1.45 * columns[f"normalised_rmse/{task}"]
            columns[f"baseline_rmse/{task}"] = 1.3 + rng.normal(0, 0.004, len(share))
            continue
        better = (0.5 + 0.2 * learned + 0.015 * place) * (1 - off) + 0.5 * off
        columns[f"auc/{task}"] = better + rng.normal(0, 0.003, len(share))
        columns[f"baseline_auc/{task}"] = 0.66 + 0.01 * place + rng.normal(0, 0.002, len(share))
        columns[f"normalised_entropy/{task}"] = 1.02 - 0.12 * learned + 1.2 * off + rng.normal(0, 0.004, len(share))
        columns[f"calibration/{task}"] = 1 + 0.4 * off + rng.normal(0, 0.02, len(share))
    return columns


def _tasks(share: np.ndarray, tasks: Sequence[str], eventful: bool, rng: np.random.Generator) -> dict[str, np.ndarray]:
    size_KT = np.stack([0.3 + 6 * _disturbance(share, k, eventful) for k in range(len(tasks))])
    size_KT *= np.exp(rng.normal(0, 0.1, size_KT.shape))
    columns = {f"task_gradient_norm/{task}": size_KT[k] for k, task in enumerate(tasks)}
    columns |= {f"task_share_frac/{task}": size_KT[k] / size_KT.sum(axis=0) for k, task in enumerate(tasks)}
    for a, one in enumerate(tasks):
        for other in tasks[a + 1 :]:
            against = _disturbance(share, a, eventful)
            columns[f"task_cosine/{one}|{other}"] = np.clip(0.2 - 0.9 * against + rng.normal(0, 0.1, len(share)), -1, 1)
    return columns


def _curvature(
    share: np.ndarray, tasks: Sequence[str], eventful: bool, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    room = {task: 12 / (1 + 15 * _disturbance(share + 0.02, k, eventful)) for k, task in enumerate(tasks)}
    room["total"] = np.min(list(room.values()), axis=0)
    columns = {f"headroom/{name}": values * np.exp(rng.normal(0, 0.15, len(share))) for name, values in room.items()}
    columns |= {f"headroom_next/{name}": 0.8 * columns[f"headroom/{name}"] for name in room}
    return columns | {"critical_sharpness/total": 40 / columns["headroom/total"]}


def _dynamics(
    share: np.ndarray, tasks: Sequence[str], parameters: Sequence[str], eventful: bool, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    blamed = list(parameters).index(BLAMED) if BLAMED in parameters else 0
    off = np.maximum(_disturbance(share + 0.01, 0, eventful), _disturbance(share + 0.01, 1, eventful))
    for place, name in enumerate(parameters):
        noise = np.exp(rng.normal(0, 0.2, len(share)))
        size = noise * (1 + 60 * off * np.exp(-abs(place - blamed) / 3))
        weight = 8.0 if name.endswith("weight") else 0.7
        direction = np.minimum(0.05 * size, 3.0)
        columns |= {f"gradient_norm/{name}": 0.02 * size, f"weight_norm/{name}": np.full(len(share), weight)}
        columns |= {f"update_norm/{name}": 0.004 * size, f"gradient_over_weight/{name}": 0.02 * size / weight}
        columns |= {f"update_over_weight/{name}": 0.004 * size / weight, f"direction_max/{name}": direction}
        columns |= {f"factor_gc/{name}": np.minimum(1, 0.1 / (0.02 * size))}
        columns |= {f"factor_agc/{name}": np.minimum(1, 0.01 * weight / (0.02 * size))}
        columns |= {f"factor_lamb/{name}": np.clip(0.1 * weight / (4 * size), 0, 3)}
        columns |= {f"factor_clippy/{name}": np.minimum(1, 0.06 / direction)}
    for i in range(4):
        columns[f"dead_frac/trunk.layers.activation_{i}"] = np.clip(
            0.03 + 0.02 * i + 0.5 * (share > 0.77) * eventful + rng.normal(0, 0.005, len(share)), 0, 1
        )
    for task in tasks:
        place = list(tasks).index(task)
        lost = _disturbance(share, place, eventful)
        columns |= {f"saturated_frac/{task}": 0.01 + 0.6 * lost, f"logit_high/{task}": 3 + place + 40 * lost}
        columns |= {f"logit_low/{task}": -5 - place - 25 * lost}
        load_ET = rng.dirichlet(np.array([4.0, 3.0, 2.0, 1.0]), len(share)).T
        columns |= {f"expert_load_frac/{task}.{e}": load_ET[e] for e in range(4)}
        columns[f"gate_entropy_frac/{task}"] = -(load_ET * np.log(load_ET + 1e-12)).sum(axis=0) / np.log(4)
    for place, table in enumerate(EMBEDDINGS):
        columns |= {f"rows_touched/{table}": rng.integers(100, 500, len(share)).astype(float)}
        columns |= {
            f"row_update_max/{table}": 0.01 * np.exp(rng.normal(0, 0.4, len(share))) * (1 + 90 * off * (place == 0))
        }
        columns |= {f"effective_rank/{table}": 12 - 5 * share * (place == 0) + rng.normal(0, 0.1, len(share))}
        columns |= {f"row_norm_max/{table}": 0.5 + 2 * share, f"row_norm_max_row/{table}": np.full(len(share), 4711.0)}
        columns |= {f"row_norm_max_age_steps/{table}": np.full(len(share), 40.0 * place)}
    return columns
