"""A family in a file of its own: what ``tqai tune --family FILE.json`` measured of a user's model. Plain JSON: nothing in it is run."""

from __future__ import annotations

from pathlib import Path

from ..files import checked, read_json
from .base import MODEL, Family, InHost

AGAIN = "write it with tqai tune --family FILE.json"


def read(path: str | Path) -> Family:
    """The family that a file describes. TqaiError for a file that is no entry."""
    data = read_json(path, what="family entry", again=AGAIN)
    checked("FamilyEntry", data, what=f"{path}: family entry", again=AGAIN)
    return Family(data["name"], data["title"], InHost(tuple(data["classes"]), levels=MODEL), tolerances=data["tolerances"])
