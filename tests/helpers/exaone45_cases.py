"""What the tests of EXAONE 4.5 share: configurations, layouts, one training step of both sides with images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.models.exaone45.config import read_hf_config
from exaone_bridge.models.exaone45.prompts import image_prompts
from exaone_bridge.models.exaone45.tiny import TINY
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.training import cross_entropy

CONFIG = TINY["exaone45"]
LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(tp=2, pp=2),
    Layout(pp=2, vpp=2),
    Layout(tp=2, sp=True),
    Layout(tp=2, cp=2, sp=True),
]
Images = dict[str, torch.Tensor]


def changed(**fields: Any) -> dict[str, Any]:
    """Fields of config.json for the `tiny` fixture; `text_config__x=1` changes one of a nested object."""
    result: dict[str, Any] = {}
    for path, value in fields.items():
        outer, _, inner = path.partition("__")
        if inner:
            result.setdefault(outer, copy.deepcopy(CONFIG[outer]))[inner] = value
        else:
            result[outer] = value
    return result


def batches(
    count: int = 4, seed: int = 7, config: dict[str, Any] = CONFIG
) -> list[tuple[torch.Tensor, Images]]:
    """Prompts [1, S + 1] that no padding word is in, with one image, several, a video, none; S is even."""
    tokens, images = image_prompts(read_hf_config(config), count, seed)
    tokens = torch.where(
        tokens == 0, 1, tokens
    )  # Transformers gives the padding word's embedding no gradient
    words = torch.full((len(tokens), 2 if tokens.shape[1] % 2 else 1), 5)
    tokens = torch.cat((tokens, words), dim=1)
    return list(zip(tokens.split(1), images, strict=True))


def device() -> str:
    """Where both sides run. Asked on a rank: CUDA is not to be woken before ranks are forked."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def moved(data: list[tuple[torch.Tensor, Images]]) -> list[tuple[torch.Tensor, Images]]:
    """The same, there."""
    where = device()
    return [
        (tokens.to(where), {name: value.to(where) for name, value in images.items()})
        for tokens, images in data
    ]


def step_of_transformers(
    folder: Path, data: list[tuple[torch.Tensor, Images]]
) -> tuple[float, dict[str, Any]]:
    """Mean loss, and gradients by name."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.to(device())
    total = 0.0
    for tokens, images in moved(data):
        loss = cross_entropy(
            model.train()(tokens[:, :-1], use_cache=False, **images).logits, tokens[:, 1:]
        )
        (loss / len(data)).backward()
        total += loss.item() / len(data)
    return total, {
        name: value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None
    }


def _forward_step(batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
    tokens, images = next(batches)
    length = tokens.shape[1] - 1
    positions = torch.arange(length, device=tokens.device)[None]
    output = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:], **images)
    ranks = (
        model.config.context_parallel_size
    )  # by which Megatron-Core multiplies a loss that is a mean already
    return output, lambda loss: (loss.mean() / ranks, {"loss": loss.mean().detach()})


def gathered_over_tp(tensor: torch.Tensor) -> torch.Tensor:
    """Gather logits [..., V / tp] over TP: [..., V]."""
    from megatron.core import parallel_state

    from exaone_bridge.modules.collectives import all_gather_cat

    return all_gather_cat(tensor, parallel_state.get_tensor_model_parallel_group(), -1)


def over_words(loss: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks of context parallelism, each of which has it of its words alone."""
    from megatron.core import parallel_state

    torch.distributed.all_reduce(loss, group=parallel_state.get_context_parallel_group())
    return loss / parallel_state.get_context_parallel_world_size()


def step_of_megatron(
    folder: Path, layout: Layout, data: list[tuple[torch.Tensor, Images]], overrides: dict[str, Any]
) -> tuple[float | None, dict[str, Any], set[str]]:
    """On a rank: mean loss (last stage), gradients by Hugging Face name, and this rank's frozen names."""
    loss, gradients, frozen = forward_backward(folder, layout, data, overrides)
    return (
        loss,
        {name: value for name, value in gradients.items() if not name.startswith("mtp.")},
        frozen,
    )


def forward_backward(
    folder: Path,
    layout: Layout,
    data: list[tuple[torch.Tensor, Images]],
    overrides: dict[str, Any],
    look: Callable[[list[Any]], None] = lambda model: None,
    dtype: torch.dtype = torch.float32,
) -> tuple[float | None, dict[str, Any], set[str]]:
    """As `step_of_megatron`, with all that the export has, in this type; `look` is shown the model before it runs.

    Megatron-Core's own schedule, data-parallel wrapper with overlapped reduction, and `finalize_model_grads`.
    """
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    fields = (
        layout.provider_overrides() | {"pipeline_dtype": dtype, "autocast_dtype": dtype} | overrides
    )
    provider.apply_overrides_and_finalize(dtype, fields)
    model = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=layout.pp == 1
        ),
        use_cpu_initialization=device() == "cpu",
    )
    data = moved(data)
    get_model_config(model[0]).finalize_model_grads_func = finalize_model_grads
    if layout.pp == 1:
        get_model_config(model[0]).no_sync_func = model[0].no_sync
    look(model)
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    done = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(data) for _ in model] if len(model) > 1 else iter(data),
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(data),
        seq_length=data[0][0].shape[1] - 1,
        micro_batch_size=1,
        forward_only=False,
    )
    frozen = set()
    with torch.no_grad():
        for chunk in model:
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad:
                    parameter.data.copy_(parameter.main_grad)
                else:
                    assert parameter.grad is None and not hasattr(parameter, "main_grad")
                    frozen.add(name.removeprefix("module."))
                    parameter.data.zero_()
        weights = bridge.export_hf_weights(model, cpu=True, show_progress=False)
        gradients = {name: weight.clone() for name, weight in weights}
    return (
        over_words(torch.stack([item["loss"] for item in done]).mean()).item() if done else None,
        gradients,
        frozen,
    )
