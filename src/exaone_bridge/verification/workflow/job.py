"""What a verification runs on both sides: the prompts, and what each rank makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.writer import write_hf_folder
from exaone_bridge.checkpoint.reshard.plan import check_layout
from exaone_bridge.convert.convert import drain
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.runtime.progress import NO_PROGRESS, Progress
from exaone_bridge.schema.hf_config import language_config
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.activations.capture import Activations
from exaone_bridge.verification.activations.probe_points import ProbePoint, probe_points
from exaone_bridge.verification.checks.generation import Generated, generate
from exaone_bridge.verification.checks.gradients import (
    gradients_of_megatron,
    gradients_of_transformers,
)
from exaone_bridge.verification.checks.logits import prompts
from exaone_bridge.verification.workflow.transformers import Images, together

__all__ = [
    "DTYPES",
    "MegatronResult",
    "ReferenceResult",
    "VerifyOptions",
    "Workload",
    "batches_of",
    "make_workload",
    "prompt_length",
    "run_generation",
    "run_megatron",
    "run_transformers",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LONGEST = 512  # positions of a prompt that a laptop computes in a minute
_LARGE = 2e8  # parameters from which on a laptop computes 64
_WORDS = 24  # of the prompt that needs no tokenizer


def prompt_length(
    windows: tuple[int | None, ...], original: int | None = None, longest: int = _LONGEST
) -> int:
    """Long enough that the window's edge is met at many positions, and the length that RoPE was made for is passed,
    where that is affordable; else 64.

    Args:
        windows: keys that a query of each layer sees; None: all.
        original: positions before RoPE was scaled.
        longest: what is affordable.
    """
    window = max((window for window in windows if window is not None), default=0)
    wanted = [4 * window + 9 if window else 0, original + 33 if original else 0]
    return max((length for length in wanted if 0 < length <= longest), default=64)


def batches_of(
    source: HFCheckpoint, count: int, length: int | None, seed: int
) -> list[torch.Tensor]:
    """Prompts, a batch for each length: long ones, and short ones that never meet the edge of a window."""
    model_config = source.model_config
    if length is not None:
        return [prompts(model_config.vocab_size, count, length, seed)]
    # device_count, unlike is_available, leaves CUDA to the ranks that are forked.
    longest = _LONGEST if source.num_elements < _LARGE or torch.cuda.device_count() else 64
    long = prompt_length(
        model_config.windows,
        _original_positions(language_config(dict(source.config))),
        min(longest, model_config.max_positions),
    )
    short = min([7, *(window for window in model_config.windows if window is not None)])
    return [
        prompts(model_config.vocab_size, count, long, seed),
        prompts(model_config.vocab_size, 2, short, seed + 1),
    ]


def _original_positions(config: Mapping[str, Any]) -> int | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original = rope.get("original_max_position_embeddings") if isinstance(rope, Mapping) else None
    return original if isinstance(original, int) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What a verification is asked to look at, beside where.

    Attributes:
        backend: `auto`, `transformer_engine` or `torch`.
        dtype: of the arithmetic: `float32`, `bfloat16` or `float16`.
        count, length, seed: of the prompts; length None: past the window and RoPE's own length where affordable.
        generation: also greedy generation before and after.
        gradients: also those of one step, in fp32.
        mtp: build multi-token prediction, whose tensors then go through Megatron-Core and not beside it.
    """

    backend: str = "auto"
    dtype: str = "float32"
    count: int = 3
    length: int | None = None
    seed: int = 0
    generation: bool = False
    gradients: bool = False
    mtp: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be run, on both sides.

    Attributes:
        batches: prompts [N, S], a batch for each length.
        images: of each prompt of each batch, for a model that takes them; an empty batch of them: none has any.
        dtype: of the arithmetic of ours, and of a second run of Transformers where it is not fp32.
        generate: also greedy generation.
        gradient_tokens: [N, S + 1], or None.
        gradient_images: as `images`, of these prompts.
        overrides: further fields of the provider.
    """

    batches: Sequence[torch.Tensor]
    points: tuple[ProbePoint, ...]
    layout: Layout
    backend: str
    images: Sequence[Sequence[Images]] = ()
    dtype: str = "float32"
    generate: bool = False
    gradient_tokens: torch.Tensor | None = None
    gradient_images: Sequence[Images] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def runs(self) -> list[tuple[torch.Tensor, Sequence[Images]]]:
        """Each batch with its images."""
        return [
            (tokens, self.images[n] if n < len(self.images) else ())
            for n, tokens in enumerate(self.batches)
        ]

    def setup(self, seed: int) -> dict[str, Any]:
        """What the report says of it: prompts, and the images and videos of each batch of them."""
        found: dict[str, Any] = {
            "prompts": [list(tokens.shape) for tokens in self.batches],
            "seed": seed,
        }
        if any(self.images):
            pictures = [together(images) for _, images in self.runs()]
            for kind in ("image", "video"):
                found[f"{kind}s"] = [len(each.get(f"{kind}_grid_thw", ())) for each in pictures]
        return found | ({"built": sorted(self.overrides)} if self.overrides else {})

    @property
    def plain_prompt(self) -> list[int]:
        """The prompt that needs no tokenizer."""
        return self.batches[0][0, :_WORDS].tolist()


@dataclass(slots=True)
class ReferenceResult:
    """What Transformers made of a job."""

    runs: list[Activations]
    half: list[Activations] | None = None
    generated: dict[str, Generated] | None = None
    gradients: Any = None


def run_transformers(
    folder: Path, job: Workload, progress: Progress = NO_PROGRESS
) -> ReferenceResult:
    """On one rank: Transformers' fp32 run of every prompt, and what else the job asks for."""
    from exaone_bridge.verification.workflow.transformers import capture_transformers, load

    progress.stage("Transformers' logits")
    model = load(folder, torch.float32)
    found = ReferenceResult(
        [capture_transformers(model, job.points, *batch) for batch in job.runs()]
    )
    if job.generate:
        progress.stage("Transformers' greedy generation")
        found.generated = generate(model, folder, job.plain_prompt)
    if job.gradient_tokens is not None:
        progress.stage("Transformers' gradients")
        found.gradients = gradients_of_transformers(model, job.gradient_tokens, job.gradient_images)
    if job.dtype != "float32":
        progress.stage(f"Transformers' logits in {job.dtype}")
        model = load(folder, DTYPES[job.dtype])
        found.half = [
            capture_transformers(model, job.points, *batch, perturbed=False) for batch in job.runs()
        ]
    return found


