"""The parts that recipes share, in Megatron-Bridge's own configuration classes.

Megatron-Bridge 0.6.2 has a similar module, `megatron.bridge.recipes.common`, and the defaults here
follow it. It is not imported: it would import every recipe of Megatron-Bridge, and with them
packages that text models do not need (diffusers).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.data.builders import (
    ChatSFTPreprocessingConfig,
    DirectHFSFTDatasetConfig,
    GPTSFTDatasetConfig,
    HFDatasetSourceConfig,
    PromptCompletionSFTPreprocessingConfig,
)
from megatron.bridge.data.packing import PackedSequenceSpecs
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    GPTDatasetConfig,
    LoggerConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)

from exaone_bridge.patches.vlm_data import IN_FOLDER
from exaone_bridge.recipes.rows import CONVERSATIONS, check_rows, has_validation
from exaone_bridge.recipes.training_plan import TrainingPlan

__all__ = [
    "ENV_VARS",
    "container",
    "conversations",
    "image_conversations",
    "mock_text",
    "prompt_completions",
]

if TYPE_CHECKING:
    from exaone_bridge.modules.provider import ExactGPTModelProvider

# Defaults of the environment; values that the shell has set win. NVLink multicast needs buffers
# that most launchers do not grant.
ENV_VARS: dict[str, str | int | float | bool] = {
    "NCCL_NVLS_ENABLE": 0,
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_GRAPH_REGISTER": 0,  # needed with expandable segments
    "TORCH_NCCL_AVOID_RECORD_STREAMS": 1,
}


def container(
    model: ExactGPTModelProvider,
    plan: TrainingPlan,
    dataset: GPTDatasetConfig | GPTSFTDatasetConfig | DirectHFSFTDatasetConfig,
    *,
    train_iters: int,
    lr: float,
    lr_warmup_iters: int,
) -> ConfigContainer:
    """Build the config of a training run.

    The optimizer is AdamW with a cosine schedule from `lr` down to a tenth of it; parameters are
    bf16 and gradients fp32; communication overlaps with computation.

    Args:
        model: the provider, with its layout set.
        plan: gives the batch sizes.
        dataset: the dataset's config.
        train_iters: optimizer steps.
        lr: the peak learning rate.
        lr_warmup_iters: steps of linear warm-up to it.
    """
    directory = Path.cwd() / "nemo_experiments" / "default"  # Megatron-Bridge's default
    eval_iters = 32 if getattr(dataset, "do_validation", True) else 0
    return ConfigContainer(
        model=model,
        dataset=dataset,
        train=TrainingConfig(
            train_iters=train_iters,
            micro_batch_size=plan.micro_batch_size,
            global_batch_size=plan.global_batch_size,
            manual_gc=True,
            manual_gc_interval=100,
        ),
        validation=ValidationConfig(eval_interval=min(500, train_iters), eval_iters=eval_iters),
        optimizer=OptimizerConfig(
            optimizer="adam",
            lr=lr,
            min_lr=lr / 10,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            clip_grad=1.0,
            bf16=True,
            use_distributed_optimizer=True,
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine",
            lr_warmup_iters=lr_warmup_iters,
            start_weight_decay=0.1,
            end_weight_decay=0.1,
            weight_decay_incr_style="constant",
            override_opt_param_scheduler=True,
        ),
        ddp=DistributedDataParallelConfig(
            check_for_nan_in_grad=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            average_in_collective=True,
            use_distributed_optimizer=True,
        ),
        mixed_precision="bf16_mixed",  # bf16 parameters; fp32 gradient accumulation
        logger=LoggerConfig(log_interval=10, tensorboard_dir=str(directory / "tb_logs")),
        tokenizer=TokenizerConfig(),
        checkpoint=CheckpointConfig(
            save=str(directory / "checkpoints"),
            load=str(directory / "checkpoints"),
            save_interval=500,
            ckpt_format="torch_dist",
            fully_parallel_save=True,
        ),
        rng=RNGConfig(seed=1234),
        env_vars=dict(ENV_VARS),
    )


def mock_text(plan: TrainingPlan) -> GPTDatasetConfig:
    """Build the pretraining dataset's config: Megatron-Core's mock data until `blend` is set."""
    return GPTDatasetConfig(
        seq_length=plan.seq_length,
        random_seed=1234,
        reset_attention_mask=False,
        reset_position_ids=False,
        eod_mask_loss=False,
        split="9999,8,2",
        num_dataset_builder_threads=1,
        dataloader_type="single",
        data_sharding=True,
        skip_getting_attention_mask_from_dataset=True,
    )


def prompt_completions(
    plan: TrainingPlan, dataset_root: str | Path | None, packed: bool
) -> GPTSFTDatasetConfig:
    """Build the config of a dataset of prompts and completions.

    Args:
        plan: gives the sequence length and the multiple to which packed samples are padded.
        dataset_root: a directory with training.jsonl, and validation.jsonl if there is to be a
            validation, whose lines have `input` and `output`. None: SQuAD, Megatron-Bridge's
            default, which the training run (not the recipe) downloads.
        packed: pack several samples into one sequence.

    Raises:
        UnsupportedConfig: there is no training.jsonl.
        ConversationError: a line is malformed.
    """
    if dataset_root is not None:
        check_rows(dataset_root)  # chat recipes come here too
    preprocessing = PromptCompletionSFTPreprocessingConfig(
        prompt_column="input", completion_column="output", separator="\n"
    )
    config = _text_rows(plan, dataset_root, packed, preprocessing)
    if dataset_root is None:
        config.hf_dataset = HFDatasetSourceConfig(dataset_name="squad")
    return config


def conversations(
    plan: TrainingPlan,
    dataset_root: str | Path | None,
    hf_path: str | Path | None,
    packed: bool,
    last_turn: bool,
) -> GPTSFTDatasetConfig:
    """Build the config of a dataset of conversations, rendered by the model's chat template.

    Args:
        plan: gives the sequence length and the multiple to which packed samples are padded.
        dataset_root: a directory with training.jsonl, and validation.jsonl if there is to be a
            validation, whose lines have `messages`, and may have `tools` and
            `chat_template_kwargs`. None: Tulu 3, which the training run (not the recipe) downloads.
        hf_path: the Hugging Face directory of the tokenizer.
        packed: pack several conversations into one sequence.
        last_turn: the loss covers the assistant's last turn only.

    Raises:
        UnsupportedConfig: there is no training.jsonl.
        ConversationError: a line is malformed.
    """
    if dataset_root is not None:
        check_rows(dataset_root, CONVERSATIONS)
    preprocessing = ChatSFTPreprocessingConfig(loss_mode="last_turn" if last_turn else "assistant")
    config = _text_rows(plan, dataset_root, packed, preprocessing)
    if dataset_root is None:
        config.hf_dataset = HFDatasetSourceConfig(dataset_name="tulu3")
        config.hf_validation_proportion = 0.01
    else:
        # Megatron-Bridge indexes and packs rows once, and uses the result after they have changed;
        # the name of what it packs depends on this directory.
        index = Path(dataset_root) / "index" / _state_of_rows(Path(dataset_root), hf_path)
        config.dataset_kwargs = {**(config.dataset_kwargs or {}), "index_mapping_dir": str(index)}
    return config


def _text_rows(
    plan: TrainingPlan,
    dataset_root: str | Path | None,
    packed: bool,
    preprocessing: ChatSFTPreprocessingConfig | PromptCompletionSFTPreprocessingConfig,
) -> GPTSFTDatasetConfig:
    specs = None
    if packed:
        multiple = (2 * plan.cp if plan.cp > 1 else 1) * (plan.layout.tp if plan.layout.sp else 1)
        specs = PackedSequenceSpecs(packed_sequence_size=plan.seq_length, pad_seq_to_mult=multiple)
    pads = packed or plan.pad_samples
    return GPTSFTDatasetConfig(
        seq_length=plan.seq_length,
        dataset_root=None if dataset_root is None else str(dataset_root),
        preprocessing=preprocessing,
        do_validation=dataset_root is None or has_validation(dataset_root),
        do_test=False,
        enable_offline_packing=packed,
        offline_packing_specs=specs,
        dataset_kwargs={"pad_to_max_length": True} if pads else None,
        seed=5678,
        dataloader_type="batch",
        num_workers=2,
    )


def _state_of_rows(dataset_root: Path, hf_path: str | Path | None) -> str:
    """Return 12 hexadecimal digits that change with rows, tokenizer or chat template."""
    digest = hashlib.sha256()
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for path in (Path(hf_path or "") / name for name in names):
        digest.update(path.read_bytes() if hf_path and path.is_file() else b"")
    for path in (dataset_root / f"{split}.jsonl" for split in ("training", "validation")):
        if path.is_file():
            digest.update(f"{path.stat().st_size} {path.stat().st_mtime_ns} ".encode())
    return digest.hexdigest()[:12]


def image_conversations(
    plan: TrainingPlan,
    dataset_root: str | Path | None,
    processor: str | Path | None,
    packed: bool,
) -> DirectHFSFTDatasetConfig:
    """Build the config of a dataset of conversations with images and videos.

    Args:
        plan: gives the sequence length.
        dataset_root: a directory with training.jsonl, and validation.jsonl if there is to be a
            validation. A line has `messages`, each with `role` and `content`, a list of parts of
            type text, image or video. A part names its file relative to the directory (`path`), or
            takes the next one of the line's `images`. None: CORD v2, Megatron-Bridge's default,
            which the training run (not the recipe) downloads.
        processor: the Hugging Face directory (or name) of the tokenizer and image processor.
        packed: pack the samples of a microbatch into one sequence.

    Raises:
        UnsupportedConfig: there is no training.jsonl.
        ConversationError: a line is malformed.
    """
    if dataset_root is None:
        source = HFDatasetSourceConfig(dataset_name="cord_v2")
    else:
        check_rows(dataset_root, CONVERSATIONS)
        directory = Path(dataset_root).absolute()
        files = {"train": str(directory / "training.jsonl")}
        if has_validation(directory):
            files["validation"] = str(directory / "validation.jsonl")
        source = HFDatasetSourceConfig(
            path_or_dataset="json",
            load_kwargs={"data_files": files},
            schema_adapter=IN_FOLDER,
            adapter_kwargs={"root": str(directory)},
        )
    return DirectHFSFTDatasetConfig(
        seq_length=plan.seq_length,
        source=source,
        preprocessing=ChatSFTPreprocessingConfig(),
        hf_processor_path=None if processor is None else str(processor),
        do_validation=dataset_root is None or has_validation(dataset_root),
        do_test=False,
        enable_in_batch_packing=packed,
        pad_to_max_length=plan.pad_samples,
        dataloader_type="cyclic",
        num_workers=2,
    )
