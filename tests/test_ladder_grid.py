"""What a ladder varies: which cells there are, the run that each of them is, and how what cannot be is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from steadyrank.config import RunConfig
from steadyrank.errors import ConfigError
from steadyrank.ladder.grid import Cell, Ladder, LadderConfig, change, load_ladder

from .tiny import TINY

Make = Callable[..., Ladder]
OWN = RunConfig.from_toml(TINY).optimizer.dense.name


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function of overrides, and perhaps a text, that returns the ladder."""

    def load(*overrides: str, text: str = TINY) -> Ladder:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return load_ladder(path, overrides)

    return load


def rates(cells: list[Cell]) -> list[float]:
    return list(dict.fromkeys(cell.rate for cell in cells))


# Merging.


def test_tables_merge_and_one_that_says_what_it_is_replaces() -> None:
    base = {"train": {"log_every": 3, "window_steps": 5}, "optimizer": {"dense": {"name": "adam", "eps": 1e-6}}}
    assert change(base, {"train": {"log_every": 4}}) == {**base, "train": {"log_every": 4, "window_steps": 5}}
    merged = change(base, {"optimizer": {"dense": {"lr": 0.1}}})
    assert merged["optimizer"]["dense"] == {"name": "adam", "eps": 1e-6, "lr": 0.1}
    assert change(base, {"optimizer": {"dense": {"name": "sgd"}}})["optimizer"]["dense"] == {"name": "sgd"}
    assert change({"data": {"source": "stream", "rows": 5}}, {"data": {"source": "logs"}}) == {
        "data": {"source": "logs"}
    }
    assert change({"name": "a", "seed": 1}, {"name": "b"}) == {"name": "b", "seed": 1}
    assert change({"seed": 1}, {"seed": {"x": 1}}) == {"seed": {"x": 1}}


def test_merging_leaves_both_as_they_were() -> None:
    base, more = {"a": {"x": [1]}}, {"b": {"y": [2]}}
    merged = change(base, more)
    merged["a"]["x"].append(3)
    merged["b"]["y"].append(3)
    assert (base, more) == ({"a": {"x": [1]}}, {"b": {"y": [2]}})


def test_a_feature_may_be_called_source_or_kind() -> None:
    """Such a table of features names none of several things."""
    base = {"features": {"user": {"kind": "id"}, "source": {"kind": "id", "rows": 9}}}
    merged = change(base, {"features": {"source": {"rows": 5}, "kind": {"kind": "number"}}})
    assert merged["features"] == {**base["features"], "source": {"kind": "id", "rows": 5}, "kind": {"kind": "number"}}


# Which cells there are.


def test_a_run_without_a_ladder_has_one_optimizer_six_multiples_of_its_own_rate_and_three_seeds(make: Make) -> None:
    cells = make("optimizer.dense={name='adam', lr=0.003}").cells()
    assert [(cell.optimizer, cell.family, cell.model, cell.incident) for cell in cells] == [
        ("adam", "adam", "", "")
    ] * 18
    assert rates(cells) == [0.00075, 0.0015, 0.003, 0.006, 0.012, 0.024]
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6 + [2] * 6
    assert cells[0].name == "adam-0.00075-s0"
    assert all(cell.config.optimizer.dense.lr == cell.rate for cell in cells)
    assert all(cell.config.seed == cell.seed == cell.config.data.seed for cell in cells)  # type: ignore[union-attr]


def test_the_default_optimizer_of_a_run_has_its_default_rate(make: Make) -> None:
    own = RunConfig.from_toml(TINY).optimizer.dense
    cells = make("ladder.multiples=[1.0, 2.0]", "ladder.seeds=1").cells()
    assert [(cell.optimizer, cell.rate) for cell in cells] == [(own.name, own.lr), (own.name, 2 * own.lr)]