def run_generation(folder: Path, job: Workload) -> dict[str, Generated]:
    """On one rank: greedy generation from another folder."""
    from exaone_bridge.verification.workflow.transformers import load

    return generate(load(folder, torch.float32), folder, job.plain_prompt)


@dataclass(slots=True)
class MegatronResult:
    """What one rank of Megatron-Core made of a job."""

    config: dict[str, Any]
    runs: list[Activations]
    gradients: Any = None


def run_megatron(
    source: Path,
    megatron: Path | None,
    target: Path | None,
    files: Mapping[str, str],
    job: Workload,
    progress: Progress = NO_PROGRESS,
) -> MegatronResult:
    """On a rank: load, export to `target`, run every prompt.

    Args:
        source: a Hugging Face folder.
        megatron: a Megatron checkpoint of the same model: weights come from it.
        target: an empty folder; None: no export.
        files: tensor -> file in it.
    """
    from megatron.bridge import AutoBridge

    from exaone_bridge.bridge.exact_bridge import config_mapping
    from exaone_bridge.runtime.model import build, load_megatron
    from exaone_bridge.verification.workflow.megatron import capture_megatron

    bridge = AutoBridge.from_hf_pretrained(source)
    source_config = config_mapping(bridge.hf_pretrained.config)
    dtype = DTYPES[job.dtype]
    if megatron is None:
        progress.stage("HF -> Megatron-Core")
        model = build(bridge, job.layout, backend=job.backend, **job.overrides)
    else:
        progress.stage("loading the Megatron checkpoint")
        model = load_megatron(bridge, megatron, job.layout, backend=job.backend)
    if target is not None:
        progress.stage("Megatron-Core -> HF")
        weights = bridge.export_hf_weights(model, cpu=True, show_progress=False)
        config = bridge._model_bridge.megatron_to_hf_config(model[0].config)
        drain(weights, lambda stream: write_hf_folder(target, stream, files, config, source))
    if next(model[0].parameters()).dtype != dtype:
        del (
            model
        )  # its bits are known to be the source's by now, or the check of tensors says otherwise
        model = build(bridge, job.layout, dtype=dtype, backend=job.backend, **job.overrides)
    progress.stage("Megatron-Core's logits")
    found = MegatronResult(
        source_config, [capture_megatron(model, job.points, *batch) for batch in job.runs()]
    )
    if job.gradient_tokens is not None:
        progress.stage("Megatron-Core's gradients")
        tokens, images = job.gradient_tokens, job.gradient_images
        found.gradients = gradients_of_megatron(source, job.layout, job.backend, tokens, images)
    return found


