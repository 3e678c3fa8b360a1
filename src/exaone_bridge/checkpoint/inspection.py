"""Describes a checkpoint, its parameter mapping and its shards per rank, from headers alone.

No torch is imported: that would take longer than inspecting 60,000 tensors.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import TensorInfo
from exaone_bridge.checkpoint.reshard.plan import ReshardPlan, check_layout, reshard_plan
from exaone_bridge.checkpoint.reshard.validate import validate_plan
from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.layer_schedule import attention_pattern, mlp_pattern
from exaone_bridge.schema.model_config import ModelConfig
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.size_text import size_text

__all__ = [
    "Inspection",
    "inspect_hf_folder",
    "layout_text",
    "model_summary",
    "without_garbage_collection",
]

_TRIED_SIZES = (2, 4, 8, 16, 32)  # of one parallel axis, to list the layouts that are not supported
_MAX_RANKS_SHOWN = 16


@dataclass(frozen=True, slots=True, repr=False)
class Inspection:
    """A Hugging Face folder, and what each rank of a layout would read and write of it.

    It is true if `passed` is.

    Attributes:
        checkpoint: the folder's config, parameter mappings and tensors.
        plan: which slice of which tensor belongs to which rank.
    """

    checkpoint: HFCheckpoint
    plan: ReshardPlan

    @property
    def passed(self) -> bool:
        """Whether no key is missing or unexpected."""
        return not self.missing and not self.unexpected

    @property
    def missing(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of the tensors that the model has and the folder lacks."""
        return self.checkpoint.missing

    @property
    def unexpected(self) -> tuple[str, ...]:
        """The names of the tensors that the model does not have."""
        return tuple(self.checkpoint.unexpected)

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        lines = [str(self.checkpoint.folder)]
        lines += [f"  {name:<36}{value}" for name, value in self.summary().items()]
        lines += [
            f"  {len(names):,} {kind} keys"
            for kind, names in (("missing", self.missing), ("unexpected", self.unexpected))
            if names
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(repr(self))}</pre>"

    def summary(self) -> dict[str, str]:
        """Return family, size and shape of the model, and the layout, for people."""
        return _summary(self.checkpoint, self.plan)

    def text(self) -> str:
        """Return the summary, the ranks and all parameter mappings, for people."""
        return "\n".join(_lines(self.checkpoint, self.plan))

    def to_dict(self) -> JSONObject:
        """Return plain data, as `exaone-bridge inspect --json` prints it."""
        return _to_dict(self.checkpoint, self.plan)


def inspect_hf_folder(folder: Path, layout: Layout) -> Inspection:
    """Describe a Hugging Face folder, without torch; see `convert.inspection.inspect`.

    Raises:
        CheckpointError: the folder is missing, damaged or unsafe.
        UnsupportedConfig: its config.json is not supported.
        UnsupportedLayout: the model cannot be sharded by this layout.
    """
    with without_garbage_collection():
        checkpoint = HFCheckpoint.survey(folder)
        check_layout(checkpoint.model_config, layout)
        plan = reshard_plan(checkpoint.model, layout)
        if not checkpoint.missing:
            validate_plan(plan, checkpoint.shapes)
    return Inspection(checkpoint, plan)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Save 5% of the time with 60,000 tensors: a million objects, none of which is garbage."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _unsupported(source: HFCheckpoint) -> Iterator[tuple[str, str]]:
    """Yield layouts with one parallel axis that the model does not support, and the reason."""
    for axis in ("tp", "pp", "ep"):
        for ranks in _TRIED_SIZES:
            sizes: JSONObject = {axis: ranks, "etp": 1 if axis == "ep" else None}
            layout = Layout(**sizes)
            try:
                check_layout(source.model_config, layout)
                reshard_plan(source.model, layout)
            except UnsupportedLayout as error:
                reason = str(error).removeprefix("parallel layout: ").partition("; ")[0]
                yield f"{axis.upper()}{ranks}", reason
                if axis == "ep" and not source.model_config.num_experts:
                    break  # a dense model supports no EP at all


def _ranks(plan: ReshardPlan) -> list[JSONObject]:
    written = plan.written_bytes()
    return [
        {
            **rank._asdict(),
            "layers": [list(chunk) for chunk in plan.stages[rank.pp]],
            "read_bytes": plan.read_bytes(rank),
            "parameter_bytes": plan.local_bytes(rank),
            "written_bytes": written[number],
        }
        for number, rank in enumerate(plan.ranks())
    ]


