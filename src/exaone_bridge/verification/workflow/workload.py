"""The workload of a verification: the prompts and settings that both models run with.

Axes: N prompts, S tokens of a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.reshard.plan import check_layout
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.dtypes import MODEL_DTYPES
from exaone_bridge.schema.hf_config import language_config
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.activations.probe_points import ProbePoint, probe_points
from exaone_bridge.verification.workflow.options import VerifyOptions

__all__ = [
    "Images",
    "PromptBatch",
    "Workload",
    "batch_images",
    "make_workload",
    "prompt_length",
    "random_prompts",
]

Images = dict[str, torch.Tensor]  # the arguments of `forward` with a prompt's pixels and grids

_MAX_LENGTH = 512  # tokens of a prompt that a laptop computes within a minute
_LARGE_MODEL = 2e8  # parameters from which on it computes 64 tokens
_PLAIN_PROMPT = 24  # tokens of the prompt for generation that needs no tokenizer
_MAX_FULL = 2**31  # bytes of fp32 weights up to which the full model is in memory


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of one length.

    Attributes:
        tokens: int64 [N, S].
        images: one entry for each prompt; empty if no prompt has images.
    """

    tokens: torch.Tensor
    images: Sequence[Images] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What both models run.

    Attributes:
        batches: the prompts, one batch for each length.
        points: the activations that are compared.
        layout: of the Megatron-Core model.
        backend: of the Megatron-Core model.
        dtype: of the arithmetic; if it is not fp32, Transformers runs both.
        generate: whether greedy generation is compared.
        gradient_batch: the prompts [N, S + 1] of the training step; None: there is none.
        layerwise: whether both models hold the weights of one layer at a time.
        seed: of the prompts.
        overrides: further fields of the provider.
    """

    batches: tuple[PromptBatch, ...]
    points: tuple[ProbePoint, ...]
    layout: Layout
    backend: str
    dtype: str = "float32"
    generate: bool = False
    gradient_batch: PromptBatch | None = None
    layerwise: bool = False
    seed: int = 0
    overrides: JSONMapping = field(default_factory=dict)

    @property
    def plain_prompt(self) -> list[int]:
        """The token ids of the prompt for generation that needs no tokenizer."""
        return self.batches[0].tokens[0, :_PLAIN_PROMPT].tolist()

    @property
    def image_batch(self) -> PromptBatch:
        """The batch with images; the first batch for a model that takes none."""
        return next((batch for batch in self.batches if batch.images), self.batches[0])

    def setup(self) -> JSONObject:
        """Return what the report says about the workload."""
        setup: JSONObject = {
            "prompts": [list(batch.tokens.shape) for batch in self.batches],
            "seed": self.seed,
            "layer_by_layer": self.layerwise,
        }
        if any(batch.images for batch in self.batches):
            merged = [batch_images(batch.images) for batch in self.batches]
            for kind in ("image", "video"):
                setup[f"{kind}s"] = [len(each.get(f"{kind}_grid_thw", ())) for each in merged]
        return setup | dict(self.overrides)


def batch_images(images: Sequence[Images], copies: int = 1) -> Images:
    """Concatenate the images of all prompts, as a batch has them.

    Args:
        copies: how many times the full batch is repeated.

    Returns:
        Argument name -> [copies * total, ...].
    """
    names = sorted({name for each in images for name in each})
    return {
        name: torch.cat([each[name] for each in images if name in each] * copies) for name in names
    }


def random_prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Draw tokens from the full vocabulary.

    Returns:
        int64 [count, length].
    """
    return torch.randint(vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))


def prompt_length(
    windows: Sequence[int | None], original: int | None = None, longest: int = _MAX_LENGTH
) -> int:
    """Choose a prompt length past the sliding window and past RoPE's original length.

    Args:
        windows: the sliding window of each layer; None: full attention.
        original: RoPE's original length, if its positions are scaled.
        longest: the longest prompt that is affordable.

    Returns:
        Tokens; 64 if such a length is not affordable or not needed.
    """
    window = max((window for window in windows if window is not None), default=0)
    wanted = [4 * window + 9 if window else 0, original + 33 if original else 0]
    return max((length for length in wanted if 0 < length <= longest), default=64)


