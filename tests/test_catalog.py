"""`prepare_dataset` against a tiny KuaiRand in the layout of its site, and against a join written in plain Python."""

import csv
import random
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steadyrank.config import load
from steadyrank.data import catalog
from steadyrank.data.catalog import DATASETS, prepare_dataset
from steadyrank.data.logs import LogsConfig, ParquetLog
from steadyrank.errors import ConfigError, DataError
from steadyrank.models.ranker import paper_model
from steadyrank.optim import ClippyAdagradConfig

from .shared import shared


def names(header: str) -> list[str]:
    return header.split(",")


LOG = names(
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USERS = names(
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range"
) + [f"onehot_feat{i}" for i in range(18)]
VIDEOS = names(
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag"
)
DAY_MS, START_MS = 86_400_000, 1_649_400_000_000

Row = dict[str, str]


def log_row(user: int, video: int, time_ms: int, **more: str) -> Row:
    return dict.fromkeys(LOG, "0") | {
        "user_id": str(user),
        "video_id": str(video),
        "time_ms": str(time_ms),
        "date": "20220408",
        "tab": "1",
        **more,
    }


def user_row(user: int, **more: str) -> Row:
    return dict.fromkeys(USERS, "1") | {
        "user_id": str(user),
        "user_active_degree": "full_active",
        "follow_user_num_range": "(0,10]",
        **more,
    }


def video_row(video: int, **more: str) -> Row:
    numbers = dict.fromkeys(VIDEOS, "3.0")
    words = {"video_type": "NORMAL", "upload_dt": "2022-04-08", "upload_type": "ShortImport"}
    return numbers | words | {"video_id": str(video), "author_id": str(video + 100), "tag": "12,65", **more}


def write(file: Path, header: list[str], rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, header)
        writer.writeheader()
        writer.writerows(rows)


def write_kuairand(
    folder: Path, logs: dict[str, list[Row]], users: list[Row], videos: list[Row], size: str = "1k"
) -> None:
    for name, rows in logs.items():
        write(folder / f"{name}.csv", LOG, rows)
    write(folder / f"user_features_{size}.csv", USERS, users)
    write(folder / f"video_features_basic_{size}.csv", VIDEOS, videos)
    write(folder / f"video_features_statistic_{size}.csv", ["video_id", "show_cnt"], [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three logs, unsorted and overlapping in time; a quoted range; a user and a video that no side table has."""
    logs = {
        "log_standard_4_08_to_4_21_1k": [
            log_row(1, 10, START_MS + DAY_MS, is_click="1", play_time_ms="5000000000"),
            log_row(2, 11, START_MS + 5),
            log_row(9, 99, START_MS + 7),
        ],
        "log_standard_4_22_to_5_08_1k": [
            log_row(2, 10, START_MS + 20 * DAY_MS, comment_stay_time=""),
            log_row(1, 11, START_MS + 6),
        ],
        "log_random_4_22_to_5_08_1k": [log_row(1, 10, START_MS + 21 * DAY_MS, is_rand="1")],
    }
    users = [user_row(1, onehot_feat4="", is_live_streamer="-124"), user_row(2, user_active_degree="UNKNOWN")]
    videos = [video_row(11, tag="", music_id="", video_duration="17200.5"), video_row(10, music_id="9155697141.0")]
    root = tmp_path / "KuaiRand-1K"
    write_kuairand(root / "data", logs, users, videos)
    return root


def test_rows_come_joined_and_in_time_order(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    assert prepare_dataset("kuairand", folder, target) == 5
    table = pq.read_table(target)
    assert table.column_names == LOG + USERS[1:] + VIDEOS[1:]
    rows = table.to_pylist()
    assert [(r["user_id"], r["video_id"]) for r in rows] == [(2, 11), (1, 11), (9, 99), (1, 10), (2, 10)]
    assert [r["author_id"] for r in rows] == [111, 111, None, 110, 110]
    assert [r["tag"] for r in rows] == [None, None, None, [12, 65], [12, 65]]
    assert [r["onehot_feat4"] for r in rows] == [1, None, None, None, 1]
    assert rows[0]["user_active_degree"] == "UNKNOWN"
    assert rows[0]["video_duration"] == 17200.5
    assert rows[1]["is_live_streamer"] == -124
    assert rows[1]["follow_user_num_range"] == "(0,10]"
    assert rows[3]["play_time_ms"] == 5_000_000_000
    assert rows[3]["music_id"] == 9155697141
    assert rows[4]["comment_stay_time"] is None
    assert table.schema.field("tag").type == pa.list_(pa.int32())
    assert table.schema.field("upload_dt").type == pa.string()


@pytest.mark.parametrize("size", ["pure", "27k"])
def test_it_equals_a_join_in_plain_python(tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows in small blocks and row groups, the two parts of each log over the same days, as in KuaiRand-27K."""
    monkeypatch.setattr(catalog, "_BLOCK_BYTES", 2048)
    monkeypatch.setattr(catalog, "ROW_GROUP", 64)
    rng = random.Random(0)
    rows = [
        log_row(rng.randrange(20), rng.randrange(30), START_MS + rng.randrange(3 * DAY_MS), tab=str(i))
        for i in range(500)
    ]
    users = {i: user_row(i, register_days=str(rng.randrange(4000))) for i in range(0, 20, 2)}
    videos = {i: video_row(i, upload_type=rng.choice(["Web", "Kmovie"])) for i in range(0, 30, 3)}
    halves = {f"log_standard_{size}_part1": rows[:200], f"log_standard_{size}_part2": rows[200:]}
    write_kuairand(tmp_path, halves, rng.sample(list(users.values()), 10), rng.sample(list(videos.values()), 10), size)
    seen: list[tuple[int, int]] = []
    target = tmp_path / "out.parquet"
    assert prepare_dataset("kuairand", tmp_path, target, progress=lambda *now: seen.append(now)) == 500
    expected = [
        (
            int(row["time_ms"]),
            int(row["tab"]),
            int(user["register_days"]) if (user := users.get(int(row["user_id"]))) else None,
            video["upload_type"] if (video := videos.get(int(row["video_id"]))) else None,
        )
        for row in sorted(rows, key=lambda row: [int(row[name]) for name in ("time_ms", "user_id", "video_id")])
    ]
    table = pq.read_table(target, columns=["time_ms", "tab", "register_days", "upload_type"])
    assert [tuple(row.values()) for row in table.to_pylist()] == expected
    assert pq.ParquetFile(target).metadata.row_group(0).num_rows == 64
    assert seen[-1] == (500, 500)
    assert all(0 < done <= total for done, total in seen)


def test_the_result_is_a_log_that_the_reader_takes(folder: Path, tmp_path: Path) -> None:
    """It has every column that the development log has, so one recipe serves both."""
    target = tmp_path / "out.parquet"
    prepare_dataset("kuairand", folder, target)
    log = ParquetLog(LogsConfig(path=str(target)), "time_ms")
    assert log.rows == 5
    log.check(pq.read_schema(shared("data/kuairand.parquet")).names)


def test_a_target_is_replaced_only_when_asked(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    target.write_text("precious")
    with pytest.raises(ConfigError, match=r"exists; give --overwrite"):
        prepare_dataset("kuairand", folder, target)
    assert target.read_text() == "precious"
    assert prepare_dataset("kuairand", folder / "data", target, overwrite=True) == 5


def break_file(folder: Path, name: str, old: str, new: str) -> None:
    file = folder / "data" / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "log_standard_4_22_to_5_08_1k.csv",
            "time_ms",
            "time_s",
            r"4_22.*KuaiRand has 'time_ms'; did you mean 'time_s'",
        ),
        ("user_features_1k.csv", "register_days_range", "registered", r"user_features_1k.*'register_days_range'"),
        ("video_features_basic_1k.csv", '"12,65"', '"12,x"', r"video_features_basic_1k.csv, column 'tag'.*x"),
        ("log_standard_4_08_to_4_21_1k.csv", "1649400000005", "", r"4_08.*'time_ms': 1 null; every row needs a time"),
        ("log_standard_4_08_to_4_21_1k.csv", "1649400000005", "soon", r"4_08_to_4_21_1k.csv.*soon"),
        ("log_standard_4_08_to_4_21_1k.csv", "1649400000005", "1.5", r"4_08.*'time_ms': expected int64"),
        ("log_standard_4_08_to_4_21_1k.csv", "9,99,", "9,99,7,", r"4_08_to_4_21_1k.csv: .*Expected 19 columns, got 20"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    folder: Path, tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    break_file(folder, name, old, new)
    with pytest.raises(DataError, match=message):
        prepare_dataset("kuairand", folder, tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["KuaiRand-1K"], "something half-written was left behind"


def test_a_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "data" / "user_features_1k.csv").rename(folder / "data" / "user_feature_1k.csv")
    with pytest.raises(DataError, match=r"expected a file 'user_features\*\.csv'; did you mean 'user_feature_1k\.csv'"):
        prepare_dataset("kuairand", folder, tmp_path / "out.parquet")


def test_two_versions_in_one_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    write(folder / "data" / "user_features_pure.csv", USERS, [user_row(1)])
    with pytest.raises(DataError, match=r"expected one file 'user_features\*\.csv', found user_features_1k\.csv and"):
        prepare_dataset("kuairand", folder, tmp_path / "out.parquet")


def test_a_log_without_rows_is_refused(tmp_path: Path) -> None:
    write_kuairand(tmp_path / "in", {"log_standard_1k": []}, [user_row(1)], [video_row(1)])
    with pytest.raises(DataError, match=r"log_standard_1k\.csv: there is no row"):
        prepare_dataset("kuairand", tmp_path / "in", tmp_path / "out.parquet")
    write_kuairand(tmp_path / "in", {"log_standard_1k": [log_row(1, 1, START_MS)]}, [], [video_row(1)])
    with pytest.raises(DataError, match=r"user_features_1k\.csv: the file holds no row"):
        prepare_dataset("kuairand", tmp_path / "in", tmp_path / "out.parquet")


def test_wrong_paths_and_names_are_config_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no data set 'kuairnd'; did you mean 'kuairand'"):
        prepare_dataset("kuairnd", folder, tmp_path / "out.parquet")
    with pytest.raises(ConfigError, match=r"no folder '.*KuaiRand-1'; did you mean 'KuaiRand-1K'"):
        prepare_dataset("kuairand", tmp_path / "KuaiRand-1", tmp_path / "out.parquet")
    with pytest.raises(ConfigError, match=r"no folder '.*nowhere' to write 'out\.parquet'"):
        prepare_dataset("kuairand", folder, tmp_path / "nowhere" / "out.parquet")


def test_every_data_set_names_its_licence() -> None:
    assert all("CC" in line and "https://" in line for line in DATASETS.values())


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_run_that_its_log_has_the_columns_for(recipe: Path) -> None:
    config = load(recipe)
    assert config.name == recipe.stem
    assert f"`{recipe.name}`" in (RECIPES / "README.md").read_text()
    if isinstance(config.data, LogsConfig):
        log = pq.read_schema(shared(f"data/{config.data.path}"))
        assert set(config.schema_.columns) <= set(log.names)
        assert not {task.column for task in config.schema_.tasks.values()} & {
            feature.column for feature in config.schema_.features.values()
        }, "a label is a feature"


def test_the_kuairand_recipe_trains_on_what_prepare_makes(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "kuairand.parquet"
    prepare_dataset("kuairand", folder, target)
    more = ["author_id={kind='id'}", "tag={kind='ids'}", "tab={kind='id',rows=15,hashed=false}"]
    config = load(RECIPES / "kuairand.toml", [f"data.path={target}", *(f"schema.features.{line}" for line in more)])
    (batch, _), *rest = config.build_reader().batches()
    assert len(batch) == 5
    assert not rest
    assert config.build_model()(batch).shape == (5, 6)


@pytest.mark.parametrize("name", ["small", "large", "large_dcn"])
@pytest.mark.parametrize(("suffix", "divide"), [("", 1), ("_8th", 8)])
def test_the_paper_recipes_spell_out_the_paper_models(
    name: Literal["small", "large", "large_dcn"], suffix: str, divide: int
) -> None:
    config = load(RECIPES / f"paper_{name}{suffix}.toml")
    assert config.model == paper_model(name, divide)
    dense = config.optimizer.dense
    assert isinstance(dense, ClippyAdagradConfig)
    assert (dense.variable_relative_threshold, dense.absolute_threshold, dense.initial_accumulator_value) == (
        0.5,
        0.01,
        0.1,
    )
