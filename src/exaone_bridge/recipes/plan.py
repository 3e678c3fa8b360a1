"""How a recipe spreads a model over GPUs, and what is refused. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from exaone_bridge.errors import UnsupportedConfig, UnsupportedLayout
from exaone_bridge.schema.model_family import ModelConfig
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["Plan"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout, the batch, and how activations are kept.

    Attributes:
        gpus: processes, one a GPU.
        layout: how the model and its sequences are cut.
        seq_length: tokens of a sequence.
        micro_batch, global_batch: sequences that pass a stage at once, and that make a step.
        recompute: keep a layer's input only, and run the layer again in the backward pass.
    """

    gpus: int
    layout: Layout
    seq_length: int
    micro_batch: int = 1
    global_batch: int
    recompute: bool = False

    @property
    def cp(self) -> int:
        """Ranks that cut the sequence."""
        return self.layout.cp

    @property
    def dp(self) -> int:
        """Copies of the model that see different data."""
        return self.gpus // (self.layout.tp * self.layout.pp * self.cp)

    @property
    def edp(self) -> int:
        """Copies of each expert."""
        return self.gpus // (self.layout.pp * self.layout.ep * self.layout.expert_tp)

    @property
    def micro_batches(self) -> int:
        """Micro batches of a step, on each copy of the model."""
        return self.global_batch // (self.micro_batch * self.dp)

    def changed(self, **changes: Any) -> Plan:
        """This plan with other values of its own fields, or of its layout's.

        Raises:
            UnsupportedConfig: neither has a field of that name.
            UnsupportedLayout: the layout is none.
        """
        known = (
            {field.name for field in fields(self)} - {"layout"},
            {field.name for field in fields(self.layout)},
        )
        for name in changes:
            if not any(name in names for names in known):
                raise UnsupportedConfig(
                    name, got=changes[name], known=sorted(known[0] | known[1]), where="recipe"
                )
        own, cut = (
            {name: value for name, value in changes.items() if name in names} for names in known
        )
        return replace(self, layout=replace(self.layout, **cut), **own)

    def check(self, model_config: ModelConfig) -> None:
        """Refuse what does not come out even, for this model.

        Raises:
            UnsupportedLayout: GPUs, batch or sequence that the layout does not divide, or what `Layout.check` refuses.
        """
        layout, cp = self.layout, self.cp
        for name in ("gpus", "seq_length", "micro_batch", "global_batch"):
            if (size := getattr(self, name)) < 1:
                raise UnsupportedLayout(
                    name, got=size, wanted="at least 1", remedy=f"give {name} a size"
                )
        experts = int(getattr(model_config, "num_experts", 0))
        layout.check(
            layers=model_config.num_layers,
            heads=model_config.num_heads,
            kv_heads=model_config.num_kv_heads,
            ffn=model_config.ffn_size,
            experts=experts,
            expert_ffn=int(getattr(model_config, "expert_ffn_size", 0)),
        )
        _divides(
            "gpus",
            self.gpus,
            layout.tp * layout.pp * cp,
            "tp x pp x cp",
            "change the number of GPUs, or the layout",
        )
        if experts:
            whole = layout.pp * layout.ep * layout.expert_tp
            _divides(
                "gpus",
                self.gpus,
                whole,
                "pp x ep x etp",
                "change the number of GPUs, or the layout",
            )
            if layout.tp > 1 and not layout.sp:
                raise UnsupportedLayout(
                    "sp",
                    got="off",
                    wanted="on where tp is more than 1 and the model has experts",
                    remedy="Megatron-Core trains experts with tp only so",
                )
        size = self.micro_batch * self.dp
        _divides(
            "global_batch",
            self.global_batch,
            size,
            "micro_batch x data-parallel size",
            "change the batch",
        )
        if layout.vpp > 1:
            remedy = (
                "interleaved stages take as many micro batches as there are stages: raise the batch"
            )
            _divides("micro batches", self.micro_batches, layout.pp, "pp", remedy)
        cut = (2 * cp if cp > 1 else 1) * (layout.tp if layout.sp else 1)
        _divides(
            "seq_length",
            self.seq_length,
            cut,
            "2 x cp (x tp with sp)",
            "change the sequence's length",
        )
        if self.seq_length > model_config.max_positions:
            raise UnsupportedLayout(
                "seq_length",
                got=self.seq_length,
                wanted=f"at most the model's {model_config.max_positions} positions",
                remedy="shorten the sequence",
            )

    def row(self) -> dict[str, Any]:
        """What the table of the documentation shows."""
        layout = self.layout
        return {
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
            "micro / global batch": f"{self.micro_batch} / {self.global_batch}",
            "recompute": "full" if self.recompute else "-",
        }


def _divides(what: str, got: int, by: int, name: str, remedy: str) -> None:
    if got < by or got % by:
        raise UnsupportedLayout(what, got=got, wanted=f"a multiple of {name} = {by}", remedy=remedy)
