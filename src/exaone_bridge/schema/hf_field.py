"""Fields of a model config, each declared once with all of its names.

`hf_field` states the field's key in config.json, its reader, the field of the model provider that
holds the same value, and the axis letter of the parameter mappings whose size it is. Reading and
writing config.json, the provider's keyword arguments, their inverse and the axis sizes follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from exaone_bridge.schema.json_types import JSONMapping, JSONObject

__all__ = ["ConfigPart", "HFField", "hf_field"]

_METADATA = "hf_field"


@dataclass(frozen=True, slots=True)
class HFField:
    """The other names of a model config's field.

    Attributes:
        key: in the object of config.json that the class describes; None: the family writes it.
        read: (that object, key) -> value; raises UnsupportedConfig. None: the family reads it.
        provider: the model provider's field with the same value.
        axis: the axis letter whose size the value is (see `schema/param_mapping.py`).
        training: a training run may change the value without changing the model, so an export keeps
            the value of the config.json that the model came from.
    """

    key: str | None
    read: Callable[[JSONMapping, str], Any] | None
    provider: str | None
    axis: str | None
    training: bool


def hf_field(
    key: str | None = None,
    *,
    read: Callable[[JSONMapping, str], Any] | None = None,
    provider: str | None = None,
    axis: str | None = None,
    training: bool = False,
    default: Any = dataclasses.MISSING,
) -> Any:
    """Declare a field of a `ConfigPart`; the arguments are those of `HFField`.

    Args:
        default: of the constructor's argument. What config.json may leave out is not stated here,
            but in each family's table of the defaults of Transformers' config class.
    """
    declaration = HFField(key, read, provider, axis, training)
    return dataclasses.field(default=default, metadata={_METADATA: declaration})


class ConfigPart:
    """Base of the frozen dataclasses that a model config consists of."""

    __slots__ = ()

    @classmethod
    def values_from_hf(cls, hf_config: JSONMapping) -> JSONObject:
        """Read the fields that have a reader.

        Args:
            hf_config: an object of config.json, completed with the defaults of Transformers' class.

        Returns:
            Field name -> value.

        Raises:
            UnsupportedConfig: a value that the field's reader rejects.
        """
        return {
            name: declared.read(hf_config, declared.key)
            for name, declared in _declared(cls).items()
            if declared.read is not None and declared.key is not None
        }

    @classmethod
    def values_from_provider(cls, provider: object) -> JSONObject:
        """Return field name -> value of the fields that a model provider has too."""
        return {
            name: getattr(provider, declared.provider)
            for name, declared in _declared(cls).items()
            if declared.provider is not None
        }

    def provider_fields(self) -> JSONObject:
        """Return the fields of the model provider that this part determines."""
        return {
            declared.provider: getattr(self, name)
            for name, declared in _declared(type(self)).items()
            if declared.provider is not None
        }

    def hf_values(self, before: Self | None = None) -> JSONObject:
        """Return key -> value of the fields that have a key in config.json.

        Args:
            before: what config.json describes now: only fields that differ from it are returned,
                and none that a training run may change by itself. None: all are returned.
        """
        changed = self.changed_from(before)
        return {
            declared.key: list(value) if isinstance(value, tuple) else value
            for name, declared in _declared(type(self)).items()
            if declared.key is not None
            and name in changed
            and (before is None or not declared.training)
            for value in [getattr(self, name)]
        }

    def changed_from(self, before: Self | None) -> set[str]:
        """Return the names of the fields that differ from `before`; all of them if it is None."""
        return {
            name
            for name in type(self).__dataclass_fields__  # type: ignore[attr-defined]
            if before is None or getattr(self, name) != getattr(before, name)
        }

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Axis letter -> size, of the axes that fields of this part give."""
        return {
            declared.axis: getattr(self, name)
            for name, declared in _declared(type(self)).items()
            if declared.axis is not None
        }


def _declared(part: type[ConfigPart]) -> dict[str, HFField]:
    """Return the fields of this class that `hf_field` declared, in their order."""
    found = dataclasses.fields(part)  # type: ignore[arg-type]
    return {each.name: each.metadata[_METADATA] for each in found if _METADATA in each.metadata}
