"""`inspect`: what a checkpoint is, where each tensor goes, what each rank would read, hold and write.

Neither torch nor what draws tables is imported: it answers before they would be there, of 60,000 tensors too.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.hf.headers import TensorInfo
from exaone_bridge.checkpoint.hf.source import HFSource, check_layout, plan_of, survey
from exaone_bridge.checkpoint.reshard.plan import Plan
from exaone_bridge.checkpoint.reshard.validate import prove
from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.schema.layer_schedule import mlp_pattern, pattern
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["inspect"]

_TRIED = (2, 4, 8, 16, 32)  # ranks along one axis, when it is asked which layouts cannot work
_RANKS_SHOWN = 16


def inspect(folder: Path, layout: Layout, *, as_json: bool) -> None:
    """Print it; of a folder that does not fit its config.json also which tensors do not, before it is refused.

    Raises:
        CheckpointError, UnsupportedConfig: see `survey`.
        UnmappedTensors: see `HFSource.check_names`; by then all is printed.
        UnsupportedLayout: the model cannot be cut so.
    """
    collecting = gc.isenabled()
    gc.disable()  # 60,000 tensors are a million objects, and none of them is garbage before the end
    try:
        source = _print(folder, layout, as_json)
    finally:
        if collecting:
            gc.enable()
    source.check_names()


def _print(folder: Path, layout: Layout, as_json: bool) -> HFSource:
    source = survey(folder)
    check_layout(source.model_config, layout)
    plan = source.plan(layout)
    if not source.missing:
        prove(plan, source.shapes)
    text = _json(source, plan) if as_json else "\n".join(_lines(source, plan))
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return source


def _unsupported(source: HFSource) -> Iterator[tuple[str, str]]:
    """Yield layouts with one parallel axis that the model does not support, and the reason."""
    for axis in ("tp", "pp", "ep"):
        for ranks in _TRIED:
            layout = Layout(**{axis: ranks, "etp": 1 if axis == "ep" else None})  # type: ignore[arg-type]
            try:
                check_layout(source.model_config, layout)
                plan_of(source.mappings, source.model_config, layout)
            except UnsupportedLayout as error:
                reason = str(error).removeprefix("parallel layout: ").partition("; ")[0]
                yield f"{axis.upper()}{ranks}", reason
                if axis == "ep" and not getattr(source.model_config, "num_experts", 0):
                    break  # no number of ranks will do


def _ranks(plan: Plan) -> list[dict[str, Any]]:
    written = plan.written_bytes()
    return [
        {
            **rank._asdict(),
            "layers": [list(chunk) for chunk in plan.stages[rank.pp]],
            "read_bytes": plan.read_bytes(rank),
            "parameter_bytes": plan.held_bytes(rank),
            "written_bytes": written[number],
        }
        for number, rank in enumerate(plan.ranks())
    ]


def _json(source: HFSource, plan: Plan) -> str:
    model_config = source.model_config
    summary = {
        "folder": str(source.folder),
        "family": source.family.name,
        "parameters": source.parameters,
        "bytes": source.nbytes,
        "dtype": model_config.dtype,
        "layers": pattern(model_config.windows),
        "mlp": mlp_pattern(_moe(model_config)),
        "rope": list(model_config.rope),
        "tied": model_config.tied,
        "layout": str(plan.layout),
        "padding": plan.padding,
        "ranks": _ranks(plan),
        "unsupported_layouts": dict(_unsupported(source)),
        "passthrough": list(source.passthrough),
        "unexpected": list(source.unexpected),
        "missing": {name: list(shape) for name, shape in source.missing.items()},
    }
    # A line each, and by hand: the encoder that indents is written in Python, and takes a second for 60,000 tensors.
    tensors = ",\n".join(_json_tensors(source))
    return f'{json.dumps(summary, indent=2)[:-2]},\n  "tensors": {{\n{tensors}\n  }}\n}}'


def _json_tensors(source: HFSource) -> Iterator[str]:
    destinations: dict[str, str] = {}
    for mapping in source.mappings:
        parameters, *columns = mapping.columns()
        for names in columns:
            destinations.update(zip(names, parameters, strict=True))
    known: dict[
        tuple[object, ...], str
    ] = {}  # few shapes, types and files; a path's own hash takes long
    goes_to = map(destinations.get, source.tensors)  # null: passthrough or unexpected
    for info, name, to in zip(
        source.tensors.values(), _quoted(source.tensors), _quoted(goes_to), strict=True
    ):
        kind = info.shape, info.dtype, id(info.file)
        if (text := known.get(kind)) is None:
            described = {"shape": info.shape, "dtype": info.dtype, "file": info.file.name}
            text = known[kind] = json.dumps(described)[1:-1]
        yield f'    {name}: {{{text}, "megatron": {to}}}'


def _quoted(values: Iterable[str | None]) -> list[str]:
    """Each as JSON; an encoded text has no line of its own, so that all can be encoded at once."""
    return json.dumps(list(values), separators=("\n", ":"))[1:-1].split("\n")


def _lines(source: HFSource, plan: Plan) -> Iterator[str]:
    model_config, layout = source.model_config, plan.layout
    size = f"{source.parameters:,} in {len(source.tensors)} tensors, {model_config.dtype}, {source.nbytes / 1e9:.2f} GB"
    what = {
        "family": source.family.name,
        "parameters": size,
        "layers (L sliding-window, G full)": pattern(model_config.windows),
    }
    if any(_moe(model_config)):
        what["MLP (D dense, E experts)"] = mlp_pattern(_moe(model_config))
        what["experts"] = (
            f"{model_config.num_experts}, {model_config.topk} a token, {model_config.num_shared_experts} shared"
        )
    what |= {
        "RoPE (R applied, - none)": "".join("R" if has else "-" for has in model_config.rope),
        "sliding window": str(next((window for window in model_config.windows if window), "-")),
        "heads": f"{model_config.num_heads} / {model_config.num_kv_heads} x {model_config.head_dim}",
        "embeddings": "tied" if model_config.tied else "untied",
        "layout": f"{layout} fits: {layout.ranks} ranks",
        "padding of the vocabulary": f"{plan.padding:,} elements",
    }
    yield str(source.folder)
    yield from (f"  {name:<36}{value}" for name, value in what.items())
    yield "Ranks"
    yield from _rank_lines(_ranks(plan))
    yield from (f"  {name} is not supported: {reason}" for name, reason in _unsupported(source))
    yield "Where each tensor goes (* is the layer, then the expert; the letters are the axes of schema/param_mapping.py)"
    for mapping in source.mappings:
        for tensor in mapping.hf:
            yield f"  {tensor.name} [{' x '.join(tensor.axes)}] -> {mapping.megatron} ({mapping.kind})"
    yield from (
        f"{_one(info)} -> passthrough: exported unchanged" for info in source.passthrough.values()
    )
    yield from (
        f"{_one(info)} -> unexpected: no parameter mapping has this name"
        for info in source.unexpected.values()
    )
    for name, shape in source.missing.items():
        yield f"  {name} {list(shape)} -> missing: the model needs it"


def _one(info: TensorInfo) -> str:
    name = info.name if info.name.isprintable() else repr(info.name)  # it comes from a file
    return f"  {name} {list(info.shape)} {info.dtype}, {info.file.name}"


def _rank_lines(ranks: list[dict[str, Any]]) -> Iterator[str]:
    """A line a rank, in columns."""
    lines = [["rank", "coordinates", "layers", "import reads", "parameters", "export writes"]]
    for number, rank in enumerate(ranks[:_RANKS_SHOWN]):
        place = " ".join(f"{axis}{rank[axis]}" for axis in ("tp", "pp", "ep", "etp"))
        layers = ", ".join(f"{chunk[0]}-{chunk[-1]}" for chunk in rank["layers"] if chunk)
        sizes = (
            f"{rank[what] / 1e6:,.1f} MB"
            for what in ("read_bytes", "parameter_bytes", "written_bytes")
        )
        lines.append([str(number), place, layers, *sizes])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    if len(ranks) > _RANKS_SHOWN:
        yield f"  ... and {len(ranks) - _RANKS_SHOWN} more (--json has all)"


def _moe(model_config: Any) -> tuple[bool, ...]:
    return getattr(model_config, "moe", (False,) * model_config.num_layers)
