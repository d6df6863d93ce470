"""Starting a run: alone, or as one of the processes that torchrun started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .config import RunConfig
from .ranks import ALONE, Ranks, join, leave, recall, remember, started_together
from .runs import OthersFolder, RunFolder, next_folder
from .sequential import find_device
from .terminal import console

_FOLDER = "steadyrank/folder"


@contextmanager
def meeting(config: RunConfig) -> Iterator[Ranks]:
    """Meet the other processes, if torchrun started some; all but the first are silent from here on.

    Raises:
        ConfigError: They do not meet.
    """
    if not started_together():
        yield ALONE
        return
    ranks = join(find_device(config.train.device), config.distributed.timeout_s)
    console.quiet = not ranks.is_first
    yield ranks
    leave()


def begun_before(ranks: Ranks) -> Path | None:
    """Return the run folder that these processes made before torchrun started them anew; None on the first start."""
    if ranks.is_alone or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    found = ranks.on_first(lambda: recall(_FOLDER))
    return Path(found) if found and (Path(found) / "config.toml").exists() else None


def create_folder(config: RunConfig, out: Path | None, ranks: Ranks, *, overwrite: bool = False) -> RunFolder:
    """Make a run folder, with the configuration in it; the other ranks see it and write nothing.

    Raises:
        ConfigError: There is one, or it cannot be written.
    """

    def create() -> Path:
        folder = RunFolder.create(out or next_folder(config.name), overwrite=overwrite)
        folder.write_config(config.to_toml())
        if not ranks.is_alone:
            remember(_FOLDER, str(folder.path.absolute()))
        return folder.path

    path = ranks.on_first(create)
    return RunFolder(path) if ranks.is_first else OthersFolder(path)


def open_folder(path: Path, ranks: Ranks) -> RunFolder:
    """Open a run folder to go on with it; the other ranks see it and write nothing."""
    return RunFolder.open(path) if ranks.is_first else OthersFolder.open(path)