def test_every_combination_is_a_cell_and_each_seed_is_whole_before_the_next(make: Make) -> None:
    cells = make(
        "ladder.rates=[0.1, 0.2]",
        "ladder.seeds=[7, 3]",
        "ladder.optimizers.adagrad.set.optimizer.dense={name='adagrad', eps=1e-6}",
        "ladder.optimizers.clippy={set={optimizer={dense={name='clippy_adagrad'}}}}",
        "ladder.models.small.set.model.trunk.widths=[4]",
        "ladder.models.large.set.model.trunk.widths=[32]",
        "ladder.incidents.none={}",
        "ladder.incidents.bots.set.data.incidents=[{kind='bots', at=0.5}]",
    ).cells()
    assert len(cells) == 2 * 2 * 2 * 2 * 2
    assert [cell.seed for cell in cells] == [7] * 16 + [3] * 16
    places = [(c.incident, c.model, c.optimizer, c.rate) for c in cells]
    assert places[:16] == places[16:]
    assert len(set(places)) == 16
    assert cells[0].name == "none-small-adagrad-0.1-s7"
    assert len({cell.name for cell in cells}) == 32
    for cell in cells:
        config = cell.config
        assert (config.name, config.seed, config.optimizer.dense.lr) == (cell.name, cell.seed, cell.rate)
        assert config.optimizer.dense.name == {"adagrad": "adagrad", "clippy": "clippy_adagrad"}[cell.optimizer]
        assert config.model.trunk.widths == ((4,) if cell.model == "small" else (32,))  # type: ignore[union-attr]
        assert len(config.data.incidents) == (cell.incident == "bots")  # type: ignore[union-attr]
        assert config.model.cross == RunConfig.from_toml(TINY).model.cross
    assert {cell.config.optimizer.dense.eps for cell in cells if cell.optimizer == "adagrad"} == {1e-6}  # type: ignore[union-attr]


def test_an_optimizer_in_dotted_toml_has_its_own_rates_and_family(make: Make) -> None:
    text = (
        TINY
        + """
[ladder]
rates = [0.1]
seeds = 1
[ladder.optimizers.adagrad]
set.optimizer.dense = { name = "adagrad" }
set.train.window_steps = 7
[ladder.optimizers.tight]
family = "clippy"
rates = [0.5, 1.0]
set.optimizer.dense.name = "clippy_adagrad"
set.optimizer.dense.absolute_threshold = 0.001
"""
    )
    cells = make(text=text).cells()
    found = [(c.optimizer, c.family, c.rate, c.config.train.window_steps) for c in cells]
    assert found == [("adagrad", "adagrad", 0.1, 7), ("tight", "clippy", 0.5, 5), ("tight", "clippy", 1.0, 5)]
    assert cells[1].config.optimizer.dense.absolute_threshold == 0.001  # type: ignore[union-attr]


def test_the_rungs_of_an_optimizer_are_multiples_of_the_rate_it_sets(make: Make) -> None:
    cells = make(
        "ladder.seeds=1",
        "ladder.multiples=[0.1, 3]",
        "ladder.optimizers.a.set.optimizer.dense={name='adam', lr=0.01}",
        "ladder.optimizers.b.set.optimizer.dense={name='sgd', lr=0.7}",
    ).cells()
    assert [(cell.optimizer, cell.rate) for cell in cells] == [("a", 0.001), ("a", 0.03), ("b", 0.07), ("b", 2.1)]


def test_seeds_are_a_number_or_a_list() -> None:
    assert LadderConfig.model_validate({"seeds": 4}).seeds == (0, 1, 2, 3)
    assert LadderConfig.model_validate({"seeds": [5, 2]}).seeds == (5, 2)
    assert len(LadderConfig.model_validate({"seeds": 1000}).seeds) == 1000
    assert LadderConfig().seeds == (0, 1, 2)


def test_a_seed_may_leave_the_stream_as_it_is(make: Make) -> None:
    cells = make("ladder.vary_data=false", "data.seed=11", "ladder.seeds=[4]", "ladder.rates=[0.1]").cells()
    assert (cells[0].config.seed, cells[0].config.data.seed) == (4, 11)  # type: ignore[union-attr]


