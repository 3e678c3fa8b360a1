"""The command `tiny`: writes a tiny random checkpoint. Bad arguments are rejected without torch."""

from __future__ import annotations

import difflib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from exaone_bridge.cli.arguments import TINY_CONFIGS
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models import family_of
from exaone_bridge.schema.hf_config import language_config, with_num_layers
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.model_family import ModelFamily

__all__ = ["first_layers", "random_model", "tiny"]

_LAYERS = 4

# Fields of Transformers 4, which Transformers 5 reads under other names.
_OTHER_SPELLINGS = ("rope_theta", "rope_scaling", "torch_dtype", "sliding_window_pattern")


def tiny(model: str, folder: Path, settings: list[str], seed: int) -> None:
    """Write a tiny random checkpoint.

    Args:
        model: one of TINY_CONFIGS.
        folder: the output; must not exist, or be an empty folder.
        settings: changes of config.json, each `field=value` with the value as JSON.
        seed: of the weights.

    Raises:
        UnsupportedConfig: there is no such model, seed or field, or the config makes no model.
        CheckpointError: the folder exists, or cannot be made.
    """
    if model not in TINY_CONFIGS:
        raise _rejected("family", model, known=tuple(TINY_CONFIGS))
    if not 0 <= seed < 2**63:
        raise _rejected("--seed", seed, wanted="from 0 to 2^63 - 1")
    config = _with_settings(TINY_CONFIGS[model], settings)
    from exaone_bridge.checkpoint.hf.tiny import write_random
    from exaone_bridge.cli.show import say

    write_random(folder, config, seed=seed)
    say(f"{folder}: {language_config(config)['num_hidden_layers']} layers, {config['dtype']}")


def random_model(options: Namespace) -> None:
    """Write a tiny random checkpoint, as the command line's options say.

    Raises:
        UnsupportedConfig: --layers without --from, or what `tiny` raises.
        CheckpointError: see `tiny`.
    """
    if options.layers is not None:
        remedy = f"--set num_hidden_layers={options.layers} changes a random model"
        raise _rejected("--layers", options.layers, wanted="left out without --from", remedy=remedy)
    tiny(options.model, options.folder, options.set, options.seed or 0)


def first_layers(options: Namespace) -> None:
    """Write the first layers of a real model, with their weights.

    Raises:
        UnsupportedConfig: MODEL, --set or --seed beside --from, or a number of layers that makes
            no model.
        BridgeError: the source is not a model that exaone_bridge supports.
    """
    given = {"MODEL": options.model, "--set": options.set or None, "--seed": options.seed}
    for name, value in given.items():
        if value is not None:
            raise _rejected(name, value, wanted="left out with --from")
    from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
    from exaone_bridge.checkpoint.hf.truncate import write_first_layers
    from exaone_bridge.cli.show import say

    source = HFCheckpoint.open(options.source)
    written = write_first_layers(source, options.layers or _LAYERS, options.folder)
    say(
        f"{options.folder}: the first {written.num_layers} of "
        f"{source.model_config.num_layers} layers of {options.source}"
    )


def _rejected(field: str, got: object, **expected: Any) -> UnsupportedConfig:
    return UnsupportedConfig(field, got=got, where="command line", **expected)


def _check_field(setting: str, outer: list[str], field: str, family: ModelFamily) -> None:
    """Raise if neither a tiny config of the family nor Transformers' config class has a field."""
    if outer and not outer[-1].endswith("_config"):
        return  # of RoPE: the family's reader checks it
    known = set(_OTHER_SPELLINGS)
    model_type = None
    for config in family.tiny.values():
        part: Any = config
        for name in outer:
            part = part.get(name, {})
        known |= part.keys()
        model_type = part.get("model_type", model_type)
    if field in known:
        return
    from transformers import CONFIG_MAPPING

    if model_type in CONFIG_MAPPING:
        known |= CONFIG_MAPPING[model_type]().to_dict().keys()
    if field not in known:
        close = difflib.get_close_matches(field, known, n=1)
        remedy = f"the nearest is {close[0]}" if close else ""
        raise _rejected("--set", setting, wanted="a field of this model's config", remedy=remedy)


def _with_settings(config: JSONMapping, settings: list[str]) -> JSONObject:
    changed: JSONObject = json.loads(json.dumps(config))  # a deep copy
    names = set()
    for setting in settings:
        path, equals, text = setting.partition("=")
        *outer, field = path.split(".")
        if not equals or not field:
            raise _rejected("--set", setting, wanted="field=value")
        target: Any = changed
        for name in outer:
            if not isinstance(target := target.get(name), dict):
                wanted = "a field of config.json, with dots between nested names"
                raise _rejected("--set", setting, wanted=wanted)
        _check_field(setting, outer, field, family_of(config["architectures"], where="tiny"))
        try:
            target[field] = json.loads(text)
        except ValueError:
            target[field] = text  # a string without quotes, such as dtype=bfloat16
        names.add(field)
    if names == {"dtype"}:  # one dtype for the language model and the vision encoder
        for nested in changed.values():
            if isinstance(nested, dict) and "dtype" in nested:
                nested["dtype"] = changed["dtype"]
    language = language_config(changed)
    layers = language.get("num_hidden_layers")
    if "num_hidden_layers" in names and isinstance(layers, int):  # repeat or truncate the pattern
        before = language_config(dict(config))["num_hidden_layers"]
        stated = language | {"num_hidden_layers": before}
        language |= with_num_layers(stated, layers, keep=names)
    return changed
