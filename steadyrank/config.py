"""One run's configuration: the parts' configs together, from TOML and back to TOML."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
import torch
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from . import native
from .data.logs import LogsConfig, ParquetLog, Reader, ReaderConfig, Source
from .data.stream import Stream, StreamConfig
from .distributed.agreement import check_together
from .distributed.engine import DistributedConfig, describe_ranks, make_engine
from .errors import CheckpointError, ConfigError, near_path, nearest
from .models.embeddings import EmbeddingTables, MakeTables
from .models.memory import check_memory, dense_bytes
from .models.ranker import ModelConfig, Ranker
from .monitors.watch import WatchConfig
from .optim import (
    ClippyAdamConfig,
    OptimizerConfig,
    RowWiseAdagradConfig,
    advice,
    build_optimizer,
    split_parameters,
    state_bytes_per_row,
)
from .precision import Precision, choose_precision
from .ranks import ALONE, Ranks, local_size
from .recovery import RecoveryConfig
from .runs import RunFolder
from .schema import Schema
from .sequential import Parts, TrainConfig, find_device
from .settings import Settings, merge
from .trackers import TrackersConfig

_MOST_LETTERS = 1 << 20
"""Of a configuration; one of a thousand features has a tenth."""
_MOST_ERRORS = 20
DataConfig = Annotated[LogsConfig | StreamConfig, Field(discriminator="source")]


class OptimizersConfig(Settings):
    """Dense parameters and embedding tables each have their own optimizer and rate."""

    dense: OptimizerConfig = ClippyAdamConfig(lr=0.016)
    """Every parameter but the embedding tables."""
    tables: OptimizerConfig = RowWiseAdagradConfig()
    """The embedding tables (sparse gradients)."""

    @model_validator(mode="before")
    @classmethod
    def _name_the_default(cls, data: Any) -> Any:
        """A part that gives options but no name means the default optimizer, with these options changed."""
        if not isinstance(data, Mapping):
            return data
        usual = {
            part: {"name": field.default.name, **field.default.model_dump(exclude_unset=True)}
            for part, field in cls.model_fields.items()
        }
        return {
            part: {**usual[part], **given}
            if part in usual and isinstance(given, Mapping) and "name" not in given
            else given
            for part, given in data.items()
        }


class RunConfig(Settings):
    """All that a run needs, apart from the log itself."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Names the run and its folder: letters, digits, dot, dash and underscore, up to 100."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides the initial weights and the shuffle; the same seed gives the same run on CPU, bit for bit."""
    data: DataConfig
    """The log."""
    reader: ReaderConfig = ReaderConfig()
    """Windows and batches."""
    schema_: Schema = Field(alias="schema")
    """What the columns mean."""
    model: ModelConfig = ModelConfig()
    """From features to logits."""
    optimizer: OptimizersConfig = OptimizersConfig()
    """How weights move."""
    train: TrainConfig = TrainConfig()
    """The loop."""
    watch: WatchConfig = WatchConfig()
    """The instruments."""
    recovery: RecoveryConfig = RecoveryConfig()
    """What is done when something goes wrong."""
    distributed: DistributedConfig = DistributedConfig()
    """How several processes train together."""
    trackers: TrackersConfig = TrackersConfig()
    """Where readings are shown, besides the run folder."""

    @model_validator(mode="after")
    def _follows_a_log(self) -> "RunConfig":
        if self.train.follow and isinstance(self.data, StreamConfig):
            raise ValueError("train.follow: a generated stream never grows; give data.path, the folder of a log")
        return self

    @model_validator(mode="after")
    def _is_watched(self) -> "RunConfig":
        if self.train.give_up_windows is not None and not self.watch.enabled:
            raise ValueError("train.give_up_windows: only the instruments see a divergence; set watch.enabled = true")
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Data without a source is a log; a generated stream knows what its columns mean, but for what is given."""
        if not isinstance(data, Mapping):
            return data
        source = data.get("data")
        if isinstance(source, Mapping):
            source = {"source": "logs", **source}
            data = {**data, "data": source}
        if not isinstance(source, StreamConfig) and not (isinstance(source, Mapping) and source["source"] == "stream"):
            return data
        given = data.get("schema", data.get("schema_", {}))
        if not isinstance(given, Mapping) or {"features", "tasks"} <= given.keys():  # a whole schema
            return data
        rest = {key: value for key, value in data.items() if key not in ("schema", "schema_")}
        try:
            stream = StreamConfig.model_validate(source)
        except ValidationError:
            return rest  # refused again below, under its full path
        own = Stream(stream).schema()
        return {**rest, "schema": merge(own.model_dump(), given) if given else own}

    def source(self, *, grows: bool = False) -> Source:
        """Open the log; where it `grows`, files that do not fit are passed over and reported in the run."""
        if isinstance(self.data, StreamConfig):
            return Stream(self.data)
        return ParquetLog(self.data, self.schema_.time, lenient=grows or self.train.follow)

    def build_reader(self, source: Source | None = None, *, pin_memory: bool = False, ranks: Ranks = ALONE) -> Reader:
        """Open the log (or `source` instead) as windows and batches; for a GPU they can be put where it reads fast.

        Each of several ranks is given its rows of every batch.
        """
        reader = self.reader
        if self.train.follow:  # so that it does not matter when a file came
            reader = reader.model_copy(update={"window_per_file": True})
        made = Reader(source or self.source(), self.schema_, reader, self.seed, pin_memory=pin_memory, ranks=ranks)
        self.check_memory(made, ranks)
        return made

    def check_memory(self, reader: Reader, ranks: Ranks = ALONE) -> str:
        """Say what memory the run takes; of several ranks, what this one does.

        Raises:
            ConfigError: This machine has not so much.
        """
        config = reader.config
        window_rows = min(config.window_rows, reader.rows) if config.window_hours is None else 0
        return check_memory(
            self.schema_,
            self.model,
            window_rows=(window_rows + min(config.read_ahead, reader.rows - window_rows)) // ranks.size,
            batch_rows=min(config.batch_size, window_rows) // ranks.size,
            state_bytes=partial(state_bytes_per_row, self.optimizer.tables),
            processes=1 if ranks.is_alone else local_size(),
            shards=self._shards(ranks),
        )

    def _shards(self, ranks: Ranks) -> int:
        """Return over how many ranks the tables are spread."""
        return ranks.size if not ranks.is_alone and self.distributed.shards_tables else 1

    def build_model(self, ranks: Ranks = ALONE, device: torch.device | None = None) -> Ranker:
        """Make the model, its weights decided by the seed: the same for any number of ranks.

        Raises:
            ConfigError: This machine has no memory for it.
        """
        check_memory(self.schema_, self.model, shards=self._shards(ranks))
        made = torch.Generator().manual_seed(self.seed)
        tables: MakeTables = EmbeddingTables
        if not ranks.is_alone and self.schema_.tables and self.distributed.shards_tables:
            from .distributed.sharded import ShardedTables

            tables = partial(
                ShardedTables,
                ranks=ranks,
                device=device or torch.device("cpu"),
                batch_rows=-(-self.reader.batch_size // ranks.size),
                dense_bytes=dense_bytes(self.schema_, self.model),
                state_bytes=partial(state_bytes_per_row, self.optimizer.tables),
                budget_bytes=None if self.distributed.memory_gb is None else int(self.distributed.memory_gb * 1e9),
            )
        model = Ranker(self.schema_, self.model, made, tables)
        model.precision = self.choose_precision(model, torch.device("cpu")).dtype
        return model

    def choose_precision(self, model: Ranker, device: torch.device) -> Precision:
        """Decide in which precision the layers of `model` compute on `device`."""
        return choose_precision(self.train.precision, device, model.summary().dense, self.reader.batch_size)

    def build_optimizers(self, model: Ranker) -> dict[str, torch.optim.Optimizer]:
        """Make the optimizers: "dense", and "tables" where the model has embedding tables."""
        dense, tables = split_parameters(model, model.table_names())
        made = {"dense": build_optimizer(self.optimizer.dense, dense)}
        if tables:
            made["tables"] = build_optimizer(self.optimizer.tables, tables, sparse=True)
        return made

    def build(
        self,
        source: Source | None = None,
        *,
        resume: bool = False,
        announce: Callable[[str], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> Parts:
        """Make everything that a run needs.

        Args:
            source: In place of the log that the configuration names.
            resume: To go on with a run: the log may have grown.
            announce: Called, before anything large is made, with what memory it takes.
            ranks: Who trains together; all build together.

        Raises:
            ConfigError, DataError: The log cannot be opened, or lacks a column; or the ranks are not alike.
        """
        settings = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        check_together(settings, self.distributed, ranks)
        device = find_device(self.train.device)
        source = source or self.source(grows=resume)
        reader = self.build_reader(source, pin_memory=device.type == "cuda", ranks=ranks.another())
        if announce is not None:
            announce(self.check_memory(reader, ranks))
        native.prepare()  # the compiler runs while weights are drawn and the first window is read
        model = self.build_model(ranks, device)
        summary, precision = model.summary(), self.choose_precision(model, device)
        model.precision = precision.dtype
        optimizers = self.build_optimizers(model)
        bound = {part: line for part, each in optimizers.items() for line in advice.lines(each, model)}
        engine = make_engine(model.to(device), ranks, self.distributed)
        if engine is not None:
            optimizers = self.build_optimizers(model)  # anew: FSDP2 puts other parameters in their place
        embedding = sum(slot.rows * slot.width for slot in self.schema_.tables.values())
        facts = {
            "parameters": {"dense": summary.dense, "embedding": embedding},
            "optimizer": {part: _one_line(getattr(self.optimizer, part)) for part in optimizers},
            "precision": str(precision),
            "bound": bound,
            **({} if engine is None else {"ranks": describe_ranks(engine, reader.idle_ranks)}),
        }
        return Parts(
            self.name,
            self.schema_,
            reader,
            model,
            optimizers,
            self.train,
            device,
            watch=self.watch,
            recovery=self.recovery,
            trackers=self.trackers,
            engine=engine,
            precision=precision,
            settings=settings,
            facts=facts,
        )

    def to_toml(self) -> str:
        """Return the whole configuration as TOML; `load` of it gives an equal object."""
        return tomli_w.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True))

    @classmethod
    def from_toml(cls, text: str, overrides: Sequence[str] = (), where: str = "the configuration") -> "RunConfig":
        """Read a configuration.

        Args:
            text: TOML.
            overrides: `part.field=value` each, the value as TOML has it (a bare word is a string).
            where: Names the text in messages.

        Raises:
            ConfigError: Not TOML, an unknown key (with its path and the nearest name), or a value out of range.
        """
        data = parse_toml(text, overrides, where)
        data.pop("ladder", None)  # read by `steadyrank ladder` alone: one file is a run, and a ladder of such runs
        return cls.from_dict(data, where)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the configuration") -> "RunConfig":
        """Make a configuration of what `parse_toml` returned.

        Args:
            data: Tables and values, as TOML has them.
            where: Names them in messages.

        Raises:
            ConfigError: An unknown key (with its path and the nearest name), or a value out of range.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(error, data, where)) from error


def parse_toml(text: str, overrides: Sequence[str] = (), where: str = "the configuration") -> dict[str, Any]:
    """Read TOML, and set in it what the overrides say; whether such keys exist is seen later.

    >>> parse_toml("[train]\\nlog_every = 5", ["train.log_every=7", "name=other"])
    {'train': {'log_every': 7}, 'name': 'other'}

    Args:
        text: TOML.
        overrides: `part.field=value` each, the value as TOML has it (a bare word is a string).
        where: Names the text in messages.

    Raises:
        ConfigError: Not TOML, or an override that cannot be read.
    """
    try:
        if len(text) > _MOST_LETTERS:
            raise ValueError(f"it has {len(text):,} letters, and at most {_MOST_LETTERS:,} are read")
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of a number of 10,000 digits, of a thousand nested lists, too
        raise ConfigError(f"{where}: not TOML: {error}") from error
    for override in overrides:
        _override(data, override)
    return data


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML file, with `--set` overrides.

    Raises:
        ConfigError: There is no such file, or what it says cannot be.
    """
    return RunConfig.from_toml(read_text(path), overrides, str(path))


def read_text(path: str | Path) -> str:
    """Return what a configuration file holds.

    Raises:
        ConfigError: There is no such file, or it is not text.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:  # a pipe, perhaps
            return file.read(_MOST_LETTERS + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file '{path}'{near_path(path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read as a text file: {error}") from error


def demo(overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of `steadyrank demo`."""
    text = (resources.files(__package__) / "demo.toml").read_text(encoding="utf-8")
    return RunConfig.from_toml(text, overrides, "the demo's configuration")


def open_source(path: str, schema: Schema | None = None) -> ParquetLog:
    """Open a log by its path."""
    return ParquetLog(LogsConfig(path=path), schema.time if schema else "")


def trained(run: str | Path) -> tuple[RunConfig, Ranker]:
    """Return a run's configuration, and its model as the newest checkpoint has it, in eval mode.

    Raises:
        CheckpointError: No run folder, no checkpoint, or one that is damaged.
    """
    folder = RunFolder.open(run)
    config = RunConfig.from_toml(folder.config_text(), where=str(folder.path))
    model = config.build_model()
    state = folder.checkpoints.load()
    try:
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder.path}: the checkpoint does not fit its own config.toml: {error}") from error
    return config, model.eval()


