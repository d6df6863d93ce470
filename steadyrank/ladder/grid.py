"""What a ladder varies: rates x seeds x optimizers x models x incidents, and the run that each cell is."""

import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ..config import RunConfig, parse_toml, read_text
from ..data.stream import StreamConfig
from ..errors import ConfigError, nearest
from ..settings import Settings, merge

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
_REPLACES = ("name", "kind", "source")
"""A table that says which of several things it is replaces the one that stood there; any other is merged into it."""
_GIVE_UP = 10
_MOST_CELLS, _MOST_SEEDS, _MOST_LETTERS = 20_000, 1000, 100


def _count(value: Any) -> Any:
    """Let a number of seeds stand for the first so many."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if not 0 < value <= _MOST_SEEDS:
        raise ValueError(f"expected 1 to {_MOST_SEEDS} seeds, or a list of them")
    return tuple(range(value))


def _check_distinct(name: str, values: Sequence[float | int] | None) -> None:
    if len(set(values or ())) < len(values or ()):
        raise ValueError(f"{name}: each may stand there once, got {', '.join(f'{value:g}' for value in values or ())}")


class Variant(Settings):
    """A model or an incident of a ladder: in what it differs from the run's own settings."""

    set_: dict[str, Any] = Field(default={}, alias="set")
    """Settings of the run, nested as in its TOML. A table with a `name`, `kind` or `source` replaces the run's own."""


class Method(Variant):
    """An optimizer of a ladder: in what it differs from the run's own settings."""

    rates: tuple[Rate, ...] | None = Field(default=None, min_length=1)
    """Its own learning rates; the ladder's when left out."""
    family: str | None = None
    """Settings of one method with the same family stand for it by their best one; its own name when left out."""

    @model_validator(mode="after")
    def _consistent(self) -> "Method":
        _check_distinct("rates", self.rates)
        return self