def make_workload(checkpoint: HFCheckpoint, layout: Layout, options: VerifyOptions) -> Workload:
    """Make prompts that fit the model, and reject what cannot run before anything expensive starts.

    Generation and gradients need the full model in memory: layer by layer there is none, and only
    one prompt of each length.

    Raises:
        UnsupportedConfig: an unknown dtype or backend, or multi-token prediction that the model
            does not have.
        UnsupportedLayout: the model cannot be sharded by the layout.
    """
    model_config = checkpoint.model_config
    check_layout(model_config, layout)
    if options.dtype not in MODEL_DTYPES:
        raise UnsupportedConfig("--dtype", got=options.dtype, known=MODEL_DTYPES, where="verify")
    layerwise = options.stream
    if layerwise is None:
        layerwise = checkpoint.num_elements * 4 > _MAX_FULL
    if layerwise:
        options = dataclasses.replace(options, count=1, generation=False, gradients=False)
    batches = _token_batches(checkpoint, options)
    if checkpoint.family.images is not None:
        length = batches[0].tokens.shape[1]
        batches.append(_image_prompts(checkpoint, options.count, options.seed + 3, length))
    _check_backend(options.backend)
    return Workload(
        batches=tuple(batches),
        points=probe_points(checkpoint.mappings),
        layout=layout,
        backend=options.backend,
        dtype=options.dtype,
        generate=options.generation and model_config.head is None,
        gradient_batch=_gradient_batch(checkpoint, layout, options) if options.gradients else None,
        layerwise=layerwise,
        seed=options.seed,
        overrides={"mtp_num_layers": _mtp_depth(checkpoint)} if options.mtp else {},
    )


def _mtp_depth(checkpoint: HFCheckpoint) -> int:
    mtp = checkpoint.model.config.mtp
    if mtp is None or checkpoint.family.with_mtp is None:
        raise UnsupportedConfig(
            "--mtp",
            got=True,
            wanted="off for a model without multi-token prediction that can be built",
            where="verify",
        )
    return mtp.depth


def _check_backend(backend: str) -> None:
    """Import Megatron, which forked ranks then need not import, and reject an unknown backend."""
    import exaone_bridge.runtime.model  # noqa: F401  most of what a rank needs
    from exaone_bridge.bridge.registration import supported
    from exaone_bridge.modules.backend import resolve_backend

    supported()
    if backend != "auto":  # to resolve `auto` would initialise CUDA, which the ranks must do
        resolve_backend(backend)


def _token_batches(checkpoint: HFCheckpoint, options: VerifyOptions) -> list[PromptBatch]:
    """Make long prompts, and short ones within every sliding window."""
    model_config = checkpoint.model_config
    vocab_size, seed = model_config.vocab_size, options.seed
    if options.length is not None:
        return [PromptBatch(random_prompts(vocab_size, options.count, options.length, seed))]
    # Unlike is_available, device_count does not initialise CUDA, which the ranks must do.
    affordable = checkpoint.num_elements < _LARGE_MODEL or torch.cuda.device_count()
    longest = min(_MAX_LENGTH if affordable else 64, model_config.max_positions)
    original = _original_length(language_config(dict(checkpoint.config)))
    long = prompt_length(model_config.windows, original, longest)
    short = min([7, *(window for window in model_config.windows if window is not None)])
    return [
        PromptBatch(random_prompts(vocab_size, options.count, long, seed)),
        PromptBatch(random_prompts(vocab_size, 2, short, seed + 1)),
    ]


def _original_length(config: JSONMapping) -> int | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original = rope.get("original_max_position_embeddings") if isinstance(rope, Mapping) else None
    return original if isinstance(original, int) else None


def _image_prompts(checkpoint: HFCheckpoint, count: int, seed: int, length: int) -> PromptBatch:
    """Make prompts of at least this length with the family's kinds of images."""
    assert checkpoint.family.images is not None
    tokens, images = checkpoint.family.images.prompts(checkpoint.model_config, count, seed, length)
    return PromptBatch(tokens, images)


def _gradient_batch(
    checkpoint: HFCheckpoint, layout: Layout, options: VerifyOptions
) -> PromptBatch:
    """Make prompts [N, S + 1]: N a multiple of pp, and S one of 2 x tp x cp.

    A model that takes images gets a prompt with one, with several, with a video, and with none.
    """
    model_config, seed = checkpoint.model_config, options.seed + 2
    multiple = 2 * layout.tp * layout.cp
    length = min(24 * multiple, model_config.max_positions // multiple * multiple)
    if checkpoint.family.images is None:
        count = max(2, layout.pp)
        batch = PromptBatch(random_prompts(model_config.vocab_size, count, length + 1, seed))
    else:
        count = -(-4 // layout.pp) * layout.pp
        batch = _image_prompts(checkpoint, count, seed, length + 1)
        if over := (batch.tokens.shape[1] - 1) % multiple:  # images can make prompts longer
            longer = batch.tokens.shape[1] + multiple - over
            batch = _image_prompts(checkpoint, count, seed, longer)
    padding = language_config(dict(checkpoint.config)).get("pad_token_id")
    if isinstance(padding, int):  # Transformers gives its embedding no gradient
        batch.tokens[batch.tokens == padding] = 1 if padding == 0 else 0
    return batch
