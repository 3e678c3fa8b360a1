"""Megatron-Core models in a world that is up: built, loaded, run and saved through AutoBridge's own calls."""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.training.model_load_save import load_model_config
from megatron.bridge.training.utils.checkpoint_utils import read_run_config
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config, unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from exaone_bridge.bridge.registration import supported
from exaone_bridge.errors import CheckpointError, UnsupportedConfig
from exaone_bridge.modules.collectives import all_gather_cat, all_gather_sequence
from exaone_bridge.modules.context_parallel import local_positions
from exaone_bridge.schema.hf_files import iteration_folder
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["build", "forward_logits", "load_megatron", "over_context", "provider_of"]


Images = dict[
    str, torch.Tensor
]  # a prompt's pixels and grids, by the names of the model's arguments


def build(
    bridge: AutoBridge,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    load_weights: bool = True,
    **overrides: Any,
) -> list[MegatronModule]:
    """This rank's model chunks with the weights of the Hugging Face model, on the CPU where there is no GPU.

    Args:
        dtype: of parameters and arithmetic; None: the checkpoint's.
        load_weights: False: the weights stay as they were initialised.
        overrides: further fields of the provider.

    Raises:
        BridgeError: what `finalize` and the load refuse.
    """
    provider = bridge.to_megatron_provider(load_weights=load_weights)
    dtype = dtype or provider.params_dtype
    fields = layout.provider_overrides() | {
        "backend": backend,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
    }
    provider.apply_overrides_and_finalize(dtype, fields | overrides)
    return provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=not torch.cuda.is_available()
    )


def provider_of(path: Path) -> tuple[Any, dict[str, Any]]:
    """The provider in a Megatron checkpoint's run config, and the Hugging Face config it stands for.

    Raises:
        CheckpointError: no such folder, or not a Megatron-Bridge checkpoint.
        UnsupportedConfig: a model that none of our bridges made.
    """
    folder = iteration_folder(path)
    if not (folder / "run_config.yaml").is_file():
        raise CheckpointError(
            path,
            "this is no Megatron-Bridge checkpoint (run_config.yaml is missing)",
            remedy="name a folder that `import` wrote",
        )
    read_run_config.cache_clear()  # by path: another checkpoint may stand there by now
    try:
        provider, _ = load_model_config(str(folder))
    except Exception as error:  # of YAML, of a missing key, of a class that is not allowed: all of them a damaged file
        raise CheckpointError(
            folder / "run_config.yaml",
            f"cannot be read ({_first_line(error)})",
            remedy="restore the checkpoint",
        ) from error
    for bridge in supported().values():
        if type(provider) is bridge.PROVIDER_CLASS:
            return provider, bridge.megatron_to_hf_config(provider)
    raise UnsupportedConfig(
        "model",
        got=type(provider).__qualname__,
        known=tuple(bridge.PROVIDER_CLASS.__qualname__ for bridge in supported().values()),
        where=str(folder / "run_config.yaml"),
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def load_megatron(
    bridge: AutoBridge, path: Path, layout: Layout, *, backend: str = "auto"
) -> list[MegatronModule]:
    """This rank's model chunks from a Megatron checkpoint, at this layout and backend whatever wrote it.

    Raises:
        CheckpointError: files that are missing or damaged.
    """
    try:
        return bridge.load_megatron_model(
            path, mp_overrides=layout.provider_overrides() | {"backend": backend}
        )
    except (
        CheckpointException,
        CheckpointingException,
        OSError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        causes = getattr(error, "failures", None) or {
            0: (error, None)
        }  # torch's has one for each rank
        cause = next(iter(causes.values()))[0]
        raise CheckpointError(
            path,
            f"the checkpoint cannot be loaded ({_first_line(cause)})",
            remedy="restore the missing or cut files",
        ) from error


@contextlib.contextmanager
def _hidden_states(
    model: list[MegatronModule], into: dict[int, list[torch.Tensor]]
) -> Iterator[None]:
    """Collect each layer's output [S, B, H] (the whole sequence), keyed by global 0-based layer number."""

    def keep(layer: torch.nn.Module, _: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if layer.config.sequence_parallel:
            hidden = _gathered(hidden, dim=0)
        hidden = over_context(hidden, dim=0)
        into.setdefault(layer.layer_number - 1, []).append(hidden.detach().clone())

    handles = [
        layer.register_forward_hook(keep)
        for chunk in unwrap_model(model)
        for layer in chunk.decoder.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gathered(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return all_gather_cat(tensor, parallel_state.get_tensor_model_parallel_group(), dim)


def over_context(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The whole sequence, of which each rank of context parallelism holds its positions along `dim`."""
    return all_gather_sequence(tensor, parallel_state.get_context_parallel_group(), dim)


def _run_stage(
    batches: Iterator[tuple[torch.Tensor, Images]], model: MegatronModule, vocab_size: int
) -> tuple[torch.Tensor, Any]:
    tokens, images = next(batches)
    group = parallel_state.get_context_parallel_group()
    mine = local_positions(group.rank(), group.size(), tokens.shape[1], tokens.device)
    output = model(tokens[:, mine], mine[None], None, **images)

    def logits(tensor: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
        return over_context(_gathered(tensor, dim=-1)[..., :vocab_size].float(), dim=1).cpu()

    return output, logits


@torch.no_grad()
def forward_logits(
    model: list[MegatronModule], tokens: torch.Tensor, images: Sequence[Images] = ()
) -> tuple[torch.Tensor | None, dict[int, torch.Tensor]]:
    """Run Megatron-Core's own schedule over prompts of one length, one prompt a microbatch.

    Args:
        model: this rank's chunks.
        tokens: [N, S] int64, the same on every rank.
        images: of each prompt, for a model that takes them; empty: none has any.

    Returns:
        Logits [N, S, V] fp32 on ranks of the last pipeline stage, None elsewhere; and the output [N, S, H] of each
        layer that this rank holds, by global 0-based layer number.
    """
    config = get_model_config(model[0])
    count, length = tokens.shape
    # Interleaved stages want a multiple of pp microbatches; sequence parallelism, a multiple of tp positions; context
    # parallelism, of two chunks a rank.
    # Attention is causal: what is appended changes nothing before it.
    rows = -count % config.pipeline_model_parallel_size
    columns = -length % (2 * config.tensor_model_parallel_size * config.context_parallel_size)
    padded = torch.nn.functional.pad(tokens, (0, columns, 0, rows)).to(
        next(model[0].parameters()).device
    )
    device = padded.device
    inputs = [{name: value.to(device) for name, value in each.items()} for each in images] or [
        {}
    ] * count
    batches = list(zip(padded.split(1), inputs + [{}] * rows, strict=True))
    for chunk in model:
        chunk.eval()
    hidden: dict[int, list[torch.Tensor]] = {}
    with _hidden_states(model, hidden):
        outputs = get_forward_backward_func()(
            forward_step_func=functools.partial(_run_stage, vocab_size=config.vocab_size),
            data_iterator=[iter(batches) for _ in model] if len(model) > 1 else iter(batches),
            model=model if len(model) > 1 else model[0],
            num_microbatches=len(padded),
            seq_length=padded.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    layers = {
        layer: torch.cat(parts, dim=1).transpose(0, 1)[:count, :length].float().cpu()
        for layer, parts in hidden.items()
    }
    return (torch.cat(outputs)[:count, :length] if outputs else None), layers
