"""At the start: are all ranks of one kind, and is there for several what is asked for?"""

import platform
from collections.abc import Mapping
from typing import Any

from ..checkpoints import version_of
from ..errors import ConfigError
from ..ranks import Ranks
from ..settings import flatten
from ..shards import can_save
from .engine import DistributedConfig

_PACKAGES = ("steadyrank", "torch", "numpy", "pyarrow", "torchrec")


def check_together(settings: Mapping[str, Any], config: DistributedConfig, ranks: Ranks) -> None:
    """Raise ConfigError, on all ranks, unless they can train together.

    Args:
        settings: The whole configuration, nested.
        config: What it says of several ranks.
        ranks: Who trains together; one process alone always can.
    """
    if ranks.is_alone:
        return
    check_alike(settings, ranks)
    if (config.dense == "fsdp2" or config.shards_tables) and not can_save():
        raise ConfigError(
            f"torch {version_of('torch')} cannot save what lies on several ranks; install a newer one, or set "
            "distributed.dense = 'ddp' and distributed.tables = 'replicated'"
        )


def check_alike(settings: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise ConfigError, on all ranks, unless all were started with the same settings and versions.

    Args:
        settings: The whole configuration, nested.
        ranks: Who trains together.

    Raises:
        ConfigError: Naming the first rank that differs from rank 0, and both values.
    """
    here = {"the version of Python": platform.python_version()}
    here |= {f"the version of {name}": version_of(name) for name in _PACKAGES}
    here |= flatten(settings)
    first, *others = ranks.gather_objects(here)
    for rank, other in enumerate(others, 1):
        differ = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if differ:
            shown = [f"{name} = {other.get(name)!r}, not {first.get(name)!r}" for name in differ[:3]]
            more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise ConfigError(
                f"rank {rank} was started unlike rank 0: {'; '.join(shown)}{more}. Start all ranks with the same file, "
                "the same --set and the same versions"
            )
