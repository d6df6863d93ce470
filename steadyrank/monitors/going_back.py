"""What the instruments remember, taken back with the training while the steps go on being counted."""

import copy
from collections.abc import Mapping
from typing import Any

_LOSS_STEPS = ("first", "last", "bad_step")
_WINDOW_STEPS = ("above_first", "first", "last", "end")


def go_back(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of `Watch` to go on with: what it remembered then, under the step numbers of now.

    What was warned of and judged since is history, and stays: an episode that was still open has ended here.

    Args:
        then: `Watch.state_dict()` of the earlier moment.
        now: That of this moment.
    """
    state, by = copy.deepcopy(dict(then)), now["step"] - then["step"]
    state["step"] = now["step"]
    for key in ("alerts", "changes", "ranked"):
        state[key] = now[key]
    state["warning"]["last"] = now["warning"]["last"]
    verdicts = state["verdicts"]
    verdicts["newest"] += by
    if verdicts["window_end"] is not None:
        verdicts["window_end"] += by
    for name, task in verdicts["tasks"].items():
        for part, keys in (("losses", _LOSS_STEPS), ("windows", _WINDOW_STEPS)):
            _shift(task[part], keys, by)
        if task["last"]:
            task["last"] += by
        task["episodes"] = [_ended(episode, now["step"]) for episode in now["verdicts"]["tasks"][name]["episodes"]]
        task["open"] = task["losses"]["open"] = task["windows"]["open"] = False
    return state


def _shift(part: dict[str, Any], keys: tuple[str, ...], by: int) -> None:
    for key in keys:
        if part[key] > 0:  # 0 and -1 stand for none
            part[key] += by


def _ended(episode: Mapping[str, Any], step: int) -> dict[str, Any]:
    if episode["last"] is not None:
        return dict(episode)
    return {**episode, "last": step, "reason": f"{episode['reason']}; taken back by the recovery"}
