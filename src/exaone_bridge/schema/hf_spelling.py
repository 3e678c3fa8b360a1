"""The two spellings of config.json: that of Transformers 4, and that of Transformers 5. No torch.

Transformers 4 (and publishers, vLLM, SGLang, mlx-lm) know `torch_dtype`, `rope_theta` and
`rope_scaling`; Transformers 5 writes `dtype` and `rope_parameters`, and reads both. What is written
here keeps the spelling of the config that is changed; a config that has neither gets both.
"""

from __future__ import annotations

from collections.abc import Mapping

from exaone_bridge.schema.json_types import JSONMapping, JSONObject

__all__ = [
    "apply_changes",
    "in_both_spellings",
    "in_new_spelling",
    "write_dtype",
    "write_rope",
]


def write_dtype(hf_config: JSONObject, dtype: str) -> None:
    """Write the dtype under each key that is there, or under both keys.

    Args:
        hf_config: changed in place.
        dtype: such as "bfloat16".
    """
    keys = ("torch_dtype", "dtype")  # Transformers 4 and 5
    for key in [key for key in keys if key in hf_config] or keys:
        hf_config[key] = dtype


def write_rope(
    hf_config: JSONObject, *, kind: str, theta: float, fields: JSONMapping | None = None
) -> None:
    """Write RoPE as Transformers 5 reads it (`rope_parameters`), as 4 does, or as both do.

    The spelling is that of the config; where it has none, it is both. An object of the same kind
    keeps its other keys.

    Args:
        hf_config: changed in place.
        kind: Transformers' `rope_type`.
        theta: the base.
        fields: the other parameters of this kind.
    """
    old_keys = {"rope_theta", "rope_scaling"} & hf_config.keys()
    new_key = "rope_parameters" in hf_config
    values = {"rope_type": kind, **(fields or {})}
    if new_key or not old_keys:
        hf_config["rope_parameters"] = {
            **_kept_rope(hf_config.get("rope_parameters"), kind),
            **values,
            "rope_theta": theta,
        }
    if old_keys or not new_key:
        hf_config["rope_theta"] = theta
        scaling = _kept_rope(hf_config.get("rope_scaling"), kind)
        if kind != "default" or scaling:
            named = {"rope_theta": theta} if "rope_theta" in scaling else {}
            hf_config["rope_scaling"] = {**scaling, **values, **named}
        elif "rope_scaling" in hf_config:
            hf_config["rope_scaling"] = None


def _kept_rope(fields: object, kind: str) -> JSONObject:
    """Return RoPE parameters without the kind, if they are of this kind."""
    if not isinstance(fields, Mapping) or fields.get("rope_type", fields.get("type")) != kind:
        return {}
    return {key: value for key, value in fields.items() if key != "type"}


def apply_changes(raw: JSONMapping, before: JSONMapping, after: JSONMapping) -> JSONObject:
    """Return a config with the changes between two other forms of it, in its own spelling.

    Args:
        raw: config.json as its author spelled it.
        before: `raw` as Transformers reads and writes it.
        after: `before` with changed values.
    """
    result = dict(raw)
    for key in sorted(before.keys() | after.keys()):
        if key in before and key in after and before[key] == after[key]:
            continue
        value = after.get(key)
        if key == "rope_parameters" and isinstance(value, Mapping):
            fields = {
                name: value[name] for name in value if name not in ("rope_type", "rope_theta")
            }
            kind = str(value.get("rope_type", "default"))
            write_rope(result, kind=kind, theta=value["rope_theta"], fields=fields)
        elif key == "dtype" and isinstance(value, str):
            write_dtype(result, value)
        elif key not in after:
            result.pop(key, None)
        elif isinstance(raw.get(key), Mapping) and isinstance(value, Mapping):
            old = before.get(key)
            result[key] = apply_changes(raw[key], old if isinstance(old, Mapping) else {}, value)
        else:
            result[key] = value
    return result


def in_both_spellings(hf_config: JSONMapping) -> JSONObject:
    """Return a config of Transformers 5 that Transformers 4 and its readers understand as well."""
    result = dict(hf_config)
    if isinstance(rope := result.get("rope_parameters"), Mapping):
        theta, kind = rope.get("rope_theta", 10000.0), rope.get("rope_type", "default")
        fields = {name: rope[name] for name in rope if name not in ("rope_type", "rope_theta")}
        del result["rope_parameters"]
        for key in ("rope_theta", "rope_scaling"):
            result.pop(key, None)
        write_rope(result, kind=str(kind), theta=theta, fields=fields)
    if (dtype := result.get("dtype")) is not None:
        result["torch_dtype"] = dtype
    for key, value in result.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            result[key] = in_both_spellings(value)
    return result


def in_new_spelling(hf_config: JSONMapping) -> JSONObject:
    """Return a config with the keys of Transformers 5 alone."""
    result = dict(hf_config)
    scaling, theta = result.pop("rope_scaling", None), result.pop("rope_theta", None)
    if "rope_parameters" not in result and (scaling is not None or theta is not None):
        fields = dict(scaling or {})
        kind = fields.pop("type", "default")
        result["rope_parameters"] = {"rope_theta": theta, "rope_type": kind, **fields}
    if (dtype := result.pop("torch_dtype", None)) is not None:
        result.setdefault("dtype", dtype)
    for key, value in result.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            result[key] = in_new_spelling(value)
    return result