def test_another_setting_can_be_the_rate(make: Make) -> None:
    wide = make("ladder.vary=reader.batch_size", "ladder.multiples=[0.5, 2]", "ladder.seeds=1").cells()
    assert [(cell.name, cell.config.reader.batch_size) for cell in wide] == [
        (f"{OWN}-64-s0", 64),
        (f"{OWN}-256-s0", 256),
    ]
    tables = make("ladder.vary=optimizer.tables.lr", "ladder.rates=[0.25]", "ladder.seeds=1").cells()[0].config
    own = RunConfig.from_toml(TINY)
    assert tables.optimizer.tables == own.optimizer.tables.model_copy(update={"lr": 0.25})
    assert tables.optimizer.dense == own.optimizer.dense


def test_a_setting_of_a_table_that_was_not_given_can_be_the_rate(make: Make) -> None:
    own = RunConfig.from_toml(TINY)
    (cell,) = make("ladder.vary=watch.verdict.sigmas", "ladder.rates=[9]", "ladder.seeds=[0]").cells()
    assert cell.config.watch.verdict == own.watch.verdict.model_copy(update={"sigmas": 9.0})
    (cell,) = make("ladder.vary=optimizer.dense.eps", "ladder.rates=[1e-3]", "ladder.seeds=[0]").cells()
    assert cell.config.optimizer.dense == own.optimizer.dense.model_copy(update={"eps": 1e-3})


def test_a_rate_of_0_can_be_replaced_but_not_multiplied(make: Make) -> None:
    adamw = "optimizer.dense={name='stable_adamw', weight_decay=0.0}"
    cells = make(adamw, "ladder.vary=optimizer.dense.weight_decay", "ladder.rates=[0.1]", "ladder.seeds=1").cells()
    assert cells[0].config.optimizer.dense.weight_decay == 0.1  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"'optimizer\.dense\.weight_decay': expected a number above 0 there to mult"):
        make(adamw, "ladder.vary=optimizer.dense.weight_decay").cells()
    with pytest.raises(ConfigError, match=r"expected a number above 0 there to multiply, found 'auto'"):
        make("ladder.vary=train.device").cells()
    with pytest.raises(ConfigError, match="found False"):
        make("ladder.vary=train.follow").cells()


# The run that a cell is.


def test_a_cell_is_the_run_itself_but_for_what_a_person_looks_at(make: Make) -> None:
    own = RunConfig.from_toml(TINY, ["optimizer.dense.lr=0.1", "seed=1", "data.seed=1", "train.report=true"])
    (cell,) = make("train.report=true", "ladder.rates=[0.1]", "ladder.seeds=[1]", "ladder.workers=1").cells()
    train = {"report": False, "give_up_windows": 10, "threads": cell.config.train.threads}
    parts = {
        "name": f"{OWN}-0.1-s1",
        "train": own.train.model_copy(update=train),
        "watch": own.watch.model_copy(update={"causes": 0}),
        "trackers": own.trackers.model_copy(update={"tensorboard": False}),
    }
    assert cell.config == own.model_copy(update=parts)
    assert RunConfig.from_toml(cell.config.to_toml()) == cell.config


def test_what_a_run_says_of_giving_up_and_threads_holds(make: Make) -> None:
    given = "train={give_up_windows=3, threads=5, follow=false}"
    (cell,) = make(given, "ladder.rates=[0.1]", "ladder.seeds=[1]").cells()
    assert (cell.config.train.give_up_windows, cell.config.train.threads) == (3, 5)


def test_cores_are_shared_among_the_workers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    few = ("ladder.rates=[0.1]", "ladder.seeds=1")
    assert (made := make(*few)).workers() == 8
    assert made.cells()[0].config.train.threads == 1
    assert make(*few, "ladder.workers=3").cells()[0].config.train.threads == 2
    assert make(*few, "ladder.workers=99").cells()[0].config.train.threads == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert (made := make(*few)).workers() == 1
    assert made.cells()[0].config.train.threads is None


