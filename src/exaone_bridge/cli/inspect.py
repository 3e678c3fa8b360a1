"""`inspect`: what a checkpoint is, where each tensor goes, what each rank would read, hold and write. No torch."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.plan import Plan
from exaone_bridge.checkpoint.prove import prove
from exaone_bridge.checkpoint.source import HFSource, check_layout, open_source, plan_of
from exaone_bridge.cli.show import say, table
from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.parts.layout import Layout
from exaone_bridge.parts.schedule import mlp_pattern, pattern

__all__ = ["inspect"]

_TRIED = (2, 4, 8, 16, 32)  # ranks along one axis, when it is asked which layouts cannot work
_RANKS_SHOWN = 16


def inspect(folder: Path, layout: Layout, *, as_json: bool) -> None:
    """Print it.

    Raises:
        CheckpointError, UnsupportedConfig, UnmappedTensors: see `open_source`.
        UnsupportedLayout: the model cannot be cut so.
    """
    gc.disable()  # 60,000 tensors are a million objects, and none of them is garbage before the end
    source = open_source(folder)
    check_layout(source.facts, layout)
    plan = source.plan(layout)
    prove(plan, {name: info.shape for name, info in source.of_the_model.items()})
    refused = dict(_refused(source))
    if as_json:
        print(json.dumps(_summary(source, plan, refused), indent=2))
        return
    _print(source, plan, refused)


def _refused(source: HFSource) -> Iterator[tuple[str, str]]:
    """Layouts that cut along one axis only and cannot work, and why."""
    for axis in ("tp", "pp", "ep"):
        for ranks in _TRIED:
            layout = Layout(**{axis: ranks, "etp": 1 if axis == "ep" else None})  # type: ignore[arg-type]
            try:
                check_layout(source.facts, layout)
                plan_of(source.rows, source.facts, layout)
            except UnsupportedLayout as error:
                reason = str(error).removeprefix("parallel layout: ").partition("; ")[0]
                yield f"{axis.upper()}{ranks}", reason
                if axis == "ep" and not getattr(source.facts, "num_experts", 0):
                    break  # no number of ranks will do


def _ranks(plan: Plan) -> list[dict[str, Any]]:
    written = plan.written_bytes()
    return [
        {
            **rank._asdict(),
            "layers": [list(chunk) for chunk in plan.stages[rank.pp]],
            "read": plan.read_bytes(rank),
            "held": plan.held_bytes(rank),
            "written": written[number],
        }
        for number, rank in enumerate(plan.ranks())
    ]


def _summary(source: HFSource, plan: Plan, refused: dict[str, str]) -> dict[str, Any]:
    facts = source.facts
    destinations = {tensor: name for row in source.rows for name, *tensors in row.names() for tensor in tensors}
    moe = getattr(facts, "moe", (False,) * facts.num_layers)
    return {
        "folder": str(source.folder),
        "family": source.family.name,
        "parameters": source.parameters,
        "bytes": source.nbytes,
        "dtype": facts.dtype,
        "layers": pattern(facts.windows),
        "feed_forward": mlp_pattern(moe),
        "rope": list(facts.rope),
        "tied": facts.tied,
        "layout": str(plan.layout),
        "padding": plan.padding,
        "ranks": _ranks(plan),
        "refused_layouts": refused,
        "carried": sorted(source.carried),
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "file": tensor.file.name,
                "megatron": destinations.get(name),  # null: carried beside the model
            }
            for name, tensor in source.tensors.items()
        },
    }


def _print(source: HFSource, plan: Plan, refused: dict[str, str]) -> None:
    facts, layout = source.facts, plan.layout
    moe = getattr(facts, "moe", (False,) * facts.num_layers)
    size = f"{source.parameters:,} in {len(source.tensors)} tensors, {facts.dtype}, {source.nbytes / 1e9:.2f} GB"
    rope = "".join("R" if has else "-" for has in facts.rope)
    table(
        str(source.folder),
        ["what", "value"],
        [
            ["family", source.family.name],
            ["parameters", size],
            ["layers (L windowed, G global)", pattern(facts.windows)],
            *([["feed-forward (D dense, E experts)", mlp_pattern(moe)], _experts_line(facts)] if any(moe) else []),
            ["RoPE (R yes, - none)", rope],
            ["window", str(next((window for window in facts.windows if window), "-"))],
            ["heads", f"{facts.num_heads} / {facts.num_kv_heads} x {facts.head_dim}"],
            ["embeddings", "tied" if facts.tied else "untied"],
            ["layout", f"{layout} fits: {layout.ranks} ranks"],
            ["padding of the vocabulary", f"{plan.padding:,} elements"],
        ],
    )
    _print_ranks(_ranks(plan))
    for name, reason in refused.items():
        say(f"  {name} cannot work: {reason}")
    say("Where each tensor goes (* is the layer, then the expert; the letters are the axes of parts/rows.py)")
    for row in source.rows:
        for tensor in row.hf:
            say(f"  {tensor.name} [{' x '.join(tensor.axes)}] -> {row.megatron} ({row.kind})")
    for name, info in source.carried.items():
        say(f"  {name} {list(info.shape)} -> carried beside the model, unchanged")


def _print_ranks(ranks: list[dict[str, Any]]) -> None:
    lines = [
        [
            str(number),
            " ".join(f"{axis}{rank[axis]}" for axis in ("tp", "pp", "ep", "etp")),
            ", ".join(f"{chunk[0]}-{chunk[-1]}" for chunk in rank["layers"] if chunk),
            *(f"{rank[what] / 1e6:,.1f} MB" for what in ("read", "held", "written")),
        ]
        for number, rank in enumerate(ranks)
    ]
    hidden = len(lines) - _RANKS_SHOWN
    more = [["...", f"{hidden} more", "(--json has all)", "", "", ""]] if hidden > 0 else []
    columns = ["rank", "place", "layers", "import reads", "parameters", "export writes"]
    table("Ranks", columns, lines[:_RANKS_SHOWN] + more)


def _experts_line(facts: Any) -> list[str]:
    return ["experts", f"{facts.num_experts}, {facts.topk} a token, {facts.num_shared_experts} shared"]
