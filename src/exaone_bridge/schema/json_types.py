"""Types of JSON objects: config.json, reports, and keyword arguments of untyped constructors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["JSONMapping", "JSONObject"]

JSONObject = dict[str, Any]  # as `json.loads` returns it
JSONMapping = Mapping[str, Any]  # the same, for those who only read it
