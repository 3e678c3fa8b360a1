"""Documents packed one after the other (THD), for tests: what each comes out as, beside itself alone."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout


@torch.no_grad()
def packed_logits(
    model: list[Any], documents: list[torch.Tensor], vocab_size: int
) -> list[torch.Tensor]:
    """Logits [S, V] fp32 of each document [S], out of one packed forward pass of a model without pipeline stages."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    from exaone_bridge.modules.context_parallel import local_positions

    device = next(model[0].parameters()).device
    starts = [0, *itertools.accumulate(len(document) for document in documents)]
    group = parallel_state.get_context_parallel_group()
    held = [
        torch.cat(
            [
                begin + local_positions(rank, group.size(), end - begin)
                for begin, end in itertools.pairwise(starts)
            ]
        )
        for rank in range(group.size())
    ]
    mine = held[group.rank()]
    bounds = torch.tensor(starts, dtype=torch.int32, device=device)
    longest = max(len(document) for document in documents)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    tokens = torch.cat(documents)[mine][None].to(device)
    places = torch.cat([torch.arange(len(document)) for document in documents])[mine][None].to(
        device
    )
    output = model[0].eval()(tokens, places, None, packed_seq_params=packed)

    def gathered(tensor: torch.Tensor, over: Any, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(over.size())]
        dist.all_gather(parts, tensor.contiguous(), group=over)
        return torch.cat(parts, dim=dim)

    whole = gathered(output[0].float(), parallel_state.get_tensor_model_parallel_group(), -1)[
        ..., :vocab_size
    ]
    whole = gathered(whole, group, 0)[torch.cat(held).argsort().to(device)].cpu()
    return [whole[begin:end] for begin, end in itertools.pairwise(starts)]


def difference(
    folder: Any, layout: Layout, lengths: list[int], vocab_size: int, **build_options: Any
) -> tuple[float, float]:
    """Mean and maximum, over all documents, of what packing changes of a document's logits, on this rank of a world."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    model = build(AutoBridge.from_hf_pretrained(folder), layout, **build_options)
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    together = packed_logits(model, documents, vocab_size)
    alone = [forward_logits(model, document[None])[0] for document in documents]
    apart = torch.cat(
        [(a - b[0]).abs() for a, b in zip(together, alone, strict=True) if b is not None]
    )
    return apart.mean().item(), apart.max().item()


def worst_on_cpu(folder: Any, layout: Layout, lengths: list[int]) -> float:
    """The maximum of `difference` on forked ranks, of a model whose vocabulary has 387 words."""
    return max(
        worst
        for _, worst in ForkLauncher(layout.ranks).all(difference, folder, layout, lengths, 387)
    )
