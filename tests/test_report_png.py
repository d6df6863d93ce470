"""PNGs of the figures: by kaleido where it and a browser are there, and with advice where they are not."""

import importlib.util
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.io
import pytest

from steadyrank.errors import ConfigError
from steadyrank.report import write_pngs

from .report_runs import make_tables, write_old_run, write_run

needs_kaleido = pytest.mark.skipif(
    importlib.util.find_spec("kaleido") is None or not hasattr(plotly.io, "write_images"),
    reason="kaleido is not installed, or plotly is older than 6.1",
)


def size(path: Path) -> tuple[int, int]:
    """The width and height that a PNG names."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.slow
@needs_kaleido
def test_every_figure_becomes_a_png(tmp_path: Path) -> None:
    run = write_old_run(tmp_path / "run")
    try:
        files = write_pngs(run, tmp_path / "new" / "pictures")
    except ConfigError as error:
        if "Chrome" not in str(error):
            raise
        pytest.skip("no Chrome and no Chromium")
    names = ["auc", "error", "loss", "entropy", "calibration", "clip", "clip_map", "speed"]
    assert files == [tmp_path / "new" / "pictures" / f"{name}.png" for name in names]
    assert size(files[0]) == (2000, 720)
    assert size(files[6]) == (2000, 2 * (70 + 36 + 60))  # a heat map of two rows


def no_picture(error: Exception) -> Callable[..., None]:
    def write_images(*_: Any, **__: Any) -> None:
        raise error

    return write_images


@needs_kaleido
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("\nKaleido requires Google Chrome\nor so"),
            "Install one .*apt install.*requires Google Chrome\\)$",
        ),
        (OSError(28, "No space left on device"), "No space left on device; choose another --png"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr("plotly.io.write_images", no_picture(error))
    with pytest.raises(ConfigError) as caught:
        write_pngs(write_run(tmp_path / "run", make_tables(steps=200)), tmp_path / "pictures")
    assert re.search(message, str(caught.value))


def test_without_kaleido_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "steadyrank\[png\]"'):
        write_pngs(tmp_path, tmp_path / "pictures")


@needs_kaleido
def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("here I am")
    with pytest.raises(ConfigError, match=r"cannot write .*pictures"):
        write_pngs(write_old_run(tmp_path / "run"), tmp_path / "pictures")
