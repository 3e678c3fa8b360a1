"""Packed sequences (THD format): their logits, compared with those of the same sequences alone.

Axes: S sequence, V vocabulary.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout


@torch.no_grad()
def packed_logits(
    model: list[Any], sequences: list[torch.Tensor], vocab_size: int
) -> list[torch.Tensor]:
    """Run one packed forward pass of a model without pipeline stages.

    Args:
        model: the model chunk of this rank, in a list.
        sequences: tokens, [S] each.
        vocab_size: V, without padding.

    Returns:
        Logits [S, V] fp32 of each sequence, on the CPU.
    """
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    from exaone_bridge.modules.collectives import all_gather_cat
    from exaone_bridge.modules.context_parallel import local_positions

    device = next(model[0].parameters()).device
    lengths = [len(sequence) for sequence in sequences]
    bounds = [0, *itertools.accumulate(lengths)]
    cp_group = parallel_state.get_context_parallel_group()
    cp = cp_group.size()
    positions_per_rank = [
        torch.cat(
            [
                begin + local_positions(rank, cp, end - begin)
                for begin, end in itertools.pairwise(bounds)
            ]
        )
        for rank in range(cp)
    ]
    local = positions_per_rank[cp_group.rank()]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        cu_seqlens_q_padded=offsets,
        cu_seqlens_kv_padded=offsets,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    tokens = torch.cat(sequences)[local][None].to(device)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[local][None].to(device)
    output = model[0].eval()(tokens, position_ids, None, packed_seq_params=packed)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    logits = all_gather_cat(output[0].float(), tp_group, -1)[..., :vocab_size]
    order = torch.cat(positions_per_rank).argsort().to(device)
    logits = all_gather_cat(logits, cp_group, 0)[order].cpu()
    return [logits[begin:end] for begin, end in itertools.pairwise(bounds)]


def packing_error(
    hf_path: Path, layout: Layout, lengths: list[int], vocab_size: int, **build_options: Any
) -> tuple[float, float]:
    """On a rank: the mean and the maximum difference of logits between packed and separate runs."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    model = build(AutoBridge.from_hf_pretrained(hf_path), layout, **build_options)
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    packed = packed_logits(model, sequences, vocab_size)
    separate = [forward_logits(model, sequence[None]) for sequence in sequences]
    errors = torch.cat(
        [
            (together - alone[0]).abs()
            for together, alone in zip(packed, separate, strict=True)
            if alone is not None
        ]
    )
    return errors.mean().item(), errors.max().item()


def max_packing_error_on_cpu(hf_path: Path, layout: Layout, lengths: list[int]) -> float:
    """The maximum of `packing_error` over forked ranks, for a vocabulary of 387 tokens."""
    errors = ForkLauncher(layout.ranks).all(packing_error, hf_path, layout, lengths, 387)
    return max(maximum for _, maximum in errors)