def test_a_cell_does_not_wait_for_new_files(make: Make) -> None:
    log = """
[data]
path = "log"
[train]
follow = true
[schema]
time = "t"
[schema.features.u]
kind = "id"
[schema.tasks.click]
kind = "binary"
"""
    (cell,) = make("ladder.rates=[0.1]", "ladder.seeds=[3]", text=log).cells()
    assert (cell.config.train.follow, cell.config.seed) == (False, 3)


# Another run's settings.


def test_settings_of_another_run_hold_where_nothing_is_said(tmp_path: Path, make: Make) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "run.toml").write_text(TINY + "[ladder]\nseeds = 9\nrun = 'nowhere.toml'\n")
    text = 'train = { log_every = 4 }\n[ladder]\nrun = "base/run.toml"\nrates = [0.1]\n'
    made = make("data.rows=1_000", text=text)
    assert (made.name, made.config.seeds, made.config.run) == ("tiny", (0, 1, 2), None)
    config = made.cells()[0].config
    assert (config.train.log_every, config.train.window_steps, config.data.rows) == (4, 5, 1_000)  # type: ignore[union-attr]
    assert make(text='name = "mine"\n[ladder]\nrun = "base/run.toml"\n').name == "mine"
    with pytest.raises(ConfigError, match=r"no configuration file '.*base/rum\.toml'; did you mean 'run\.toml'"):
        make(text='[ladder]\nrun = "base/rum.toml"\n')


def test_the_table_ladder_is_no_part_of_a_run(make: Make, tmp_path: Path) -> None:
    make("ladder.seeds=2")
    text = TINY + "[ladder]\nseeds = 2\nnonsense = 5\n"
    assert RunConfig.from_toml(text) == RunConfig.from_toml(TINY)


# Names.


def test_a_name_becomes_one_that_a_folder_can_have(make: Make) -> None:
    text = TINY + '[ladder]\nrates = [0.1]\nseeds = 1\n[ladder.models."1 / λ"]\n[ladder.models._new]\n'
    assert [cell.name for cell in make(text=text).cells()] == [
        f"1____-{OWN}-0.1-s0",
        f"new-{OWN}-0.1-s0",
    ]
    assert [cell.model for cell in make(text=text).cells()] == ["1 / λ", "_new"]


@pytest.mark.parametrize(
    "more",
    [
        '[ladder.models."a b"]\n[ladder.models.a_b]\n',
        "[ladder.models.a]\n[ladder.models.b-a]\n[ladder.incidents.a]\n[ladder.incidents.a-b]\n",
    ],
)
def test_two_cells_of_one_name_are_refused(make: Make, more: str) -> None:
    with pytest.raises(ConfigError, match=r"two cells of the ladder are called 'a.*'; give clearer names"):
        make(text=TINY + more).cells()


def test_a_name_that_is_too_long_is_told(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"has a name of 1\d\d letters, and 100 are the most; give its model"):
        make(f"ladder.models.{'x' * 99}.set.seed=0").cells()