def _one_line(config: OptimizerConfig) -> str:
    """Show an optimizer in a few words: its name, rate and clip."""
    clip = f", {config.clip.name}" if config.clip is not None else ""
    return f"{config.name} (lr {config.lr:g}{clip})"


def _override(data: dict[str, Any], override: str) -> None:
    """Set one `part.field=value` in the raw configuration."""
    path, equals, value = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"--set '{override}': expected part.field=value, such as optimizer.dense.lr=0.2")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set '{override}': '{key}' is a value and has no fields")
    data[keys[-1]] = parsed


def _explain(error: ValidationError, data: Mapping[str, Any], where: str) -> str:
    """Say what is wrong with each key: its path, what was expected, what came, and the nearest valid name."""
    details = error.errors()
    if any(detail["loc"][:1] == ("data",) for detail in details):  # a stream that is wrong cannot bring its schema
        details = [detail for detail in details if detail["loc"] != ("schema",)]
    lines = [_explain_one(detail, data) for detail in details[:_MOST_ERRORS]]
    if len(details) > _MOST_ERRORS:
        lines.append(f"and {len(details) - _MOST_ERRORS} more")
    return "\n".join([f"{where}: {lines[0]}", *lines[1:]])


def _explain_one(detail: ErrorDetails, data: Any) -> str:
    path, place = [], data
    loc = list(detail["loc"])
    for i, part in enumerate(loc):
        if isinstance(place, Mapping) and part not in place and i < len(loc) - 1:
            continue  # the tag of a union, which the TOML does not spell out
        path.append(_shorten(str(part)))
        place = place.get(part) if isinstance(place, Mapping) else None
    name = ".".join(path) or "the whole"
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        known = sorted(_fields_at(RunConfig, loc[:-1]))
        return f"unknown key '{name}'{nearest(path[-1], known)} (valid here: {', '.join(known)})"
    if kind == "missing":
        return f"'{name}' is missing; add it"
    if kind == "union_tag_invalid":
        context = detail["ctx"]
        expected = str(context["expected_tags"])
        near = nearest(str(context["tag"]), [tag.strip(" '") for tag in expected.split(",")])
        key = f"{name}." + str(context["discriminator"]).strip("'")
        return f"'{key}': expected one of {expected}, found '{context['tag']}'{near}"
    if kind == "union_tag_not_found":
        return f"'{name}': add {detail['ctx']['discriminator']}, which says what it is"
    message = detail["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(given, Mapping | Settings) else f", found {_shorten(repr(given))}"
    return f"'{name}': {message[0].lower()}{message[1:]}{shown}"


def _shorten(text: str) -> str:
    return text if len(text) <= 100 else text[:100] + "…"


def _fields_at(annotation: Any, loc: Sequence[str | int]) -> list[str]:
    """Return the keys that are valid at a place of the configuration."""
    annotation = _bare(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        fields = {field.alias or name: field for name, field in annotation.model_fields.items()}
        if not loc:
            return list(fields)
        return _fields_at(fields[str(loc[0])].annotation, loc[1:]) if str(loc[0]) in fields else []
    if get_origin(annotation) is dict:
        return _fields_at(get_args(annotation)[1], loc[1:]) if loc else []
    if get_origin(annotation) in (Union, UnionType):
        members = [_bare(member) for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return _fields_at(members[0], loc)
        tagged = [member for member in members if loc and loc[0] in _tags(member)]
        return _fields_at(tagged[0], loc[1:]) if tagged else []
    return []


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _tags(member: Any) -> set[Any]:
    """Return the literal values that tell a member of a union from the others."""
    tags: set[Any] = set()
    for field in getattr(member, "model_fields", {}).values():
        if get_origin(field.annotation) is Literal:
            tags.update(get_args(field.annotation))
    return tags