def make_workload(source: HFCheckpoint, layout: Layout, asked: VerifyOptions) -> Workload:
    """A job whose prompts fit the model; all that can be refused is refused before half a minute of Transformers.

    Raises:
        UnsupportedConfig: a type of numbers or a backend that there is none of, or multi-token prediction that the
            model has not.
        UnsupportedLayout: the model cannot be cut so.
    """
    check_layout(source.model_config, layout)
    if asked.dtype not in DTYPES:
        raise UnsupportedConfig("--dtype", got=asked.dtype, known=tuple(DTYPES), where="verify")
    mtp = source.model_config.mtp
    if asked.mtp and (mtp is None or source.family.with_mtp is None):
        raise UnsupportedConfig(
            "--mtp",
            got=True,
            wanted="off for a model without multi-token prediction that can be built",
            where="verify",
        )
    tokens, of_tokens = (
        _gradient_prompts(source, layout, asked.seed + 2) if asked.gradients else (None, [])
    )
    batches = batches_of(source, asked.count, asked.length, asked.seed)
    images: list[Sequence[Images]] = []
    if source.family.images is not None:
        tokens_of_images, last = _with_images(
            source, asked.count, asked.seed + 3, batches[0].shape[1]
        )
        images = [*((),) * len(batches), last]
        batches.append(tokens_of_images)
    _check_host(asked.backend)
    return Workload(
        batches=batches,
        images=images,
        points=probe_points(source.mappings),
        layout=layout,
        backend=asked.backend,
        dtype=asked.dtype,
        generate=asked.generation,
        gradient_tokens=tokens,
        gradient_images=of_tokens,
        overrides={"mtp_num_layers": mtp.depth} if asked.mtp and mtp is not None else {},
    )


def _check_host(backend: str) -> None:
    """That our bridges are the host's, and that there is such a backend; Megatron is imported here, and not before."""
    from exaone_bridge.bridge.registration import supported
    from exaone_bridge.modules.backend import resolve_backend
    from exaone_bridge.runtime import model  # noqa: F401  imported once, here, not on every forked rank

    supported()
    if backend != "auto":  # which asks CUDA, and that is for the ranks
        resolve_backend(backend)


def _with_images(
    source: HFCheckpoint, count: int, seed: int, length: int
) -> tuple[torch.Tensor, list[Images]]:
    """Prompts of at least this length, and the images of each, as the family makes them."""
    assert source.family.images is not None
    make = source.family.images.prompts
    found: tuple[torch.Tensor, list[Images]] = make(source.model_config, count, seed, length)
    return found


def _gradient_prompts(
    source: HFCheckpoint, layout: Layout, seed: int
) -> tuple[torch.Tensor, list[Images]]:
    """[N, S + 1], N a multiple of pp and S of 2 x tp x cp; of a model that takes images, with one, several, a video,
    and none."""
    model_config, even = source.model_config, 2 * layout.tp * layout.cp
    positions = min(24 * even, model_config.max_positions // even * even)
    images: list[Images] = []
    if source.family.images is None:
        tokens = prompts(model_config.vocab_size, max(2, layout.pp), positions + 1, seed)
    else:
        count = -(-4 // layout.pp) * layout.pp
        tokens, images = _with_images(source, count, seed, positions + 1)
        if over := (tokens.shape[1] - 1) % even:
            tokens, images = _with_images(source, count, seed, tokens.shape[1] + even - over)
    if isinstance(pad := language_config(dict(source.config)).get("pad_token_id"), int):
        tokens[tokens == pad] = (
            1 if pad == 0 else 0
        )  # Transformers gives the padding word's embedding no gradient
    return tokens, images
