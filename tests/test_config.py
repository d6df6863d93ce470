"""One TOML file is one run: round trip, overrides, and messages that name the key."""

import re
from pathlib import Path

import pytest

from steadyrank.config import RunConfig, demo, load, parse_toml
from steadyrank.errors import ConfigError

from .tiny import TINY, tiny

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_round_trips(path: Path) -> None:
    config = load(path)
    assert RunConfig.from_toml(config.to_toml()) == config


def test_there_are_recipes() -> None:
    assert {"kuairand", "online_retail", "flights"} <= {path.stem for path in RECIPES}


def test_demo_and_tiny_round_trip() -> None:
    for config in (demo(), tiny()):
        assert RunConfig.from_toml(config.to_toml()) == config


def test_a_stream_brings_its_schema_and_the_resolved_config_spells_it_out() -> None:
    config = tiny()
    assert "click" in config.schema_.tasks
    assert "[schema.features.user]" in config.to_toml()


def test_a_streams_schema_is_changed_in_part() -> None:
    own = tiny().schema_
    changed = tiny("schema.tasks.rating.loss=huber", "schema.tasks.rating.huber_delta=2", "schema.embedding_width=8")
    rating = own.tasks["rating"].model_copy(update={"loss": "huber", "huber_delta": 2.0})
    assert changed.schema_.tasks["rating"] == rating
    assert changed.schema_ == own.model_copy(update={"embedding_width": 8, "tasks": {**own.tasks, "rating": rating}})
    assert RunConfig.from_toml(changed.to_toml()) == changed
    assert tiny("schema.features.user.width=3").schema_.features["user"].width == 3
    assert tiny("schema={}") == tiny()
    given = RunConfig(data=tiny().data, schema={"tasks": {"click": {"loss_weight": 2.0}}})
    assert given.schema_.tasks["click"].loss_weight == 2.0
    assert RunConfig(data=tiny().data, schema=own).schema_ == own


def test_a_whole_schema_of_a_stream_is_taken_as_it_is() -> None:
    whole = "schema={features={user={kind='id', rows=9}}, tasks={click={kind='binary'}}}"
    schema = tiny(whole).schema_
    assert (list(schema.features), list(schema.tasks), schema.group) == (["user"], ["click"], None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schema.tasks.rating.los=huber"], r"unknown key 'schema\.tasks\.rating\.los'; did you mean 'loss'\?"),
        (["schema.embeding_width=8"], r"unknown key 'schema\.embeding_width'; did you mean 'embedding_width'\?"),
        (["schema.tasks.ratin.loss=huber"], r"'schema\.tasks\.ratin\.kind' is missing"),
        (["schema.tasks.rating.loss=bce"], r"'schema\.tasks\.rating': loss 'bce' belongs to binary tasks"),
        (["schema.tasks=3"], r"'schema\.tasks': .*found 3"),
        (["schema=3"], r"'schema': .*found 3"),
    ],
)
def test_a_wrong_change_of_a_streams_schema_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(*overrides)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_a_wrong_stream_is_not_blamed_for_its_schema() -> None:
    for more in ([], ["schema.embedding_width=8"]):
        with pytest.raises(ConfigError) as caught:
            tiny("data.rows=-1", *more)
        assert str(caught.value).startswith("the configuration: 'data.rows': ")
        assert "schema" not in str(caught.value)


def test_a_ladder_beside_a_run_is_left_out() -> None:
    text = TINY + "\n[ladder]\nrates = [0.1]\nseeds = 3\n"
    assert RunConfig.from_toml(text, ["ladder.seeds=5"]) == tiny()
    data = parse_toml(text, ["ladder.seeds=5", "seed=7"])
    assert data.pop("ladder") == {"rates": [0.1], "seeds": 5}
    assert RunConfig.from_dict(data) == tiny("seed=7")
    with pytest.raises(ConfigError, match=r"run\.toml: unknown key 'laddr'"):
        RunConfig.from_dict({**data, "laddr": {}}, "run.toml")
    with pytest.raises(ConfigError, match=r"^run\.toml: not TOML"):
        parse_toml("a = ", where="run.toml")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("reader.batch_size=7", lambda c: c.reader.batch_size == 7),
        ("optimizer.dense.lr=0.25", lambda c: c.optimizer.dense.lr == 0.25),
        ("optimizer.dense.name=adam", lambda c: c.optimizer.dense.name == "adam"),
        ('name="other"', lambda c: c.name == "other"),
        ("name=other", lambda c: c.name == "other"),
        ("model.trunk={kind='mmoe', experts=2, widths=[8]}", lambda c: c.model.trunk.experts == 2),
        ("data.incidents=[{kind='viral', at=0.5, length=0.1}]", lambda c: c.data.incidents[0].kind == "viral"),
    ],
)
def test_override(override: str, read) -> None:
    assert read(tiny(override))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.dense.lrr=1", r"unknown key 'optimizer\.dense\.lrr'; did you mean 'lr'\?"),
        ("model.trunk.widts=[1]", r"unknown key 'model\.trunk\.widts'; did you mean 'widths'\?"),
        ("reader.bach_size=1", r"unknown key 'reader\.bach_size'; did you mean 'batch_size'\?"),
        ("trian.log_every=1", r"unknown key 'trian'; did you mean 'train'\?"),
        ("optimizer.dense.name=adagra", r"'optimizer\.dense\.name': expected one of .*did you mean 'adagrad'\?"),
        ("data.rows=-1", r"'data\.rows': .*found -1"),
        ("reader.batch_size=many", r"'reader\.batch_size': .*integer.*found 'many'"),
        ("optimizer.dense.lr=nan", r"'optimizer\.dense\.lr': "),
        ("seed", r"--set 'seed': expected part\.field=value"),
        ("name.first=1", r"'name' is a value and has no fields"),
        ("name='a/b'", r"'name': "),
    ],
)
def test_a_wrong_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(override)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_unknown_keys_inside_schema_give_their_full_path() -> None:
    text = tiny().to_toml().replace("[schema.features.user]", "[schema.features.user]\nrwos = 3")
    with pytest.raises(ConfigError, match=r"unknown key 'schema\.features\.user\.rwos'; did you mean 'rows'\?"):
        RunConfig.from_toml(text)


def test_every_mistake_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny("reader.batch_size=0", "train.log_every=0")
    assert "reader.batch_size" in str(caught.value)
    assert "train.log_every" in str(caught.value)


def test_missing_schema_and_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'schema' is missing"):
        RunConfig.from_toml('[data]\npath = "x.parquet"')
    (tmp_path / "run.toml").write_text(TINY)
    assert load(tmp_path / "run.toml") == tiny()
    with pytest.raises(ConfigError, match=r"no configuration file .*did you mean 'run.toml'"):
        load(tmp_path / "rum.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match="not TOML"):
        load(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as a text file"):
        load(tmp_path / "binary.toml")
