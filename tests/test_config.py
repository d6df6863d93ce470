"""One TOML file is one run: round trip, overrides, and messages that name the key."""

import re
from pathlib import Path

import pytest

from steadyrank.config import RunConfig, demo, load
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
