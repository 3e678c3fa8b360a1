"""Parallel layouts, and which of them a model can be cut into. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from exaone_bridge.errors import UnsupportedLayout

__all__ = ["Layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks cut each axis of the model; `vpp` counts the model chunks a pipeline rank holds."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    sp: bool = False  # sequence parallelism: activations between the cut layers are cut along the sequence

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp"):
            if (size := getattr(self, name)) < 1:
                raise UnsupportedLayout(name, got=size, wanted="at least 1", remedy=f"leave --{name} out for 1")
        if self.vpp > 1 and self.pp == 1:
            raise UnsupportedLayout(
                "vpp", got=self.vpp, wanted="1 where pp is 1", remedy="virtual stages need a pipeline: raise --pp"
            )
        if self.sp and self.tp == 1:
            raise UnsupportedLayout(
                "sp", got="on", wanted="off where tp is 1", remedy="sequence parallelism cuts along tp: raise --tp"
            )

    @property
    def ranks(self) -> int:
        """Processes the layout needs, without data parallelism."""
        return self.tp * self.pp

    def check(self, *, layers: int, heads: int, kv_heads: int, ffn: int) -> None:
        """Refuse a model that this layout cannot cut evenly.

        Args:
            layers, heads, kv_heads, ffn: the model's counts.

        Raises:
            UnsupportedLayout: heads, key-value heads or feed-forward width over tp, or layers over pp x vpp.
        """
        if heads % self.tp or ffn % self.tp:
            raise UnsupportedLayout(
                "tp",
                got=self.tp,
                wanted=f"a divisor of {heads} attention heads and of feed-forward width {ffn}",
                remedy="choose another --tp",
            )
        if kv_heads % self.tp and self.tp % kv_heads:
            raise UnsupportedLayout(
                "tp",
                got=self.tp,
                wanted=f"a divisor or a multiple of {kv_heads} key-value heads",
                remedy="choose another --tp",
            )
        if layers % (self.pp * self.vpp):
            raise UnsupportedLayout(
                "pp x vpp",
                got=f"{self.pp} x {self.vpp}",
                wanted=f"a divisor of {layers} layers",
                remedy="choose another --pp or --vpp, or set the provider's pipeline_model_parallel_layout yourself",
            )

    def __str__(self) -> str:
        names = [f"TP{self.tp}", f"PP{self.pp}"] + ([f"VPP{self.vpp}"] if self.vpp > 1 else [])
        return " x ".join(names) + (" + SP" if self.sp else "")
