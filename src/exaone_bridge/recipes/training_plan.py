"""How a recipe distributes a model over GPUs. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, TypedDict, Unpack

from exaone_bridge.errors import UnsupportedConfig, UnsupportedLayout
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.model_config import ModelConfig
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["CudaGraphKind", "PlanOverrides", "Precision", "TrainingPlan"]

CudaGraphKind = Literal["off", "layers", "full-iteration"]
Precision = Literal["bf16", "fp8", "fp8-blockwise"]
_CHOICES = {
    "precision": ("bf16", "fp8", "fp8-blockwise"),
    "cuda_graphs": ("off", "layers", "full-iteration"),
    "cp_full_attention": (None, "p2p", "all_gather", "a2a"),
    "cp_sliding_window": (None, "all_gather", "a2a"),
}


class PlanOverrides(TypedDict, total=False):
    """The keyword arguments with which a recipe's caller changes its plan: see `TrainingPlan`."""

    gpus: int
    tp: int
    pp: int
    vpp: int
    sp: bool
    ep: int
    etp: int | None
    cp: int
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    recompute: bool
    precision: Precision
    pad_samples: bool
    cuda_graphs: CudaGraphKind
    fuse_weight_gradients: bool
    tp_overlap: bool
    shared_expert_overlap: bool
    cp_full_attention: str | None
    cp_sliding_window: str | None


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The number of GPUs, the parallel layout, the batch, and what trades memory for speed.

    Attributes:
        gpus: the world size, one process per GPU.
        layout: the parallel layout of the model.
        seq_length: tokens per sequence.
        micro_batch_size: sequences per microbatch and data-parallel rank.
        global_batch_size: sequences per optimizer step, over all data-parallel ranks.
        recompute: keep only each layer's input, and recompute the layer in the backward pass.
        precision: of the linears' matrix products: bf16, FP8 with a scale for each tensor and step
            (current scaling), or FP8 with a scale for each block. See `recipes/precision.py`.
        pad_samples: pad each sample of fine-tuning that is not packed to `seq_length`, in place of
            the length of the longest sample of its batch.
        cuda_graphs: the most that is captured in CUDA graphs; `recipes/cuda_graphs.py` captures
            less where shapes vary. It is off by default: losses with and without graphs have not
            been compared on GPUs.
        fuse_weight_gradients: Transformer Engine's linears add weight gradients to the fp32 main
            gradients within the matrix product, where a bf16 gradient is made and added otherwise.
            Off by default, because it has not been measured, and rounds less.
        tp_overlap: tensor-parallel communication overlaps with matrix products, by Transformer
            Engine's userbuffers. Off by default, because it has not been measured.
        shared_expert_overlap: shared experts overlap with the dispatch of tokens to routed ones.
            Off by default, because it has not been measured.
        cp_full_attention, cp_sliding_window: how context-parallel ranks exchange keys and values in
            layers of each kind (`modules/context_parallel.py`); None: p2p, and all_gather.
    """

    gpus: int
    layout: Layout
    seq_length: int
    micro_batch_size: int = 1
    global_batch_size: int
    recompute: bool = False
    precision: Precision = "bf16"
    pad_samples: bool = False
    cuda_graphs: CudaGraphKind = "off"
    fuse_weight_gradients: bool = False
    tp_overlap: bool = False
    shared_expert_overlap: bool = False
    cp_full_attention: str | None = None
    cp_sliding_window: str | None = None

    @property
    def cp(self) -> int:
        """The context-parallel size."""
        return self.layout.cp

    @property
    def dp(self) -> int:
        """The data-parallel size."""
        return self.gpus // (self.layout.tp * self.layout.pp * self.cp)

    @property
    def edp(self) -> int:
        """The expert data-parallel size: replicas of each expert."""
        return self.gpus // (self.layout.pp * self.layout.ep * self.layout.expert_tp)

    @property
    def num_microbatches(self) -> int:
        """Microbatches per optimizer step and data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    @property
    def environment(self) -> dict[str, int]:
        """Environment variables that this layout needs before CUDA starts.

        With one queue, kernels start in the order of their launches, so communication starts before
        the matrix product that it overlaps with: a step at TP 2 took 860 ms in place of 1047
        (EXAONE-4.0-1.2B, 8192 tokens, two H100).
        """
        overlaps = self.layout.tp > 1 or self.cp > 1
        return {"CUDA_DEVICE_MAX_CONNECTIONS": 1} if overlaps else {}

    def with_overrides(self, **overrides: Unpack[PlanOverrides]) -> TrainingPlan:
        """Return a copy with other values for fields of the plan or of its layout.

        Raises:
            UnsupportedConfig: neither the plan nor the layout has a field of that name, or the
                field has no such value.
            UnsupportedLayout: the new layout is not valid by itself.
        """
        given: JSONObject = dict(overrides)
        plan_fields = {field.name for field in fields(self)} - {"layout"}
        layout_fields = {field.name for field in fields(self.layout)}
        for name, value in given.items():
            if name not in plan_fields | layout_fields:
                known = sorted(plan_fields | layout_fields)
                raise UnsupportedConfig(name, got=value, known=known, where="recipe")
            if value not in _CHOICES.get(name, (value,)):
                raise UnsupportedConfig(name, got=value, known=_CHOICES[name], where="recipe")
        layout = {name: value for name, value in given.items() if name in layout_fields}
        rest = {name: value for name, value in given.items() if name in plan_fields}
        return replace(self, layout=replace(self.layout, **layout), **rest)

    def check(self, model_config: ModelConfig) -> None:
        """Check that GPUs, batch and sequence divide evenly over the layout, for this model.

        Raises:
            UnsupportedLayout: a size is not a multiple of what the layout needs, the sequence is
                longer than the model's positions, or `Layout.check` raises.
        """
        layout, cp = self.layout, self.cp
        for name in ("gpus", "seq_length", "micro_batch_size", "global_batch_size"):
            if (size := getattr(self, name)) < 1:
                raise UnsupportedLayout(
                    name, got=size, wanted="at least 1", remedy=f"set {name} to a positive number"
                )
        experts = model_config.num_experts
        layout.check(
            layers=model_config.num_layers,
            heads=model_config.num_heads,
            kv_heads=model_config.num_kv_heads,
            ffn=model_config.ffn_size,
            experts=experts,
            expert_ffn=model_config.expert_ffn_size,
        )
        remedy = "change the number of GPUs, or the layout"
        _check_multiple("gpus", self.gpus, layout.tp * layout.pp * cp, "tp x pp x cp", remedy)
        if experts:
            expert_ranks = layout.pp * layout.ep * layout.expert_tp
            _check_multiple("gpus", self.gpus, expert_ranks, "pp x ep x etp", remedy)
            if layout.tp > 1 and not layout.sp:
                raise UnsupportedLayout(
                    "sp",
                    got="off",
                    wanted="on where tp is more than 1 and the model has experts",
                    remedy="Megatron-Core trains experts with tp only with sequence parallelism",
                )
        _check_multiple(
            "global_batch_size",
            self.global_batch_size,
            self.micro_batch_size * self.dp,
            "micro_batch_size x data-parallel size",
            "change the batch",
        )
        if layout.vpp > 1:
            remedy = (
                "the interleaved schedule needs a multiple of pp microbatches: raise "
                "global_batch_size"
            )
            _check_multiple("num_microbatches", self.num_microbatches, layout.pp, "pp", remedy)
        _check_multiple(
            "seq_length",
            self.seq_length,
            (2 * cp if cp > 1 else 1) * (layout.tp if layout.sp else 1),
            "2 x cp (x tp with sp)",
            "change seq_length",
        )
        self._check_overlap(model_config)
        if self.seq_length > model_config.max_positions:
            raise UnsupportedLayout(
                "seq_length",
                got=self.seq_length,
                wanted=f"at most the model's {model_config.max_positions} positions",
                remedy="lower seq_length",
            )

    def _check_overlap(self, model_config: ModelConfig) -> None:
        """Check that what is to overlap exists; see `check`."""
        layout = self.layout
        has_shared_experts = model_config.moe is not None and model_config.moe.num_shared_experts
        divides = not (
            model_config.num_heads // layout.tp % self.cp
            or max(1, model_config.num_kv_heads // layout.tp) % self.cp
        )
        heads = "a cp that divides a rank's query and KV heads"
        conditions: list[tuple[str, bool, str]] = [
            ("tp_overlap", layout.tp > 1 and layout.sp, "tp more than 1 and sp"),
            ("shared_expert_overlap", bool(has_shared_experts), "shared experts in the model"),
        ]
        for name in ("cp_full_attention", "cp_sliding_window"):
            conditions.append((name, self.cp > 1, "cp more than 1"))
            conditions.append((name, divides or getattr(self, name) != "a2a", heads))
        for name, works, wanted in conditions:
            value = getattr(self, name)
            if value and not works:
                raise UnsupportedLayout(
                    name, got=value, wanted=f"left out without {wanted}", remedy=f"leave {name} out"
                )

    def table_row(self) -> dict[str, str]:
        """Return this plan's columns of the table in docs/recipes.md."""
        layout = self.layout
        columns = {
            "GPUs": self.gpus,
            "TP": layout.tp,
            "PP": layout.pp,
            "VPP": layout.vpp,
            "EP": layout.ep,
            "ETP": "-" if layout.etp is None else layout.etp,
            "CP": self.cp,
            "SP": "yes" if layout.sp else "-",
            "DP": self.dp,
            "sequence": self.seq_length,
            "micro / global batch": f"{self.micro_batch_size} / {self.global_batch_size}",
            "recompute": "full" if self.recompute else "-",
        }
        return {name: str(value) for name, value in columns.items()}


def _check_multiple(name: str, got: int, factor: int, factor_name: str, remedy: str) -> None:
    if got < factor or got % factor:
        wanted = f"a multiple of {factor_name} = {factor}"
        raise UnsupportedLayout(name, got=got, wanted=wanted, remedy=remedy)