def _to_dict(source: HFCheckpoint, plan: ReshardPlan) -> JSONObject:
    model_config = source.model_config
    destinations: dict[str, str] = {}
    for mapping in source.mappings:
        parameters, *columns = mapping.columns()
        for names in columns:
            destinations.update(zip(names, parameters, strict=True))
    return {
        "folder": str(source.folder),
        "family": source.family.name,
        "parameters": source.num_elements,
        "bytes": source.nbytes,
        "dtype": model_config.dtype,
        "layers": attention_pattern(model_config.windows),
        "mlp": mlp_pattern(model_config.moe_layer_mask),
        "rope": list(model_config.rope),
        "tied": model_config.tied,
        "layout": str(plan.layout),
        "padding": plan.padding,
        "ranks": _ranks(plan),
        "unsupported_layouts": dict(_unsupported(source)),
        "passthrough": list(source.passthrough),
        "unexpected": list(source.unexpected),
        "missing": source.missing,
        "notes": source.notes,
        "tensors": {
            name: {
                "shape": info.shape,
                "dtype": info.dtype,
                "file": info.file.name,
                "megatron": destinations.get(name),  # null: passthrough or unexpected
            }
            for name, info in source.tensors.items()
        },
    }


def _lines(source: HFCheckpoint, plan: ReshardPlan) -> Iterator[str]:
    yield str(source.folder)
    yield from (f"  {note}" for note in source.notes)
    yield from (f"  {name:<36}{value}" for name, value in _summary(source, plan).items())
    yield "Ranks"
    yield from _rank_lines(_ranks(plan))
    yield from (f"  {name} is not supported: {why}" for name, why in _unsupported(source))
    yield "Parameter mapping (the first * is the layer, the second the expert)"
    for mapping in source.mappings:
        for tensor in mapping.hf:
            shape = " x ".join(tensor.axes)
            yield f"  {tensor.name} [{shape}] -> {mapping.megatron} ({mapping.kind})"
    for info in source.passthrough.values():
        yield f"  {_described(info)} -> passthrough: exported unchanged"
    for info in source.unexpected.values():
        yield f"  {_described(info)} -> unexpected: no parameter mapping has this name"
    for name, sizes in source.missing.items():
        yield f"  {name} {list(sizes)} -> missing: the model needs it"


def _summary(source: HFCheckpoint, plan: ReshardPlan) -> dict[str, str]:
    return {
        "family": source.family.name,
        "parameters": f"{source.num_elements:,} in {len(source.tensors)} tensors, "
        f"{source.model_config.dtype}, {size_text(source.nbytes)}",
        **model_summary(source.model_config),
        "layout": layout_text(plan.layout),
        "vocabulary padding": f"{plan.padding:,} elements",
    }


def layout_text(layout: Layout) -> str:
    """Return a layout and its number of ranks, for people."""
    return f"{layout}, {layout.ranks} rank{'s' * (layout.ranks > 1)}"


def model_summary(model_config: ModelConfig) -> dict[str, str]:
    """Return layers, attention, experts and embeddings of a model, for people."""
    heads = f"{model_config.num_heads} / {model_config.num_kv_heads} x {model_config.head_dim}"
    summary = {"layers (L sliding-window, G full)": attention_pattern(model_config.windows)}
    if (moe := model_config.moe) is not None:
        summary |= {
            "MLP (D dense, E experts)": mlp_pattern(model_config.moe_layer_mask),
            "experts": f"{moe.num_experts}, {moe.topk} per token, {moe.num_shared_experts} shared",
        }
    return summary | {
        "RoPE (R applied, - none)": "".join("R" if rope else "-" for rope in model_config.rope),
        "sliding window": str(next((window for window in model_config.windows if window), "-")),
        "heads / KV heads x head width": heads,
        "embeddings": "tied" if model_config.tied else "untied",
    }


def _described(info: TensorInfo) -> str:
    name = info.name if info.name.isprintable() else repr(info.name)  # it comes from a file
    return f"{name} {list(info.shape)} {info.dtype}, {info.file.name}"


def _rank_lines(ranks: list[JSONObject]) -> Iterator[str]:
    lines = [["rank", "coordinates", "layers", "import reads", "parameters", "export writes"]]
    for number, rank in enumerate(ranks[:_MAX_RANKS_SHOWN]):
        coordinates = " ".join(f"{axis}{rank[axis]}" for axis in ("tp", "pp", "ep", "etp"))
        layers = ", ".join(f"{chunk[0]}-{chunk[-1]}" for chunk in rank["layers"] if chunk)
        nbytes = (rank[key] for key in ("read_bytes", "parameter_bytes", "written_bytes"))
        sizes = (f"{size / 1e6:,.1f} MB" for size in nbytes)
        lines.append([str(number), coordinates, layers, *sizes])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    if len(ranks) > _MAX_RANKS_SHOWN:
        yield f"  ... and {len(ranks) - _MAX_RANKS_SHOWN} more (--json lists all)"