class LadderConfig(Settings):
    """What `steadyrank ladder` varies. Every combination is a cell, and every cell a run."""

    run: str | None = None
    """Another run's TOML file, by its path from this one: its settings hold where this file says nothing."""
    vary: str = "optimizer.dense.lr"
    """The setting that is the ladder's rate. Any other number of a run can stand here, too."""
    multiples: tuple[Rate, ...] = Field(default=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0), min_length=1)
    """The rungs, as multiples of the value that the run (or an optimizer of the ladder) has there itself."""
    rates: tuple[Rate, ...] | None = Field(default=None, min_length=1)
    """The rungs as they are, instead of multiples."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], BeforeValidator(_count)] = Field(
        default=(0, 1, 2), min_length=1
    )
    """Seeds, or how many. A seed decides the weights and the shuffle, and the generated stream where there is one."""
    vary_data: bool = True
    """Whether the seed also decides the generated stream."""
    optimizers: dict[str, Method] = Field(default={})
    """Optimizers by name; the run's own alone when empty."""
    models: dict[str, Variant] = Field(default={})
    """Models by name; the run's own alone when empty."""
    incidents: dict[str, Variant] = Field(default={})
    """What happens to the data, by name; nothing more than the run's own when empty."""
    valid: tuple[Share, Share] = (0.6, 0.8)
    """The stretch of the log, as shares of its rows, by whose progressive metrics rates and settings are chosen."""
    test: tuple[Share, Share] = (0.8, 1.0)
    """The stretch whose progressive metrics are reported."""
    workers: int | None = Field(default=None, ge=1, le=1024)
    """Cells trained at once; when left out, one for each core, or one where there is a GPU."""
    keep_checkpoints: bool = False
    """Keep the weights of finished cells; else only what they left in readings and events."""

    @model_validator(mode="after")
    def _consistent(self) -> "LadderConfig":
        for name in ("valid", "test"):
            first, last = getattr(self, name)
            if first >= last:
                raise ValueError(f"{name}: expected [from, to] with from < to, got [{first:g}, {last:g}]")
        for name in ("multiples", "rates", "seeds"):
            _check_distinct(name, getattr(self, name))
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a ladder."""

    optimizer: str
    family: str
    model: str
    incident: str
    rate: float
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return self.config.name


@dataclass(frozen=True)
class Ladder:
    """A run's settings, and what is varied around them."""

    name: str
    config: LadderConfig
    raw: Mapping[str, Any]
    """The run's own settings as they were given."""

    def cells(self) -> list[Cell]:
        """Return all cells: every seed in turn, so that a ladder that is stopped has compared like with like.

        Raises:
            ConfigError: A combination is no valid run.
        """
        found = list(self._cells())
        names: dict[str, Cell] = {}
        for cell in found:
            if cell.name in names:
                raise ConfigError(f"two cells of the ladder are called '{cell.name}'; give clearer names")
            names[cell.name] = cell
        return found

    def workers(self) -> int:
        """Return how many cells are trained at once."""
        if self.config.workers is not None:
            return self.config.workers
        return 1 if torch.cuda.is_available() else _count_cores()

    def _cells(self) -> Iterator[Cell]:
        config = self.config
        incidents = config.incidents or {"": Variant()}
        models = config.models or {"": Variant()}
        methods = config.optimizers or {"": Method()}
        arms = [
            (incident, model, name, methods[name], change(change(change(self.raw, i.set_), m.set_), methods[name].set_))
            for incident, i in incidents.items()
            for model, m in models.items()
            for name in methods
        ]
        plain = [(*arm, self._validated(arm[-1], arm[:3])) for arm in arms]
        rungs = [self._rates(method, own) for *_, method, _, own in plain]
        if (count := sum(map(len, rungs)) * len(config.seeds)) > _MOST_CELLS:
            raise ConfigError(
                f"the ladder has {count:,} cells, and at most {_MOST_CELLS:,} are trained; leave some out"
            )
        for seed in config.seeds:
            for (incident, model, name, method, raw, own), rates in zip(plain, rungs, strict=True):
                label = name or own.optimizer.dense.name
                for rate in rates:
                    parts = [part for part in (incident, model, label) if part]
                    title = _slug("-".join([*parts, f"{rate:g}", f"s{seed}"]))
                    made = self._finished(raw, own, title, rate, seed)
                    yield Cell(label, method.family or label, model, incident, float(rate), seed, made)

    def _validated(self, raw: Mapping[str, Any], names: tuple[str, ...]) -> RunConfig:
        where = " ".join(["the ladder's run", *(f"'{name}'" for name in names if name)])
        own = RunConfig.from_dict(raw, where)
        if not own.watch.enabled:
            raise ConfigError(f"{where}: a ladder counts what the instruments see; leave watch.enabled = true")
        return own

    def _rates(self, method: Method, own: RunConfig) -> tuple[float, ...]:
        value, rates = find_setting(own, self.config.vary), method.rates or self.config.rates
        if rates is not None:
            return rates
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(
                f"ladder.vary = '{self.config.vary}': expected a number above 0 there to multiply, found {value!r}; "
                "set one, or give ladder.rates"
            )
        return tuple(float(f"{multiple * value:.6g}") for multiple in self.config.multiples)

    def _finished(self, raw: Mapping[str, Any], own: RunConfig, title: str, rate: float, seed: int) -> RunConfig:
        """Return a cell's configuration: without what a run writes for people who look at it alone."""
        if len(title) > _MOST_LETTERS:
            raise ConfigError(
                f"the ladder's cell '{title}' has a name of {len(title)} letters, and {_MOST_LETTERS} are the most; "
                "give its model, optimizer or incident a shorter one"
            )
        more: dict[str, Any] = {"seed": seed, "train": {"report": False}, "watch": {"causes": 0}}
        more |= {"trackers": {"tensorboard": False}}
        if own.train.give_up_windows is None:
            more["train"]["give_up_windows"] = _GIVE_UP
        if own.train.follow:
            more["train"]["follow"] = False  # it would wait for ever, and the next cell for it
        if own.train.threads is None and not torch.cuda.is_available():
            more["train"]["threads"] = max(1, _count_cores() // self.workers())
        if isinstance(own.data, StreamConfig) and self.config.vary_data:
            more["data"] = {"seed": seed}
        made = change(raw, more) | {"name": title}
        place = made
        *path, last = self.config.vary.split(".")
        for key in path:
            place = place.setdefault(key, {})
        place[last] = rate
        return RunConfig.from_dict(made, f"the ladder's cell '{title}'")


def _count_cores() -> int:
    """Return how many cores this process may use; where the system does not say, how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_ladder(path: str | Path, overrides: Sequence[str] = ()) -> Ladder:
    """Read a run's TOML file, and its table [ladder] where it has one.

    Raises:
        ConfigError: There is no such file, or what it says cannot be.
    """
    raw = parse_toml(read_text(path), overrides, str(path))
    try:
        config = LadderConfig.model_validate(raw.pop("ladder", {}))
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path))) from error
    if config.run is not None:
        base = Path(path).parent / config.run
        raw = change(parse_toml(read_text(base), (), str(base)), raw)
        raw.pop("ladder", None)
        config = config.model_copy(update={"run": None})
    return Ladder(str(raw.get("name", "run")), config, raw)


def change(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a run with others merged in; a table that says what it is replaces the one that stood there.

    >>> change({"dense": {"name": "adam", "eps": 1e-6}}, {"dense": {"lr": 0.1}})
    {'dense': {'name': 'adam', 'eps': 1e-06, 'lr': 0.1}}
    >>> change({"dense": {"name": "adam", "eps": 1e-6}}, {"dense": {"name": "sgd"}})
    {'dense': {'name': 'sgd'}}
    """
    return deepcopy(merge(base, more, _replaces))


def _replaces(table: Mapping[str, Any]) -> bool:
    """Say whether a table says what it is; a feature that is called `source` is a table itself."""
    return any(isinstance(table.get(key), str) for key in _REPLACES)


def find_setting(config: RunConfig, path: str) -> Any:
    """Return what stands at a path of a run's settings.

    Raises:
        ConfigError: There is no such setting.
    """
    place: Any = config.model_dump(by_alias=True)
    for key in path.split("."):
        if not isinstance(place, Mapping) or key not in place:
            known = sorted(place) if isinstance(place, Mapping) else []
            raise ConfigError(f"ladder.vary = '{path}': there is no '{key}'{nearest(key, known)}")
        place = place[key]
    return place


def _slug(text: str) -> str:
    """Return a text as a name that a run can have.

    >>> _slug("clippy 0.5/λ"), _slug("_new")
    ('clippy_0.5__', 'new')
    """
    letters = (letter if (letter.isalnum() and letter.isascii()) or letter in "._-" else "_" for letter in text)
    return "".join(letters).lstrip("._-") or "cell"


def _explain(error: ValidationError, where: str) -> str:
    return f"{where}: " + "\n".join(_explain_one(detail) for detail in error.errors()[:20])


def _explain_one(detail: ErrorDetails) -> str:
    path, message = ".".join(map(str, ("ladder", *detail["loc"]))), detail["msg"].removeprefix("Value error, ")
    if detail["type"] != "extra_forbidden":
        shown = "" if isinstance(detail["input"], Mapping) else f", found {str(detail['input'])[:80]}"
        return f"'{path}': {message[0].lower()}{message[1:]}{shown}"
    *above, key = map(str, detail["loc"])
    place: type[Settings] = LadderConfig if not above else Method if above[0] == "optimizers" else Variant
    known = [field.alias or name for name, field in place.model_fields.items()]
    hint = nearest(key, known)
    if above and key in ("schema", *RunConfig.model_fields):
        hint = f"; the run's settings stand under set, as 'ladder.{'.'.join(above)}.set.{key}'"
    return f"unknown key '{path}'{hint} (valid here: {', '.join(known)})"