# What cannot be.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ladder.sedes=3", r"unknown key 'ladder\.sedes'; did you mean 'seeds'\? \(valid here: run, vary, "),
        ("ladder.optimizers.a.rtes=[1]", r"unknown key 'ladder\.optimizers\.a\.rtes'; did you mean 'rates'\?"),
        ("ladder.models.a.rates=[1]", r"unknown key 'ladder\.models\.a\.rates' \(valid here: set\)"),
        ("ladder.models.a.sets.seed=1", r"unknown key 'ladder\.models\.a\.sets'; did you mean 'set'\?"),
        (
            "ladder.optimizers.a.optimizer.dense.lr=1",
            r"unknown key 'ladder\.optimizers\.a\.optimizer'; the run's settings stand under set, as "
            r"'ladder\.optimizers\.a\.set\.optimizer'",
        ),
        ("ladder.seeds=0", r"'ladder\.seeds': expected 1 to 1000 seeds, or a list of them, found 0"),
        ("ladder.seeds=1001", "expected 1 to 1000 seeds, or a list of them, found 1001"),
        ("ladder.seeds=true", r"'ladder\.seeds': input should be a valid tuple, found True"),
        ("ladder.seeds=[1, 1]", "seeds: each may stand there once, got 1, 1"),
        ("ladder.seeds=[-1]", r"'ladder\.seeds\.0': input should be greater than or equal to 0, found -1"),
        ("ladder.rates=[0.1, -2.0]", r"'ladder\.rates\.1': input should be greater than 0, found -2.0"),
        ("ladder.rates=[inf]", r"'ladder\.rates\.0': input should be a finite number, found inf"),
        ("ladder.rates=[]", r"'ladder\.rates': tuple should have at least 1 item"),
        ("ladder.multiples=[1, 1.0]", "multiples: each may stand there once, got 1, 1"),
        ("ladder.optimizers.a.rates=[2, 2]", r"'ladder\.optimizers\.a': rates: each may stand there once, got 2, 2"),
        ("ladder.valid=[0.8, 0.6]", r"valid: expected \[from, to\] with from < to, got \[0.8, 0.6\]"),
        ("ladder.test=[0.5, 1.5]", r"'ladder\.test\.1': input should be less than or equal to 1, found 1.5"),
        ("ladder.workers=0", r"'ladder\.workers': input should be greater than or equal to 1, found 0"),
        ("ladder=3", r"'ladder': input should be a valid dictionary"),
    ],
)
def test_a_wrong_ladder_is_told_with_its_full_path(make: Make, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        make(override)
    assert str(found.value).startswith(f"{tmp_path / 'run.toml'}: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "ladder.vary=optimizer.dense.lrr",
            r"ladder\.vary = 'optimizer\.dense\.lrr': there is no 'lrr'; did you mean 'lr'",
        ),
        ("ladder.vary=optimizer.dense.lr.x", r"there is no 'x'$"),
        ("ladder.vary=opt", r"ladder\.vary = 'opt': there is no 'opt'"),
        (
            "ladder.models.big.set.model.trunk.width=[3]",
            r"the ladder's run 'big': unknown key 'model\.trunk\.width'; did",
        ),
        (
            "ladder.optimizers.a.set.optimizer.dense.name=adm",
            r"the ladder's run 'a': 'optimizer\.dense\.name': expected",
        ),
        ("ladder.incidents.i.set.data.incidents=[{kind='bot', at=0.5}]", r"the ladder's run 'i': 'data\.incidents\.0"),
        ("train.lgo_every=3", r"the ladder's run: unknown key 'train\.lgo_every'; did you mean 'log_every'"),
        (
            "watch.enabled=false",
            "the ladder's run: a ladder counts what the instruments see; leave watch.enabled = true",
        ),
        (
            "ladder={vary='reader.batch_size', rates=[1.5], seeds=1}",
            rf"the ladder's cell '{OWN}-1\.5-s0': 'reader\.batch_size': input should be a valid integer",
        ),
        ("ladder.seeds=[4294967295]", ""),
    ],
)
def test_a_run_that_cannot_be_is_told_with_what_it_belongs_to(make: Make, override: str, message: str) -> None:
    made = make(override)
    if not message:
        assert made.cells()
        return
    with pytest.raises(ConfigError, match=message):
        made.cells()


def test_too_many_cells_are_refused_before_they_are_made(make: Make) -> None:
    many = [round(0.001 * i, 3) for i in range(1, 31)]
    with pytest.raises(
        ConfigError, match="the ladder has 30,000 cells, and at most 20,000 are trained; leave some out"
    ):
        make(f"ladder.rates={many}", "ladder.seeds=1000").cells()
