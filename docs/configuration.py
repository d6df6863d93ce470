"""Write docs/configuration.md from the config classes, so that the page cannot differ from the code.

Run it with `python docs/configuration.py`; a test compares the page with what this prints.
"""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from steadyrank.config import RunConfig
from steadyrank.ladder import LadderConfig
from steadyrank.settings import Settings

HEAD = """\
# Every setting of a run

One TOML file is one run. `steadyrank init LOG` writes a first one; any setting can be overridden on the command line
with `--set part.field=value`. An unknown key is an error that names the nearest valid one. What a run resolved to is
saved as `config.toml` in its folder and loads to an equal object. `optimizer.tables` takes what `optimizer.dense`
takes, as far as it can handle sparse gradients.

This page is made from the code by `python docs/configuration.py`.
"""


def write_page() -> str:
    """Return the page: a section for each group of settings, in the order in which they first appear."""
    sections: dict[str, str] = {}
    _visit(RunConfig, "", "The top of the file", sections, set())
    _visit(LadderConfig, "ladder.", "[ladder]", sections, set())
    return HEAD + "".join(f"\n## {title}\n\n{text}" for title, text in sections.items())


def _visit(config: type[Settings], path: str, title: str, sections: dict[str, str], seen: set[type[Settings]]) -> None:
    """Add the section of one class, then those of the classes in its fields."""
    about = " ".join((config.__doc__ or "").split("\n\n")[0].split())
    rows = [f"{about}\n\n| key | default | meaning |\n|---|---|---|\n"]
    below: list[tuple[type[Settings], str]] = []
    for name, field in config.model_fields.items():
        key = field.alias or name
        inner = _settings_in(field.annotation)
        place = f"{path}{key}" + (".NAME" if get_origin(_bare(field.annotation)) is dict else "")
        below += [(member, f"{place} = {_tag(member)}" if len(inner) > 1 else place) for member in inner]
        meaning = " ".join((field.description or "Says which of these it is.").split()).replace("|", r"\|")
        rows.append(f"| `{key}` | {_default(field)} | {meaning} |\n")
    sections[title] = "".join(rows)
    for member, place in below:
        if member not in seen:
            seen.add(member)
            _visit(member, place.partition(" = ")[0] + ".", f"[{place}]", sections, seen)


def _tag(member: type[Settings]) -> Any:
    """Return the literal by which a member of a union is known."""
    literals = [f.annotation for f in member.model_fields.values() if get_origin(f.annotation) is Literal]
    return next(get_args(literal)[0] for literal in literals if len(get_args(literal)) == 1)


def _settings_in(annotation: Any) -> list[type[Settings]]:
    annotation = _bare(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, dict, tuple):
        return [found for part in get_args(annotation) for found in _settings_in(part)]
    return []


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, Settings):
        tag = getattr(default, "name", getattr(default, "kind", None))
        return f"`{tag}`" if isinstance(tag, str) else "see below"
    return "left out" if default is None or default == "" else f"`{default}`"


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(write_page(), encoding="utf-8")
