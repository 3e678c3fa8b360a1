"""Parallel layouts, and which of them can shard a model. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.schema.json_types import JSONObject

__all__ = ["UNEVEN_PIPELINE_FIELDS", "Layout"]

# The fields of a Megatron-Core config that divide the layers unevenly over the pipeline stages.
UNEVEN_PIPELINE_FIELDS = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Megatron-Core's parallel sizes.

    Attributes:
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        vpp: model chunks (virtual pipeline stages) of each pipeline rank.
        sp: sequence parallelism: activations outside the sharded linears are sharded along the
            sequence.
        ep: expert-parallel size.
        etp: expert tensor-parallel size; None: tp.
        cp: context-parallel size.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    sp: bool = False
    ep: int = 1
    etp: int | None = None
    cp: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "ep", "etp", "cp"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UnsupportedLayout(
                    name, got=size, wanted="at least 1", remedy=f"leave --{name} out for 1"
                )
        if self.vpp > 1 and self.pp == 1:
            raise UnsupportedLayout(
                "vpp",
                got=self.vpp,
                wanted="1 where pp is 1",
                remedy="virtual stages need a pipeline: raise --pp",
            )
        if self.sp and self.tp == 1:
            raise UnsupportedLayout(
                "sp",
                got="on",
                wanted="off where tp is 1",
                remedy="sequence parallelism shards over the TP ranks: raise --tp",
            )

    @classmethod
    def of(cls, layout: Layout | None, sizes: Layout) -> Layout:
        """Choose between the two ways in which a function takes a layout.

        Args:
            layout: the argument `layout`; None: it was left out.
            sizes: the arguments `tp`, `pp` and so on.

        Raises:
            UnsupportedLayout: both were given.
        """
        if layout is not None and sizes != cls():
            raise UnsupportedLayout(
                "layout",
                got=str(layout),
                wanted=f"left out where sizes ({sizes}) are given too",
                remedy="pass either layout= or tp=, pp= and so on",
            )
        return sizes if layout is None else layout

    @property
    def ranks(self) -> int:
        """The least number of processes: a stage has tp x cp ranks, and ep x etp for experts."""
        return self.pp * math.lcm(self.tp * self.cp, self.ep * self.expert_tp)

    @property
    def expert_tp(self) -> int:
        """Expert tensor-parallel size."""
        return self.tp if self.etp is None else self.etp

    def stage_layers(self, num_layers: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Return the global 0-based layers of each chunk of each pipeline stage.

        The split is Megatron-Core's even one: chunk c of stage p has the layers that follow those
        of chunk c of stage p - 1, and chunk c + 1 of stage 0 follows chunk c of the last stage.
        """
        size = num_layers // (self.pp * self.vpp)
        return tuple(
            tuple(
                tuple(range(first, first + size))
                for first in ((chunk * self.pp + stage) * size for chunk in range(self.vpp))
            )
            for stage in range(self.pp)
        )

    def check(
        self,
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        ffn: int,
        experts: int = 0,
        expert_ffn: int = 0,
    ) -> None:
        """Check that this layout divides a model evenly.

        Args:
            layers, heads, kv_heads, ffn: the model's counts.
            experts, expert_ffn: routed experts and the feed-forward size of one; 0: there are none.

        Raises:
            UnsupportedLayout: tp does not divide heads, KV heads (nor they tp) or the feed-forward
                size, pp x vpp the layers, ep the experts, or etp an expert's feed-forward size.
        """
        if self.ep > 1 and (not experts or experts % self.ep):
            wanted = (
                f"a divisor of {experts} experts" if experts else "1 where the model has no experts"
            )
            raise UnsupportedLayout("ep", got=self.ep, wanted=wanted, remedy="choose another --ep")
        if experts and expert_ffn % self.expert_tp:
            raise UnsupportedLayout(
                "etp",
                got=self.expert_tp,
                wanted=f"a divisor of an expert's feed-forward size {expert_ffn}",
                remedy="choose another --etp",
            )
        if heads % self.tp or ffn % self.tp:
            raise UnsupportedLayout(
                "tp",
                got=self.tp,
                wanted=f"a divisor of {heads} attention heads and of feed-forward size {ffn}",
                remedy="choose another --tp",
            )
        if kv_heads % self.tp and self.tp % kv_heads:
            raise UnsupportedLayout(
                "tp",
                got=self.tp,
                wanted=f"a divisor or a multiple of {kv_heads} KV heads",
                remedy="choose another --tp",
            )
        if layers % (self.pp * self.vpp):
            raise UnsupportedLayout(
                "pp x vpp",
                got=f"{self.pp} x {self.vpp}",
                wanted=f"a divisor of {layers} layers",
                remedy="choose another --pp or --vpp, or set the provider's "
                "pipeline_model_parallel_layout yourself",
            )

    def provider_overrides(self) -> JSONObject:
        """Return the model provider's fields of this layout."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp if self.vpp > 1 else None,
            "sequence_parallel": self.sp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "context_parallel_size": self.cp,
        }

    def __str__(self) -> str:
        names = [f"TP{self.tp}", f"PP{self.pp}"] + ([f"VPP{self.vpp}"] if self.vpp > 1 else [])
        if self.ep > 1:
            names.append(f"EP{self.ep}")
        if self.etp is not None:
            names.append(f"ETP{self.etp}")
        if self.cp > 1:
            names.append(f"CP{self.cp}")
        return " x ".join(names) + (" + SP" if self.sp else "")
