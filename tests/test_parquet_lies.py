"""Whatever the footer and the page headers of a Parquet file say, it is refused or read, and ends no process."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from steadyrank.data.convert import convert
from steadyrank.data.logs import LogsConfig, ParquetLog
from steadyrank.errors import DataError

from .parquet_fuzz import LIES, WAYS, Report, pages, unpack_footer


def read_in_children(folder: Path, first: int, last: int) -> Report:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.parquet_fuzz", str(folder), str(first), str(last)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    report = Report(*json.loads(done.stdout))
    assert not report.wrong, "\n\n".join(f"{case}: {what}" for case, what in report.wrong.items())
    return report


def test_lies_and_flips_are_refused_or_harmless(tmp_path: Path) -> None:
    refused = read_in_children(tmp_path, 0, 120).refused
    assert sum(refused) == len(LIES) + 120
    assert refused[0] > 20
    assert sum(refused[len(WAYS) // 2 :]) > 60


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 11_000, 1000))
def test_many_lies_and_flips(tmp_path: Path, first: int) -> None:
    assert sum(read_in_children(tmp_path, first, first + 1000).refused) == len(LIES) + 1000


def test_a_flip_in_the_values_of_a_converted_log_is_always_found(tmp_path: Path) -> None:
    source, path, draw = tmp_path / "log.csv", tmp_path / "log.parquet", random.Random(0)
    source.write_text("time,user,click\n" + "".join(f"{i},u{i % 7},{i % 2}\n" for i in range(500)))
    convert(source, path)
    raw = path.read_bytes()
    bodies = [range(end, end + header[3][1]) for _, end, header in pages(raw, unpack_footer(raw)[1])]
    assert len(bodies) >= 3
    for body in bodies * 10:
        spoiled = bytearray(raw)
        spoiled[draw.choice(body)] ^= 1 << draw.randrange(8)
        path.write_bytes(spoiled)
        with pytest.raises(DataError, match="CRC checksum verification failed"):
            list(ParquetLog(LogsConfig(path=str(path)), "time").pieces())
