"""Properties that count what they check, and requests that a net can meet."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prune_dn.errors import PruningError
from prune_dn.pruning.config import KINDS

LEAST = 0.9
# What a refusal says, and the change to the request that takes it away.
LOOSER: Mapping[str, dict[str, Any]] = {
    "has none of them": {"units": list(KINDS)},
    "judges only": {"criterion": "l2"},
    "larger than every width": {"round_to": 1},
    "cannot bring": {"units": list(KINDS), "min_channels": 1, "round_to": 1},
}


def counted(*strategies: st.SearchStrategy[Any], rounds: int = 1) -> Callable[..., Any]:
    """`given`, for a property that returns how many of its `rounds` it really checked.

    Fails when that is less than the share LEAST over all examples: a property that draws nothing
    to check says nothing.
    """

    def decorate(check: Callable[..., int]) -> Callable[..., None]:
        checked: list[int] = []

        @given(*strategies)
        @functools.wraps(check)
        def example(*args: Any, **drawn: Any) -> None:
            checked.append(check(*args, **drawn))

        @functools.wraps(example)
        def run(*args: Any, **fixtures: Any) -> None:
            checked.clear()
            example(*args, **fixtures)
            done, wanted = sum(checked), rounds * len(checked)
            assert done >= LEAST * wanted > 0, f"{done} of {wanted} rounds were checked"

        return run

    return decorate


def feasible(
    ask: Callable[..., Any],
    request: Mapping[str, Any],
    looser: Mapping[str, dict[str, Any]] = LOOSER,
) -> tuple[Any, dict[str, Any]] | None:
    """What `ask(**request)` gives where the net can meet the request, and that request.

    Its `pruning_ratio` is a share of the most that can go, where that is less than everything.
    Otherwise what is in the way is loosened, and nothing else; None where nothing can go.
    """
    asked, share = dict(request), request["pruning_ratio"]
    while True:
        try:
            return ask(**asked), asked
        except PruningError as error:
            why = next((words for words in looser if words in str(error)), None)
            if why is None:
                raise
            amounts = re.search(r"from ([\d,.]+) down to .* allow is ([\d,.]+) \(", str(error))
        change = looser[why]
        if amounts is not None:
            whole, least = (float(amount.replace(",", "")) for amount in amounts.groups())
            if least < whole:
                change = {"pruning_ratio": share * (1 - least / whole)}
        if asked == {**asked, **change}:
            return None
        asked.update(change)
