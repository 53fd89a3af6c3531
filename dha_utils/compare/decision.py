"""From measurements to a decision: gates with limits, and GO, NO-GO or CANNOT TELL."""

import numpy as np
import pandas as pd

GO, NO_GO, CANNOT_TELL = "GO", "NO-GO", "CANNOT TELL"


def gate(measured, low, high, limit, most=True, items=None):
    """One gate: `measured` with its 95 % interval from `low` to `high` must be at most `limit` (`most=False`: at least).

    Returns the row of `decision`: GO or NO-GO if the whole interval is on one side, else CANNOT TELL, and then how many
    `items` in all would tell, if the measured value is right: the interval shrinks as 1/√items.
    """
    within = high <= limit if most else low >= limit
    beyond = low > limit if most else high < limit
    verdict = GO if within else NO_GO if beyond or np.isnan(measured) else CANNOT_TELL
    row = {"measured": measured, "low": low, "high": high, "limit": limit, "must be": "at most" if most else "at least"}
    row |= {"items": items, "verdict": verdict, "items that would tell": None}
    if verdict == CANNOT_TELL and items:
        worst = max(high - measured, measured - low)
        distance = abs(measured - limit)
        if np.isfinite(worst) and distance:
            row["items that would tell"] = int(np.ceil(items * (worst / distance) ** 2))
    return row


def decision(gates):
    """(verdict, table of the gates): NO-GO if any gate says so, else CANNOT TELL if any does, else GO.

    `gates`: {name: `gate(...)`}. Raises ValueError if there is none: that would be GO.
    """
    if not gates:
        raise ValueError("a decision needs at least one gate")
    table = pd.DataFrame(gates).T
    for verdict in (NO_GO, CANNOT_TELL):
        if (table["verdict"] == verdict).any():
            return verdict, table
    return GO, table
