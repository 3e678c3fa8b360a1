"""What recipes of one stage share, in the host's own configuration classes.

Megatron-Bridge has the like in `megatron.bridge.recipes.common`; importing that imports every recipe it has, and with
them packages that text models do not need (diffusers). Defaults follow it where nothing is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from exaone_bridge.recipes.plan import Plan

__all__ = ["ENVIRONMENT", "container", "conversations", "questions_and_answers", "text"]

# Process defaults; what the shell has set wins. NVLink multicast needs buffers that most launchers do not grant.
ENVIRONMENT: dict[str, str | int | float | bool] = {
    "NCCL_NVLS_ENABLE": 0,
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_GRAPH_REGISTER": 0,  # with the line above
    "TORCH_NCCL_AVOID_RECORD_STREAMS": 1,
}


def container(
    model: Any, plan: Plan, dataset: Any, *, iterations: int, rate: float, warmup: int
) -> ConfigContainer:
    """A run of this many steps: AdamW with a cosine from `rate` to its tenth, bf16 with fp32 gradients, all overlaps.

    Args:
        model: the provider, its layout set.
        plan: for the batch.
        dataset: of the host's classes.
        iterations: steps.
        rate: the learning rate's peak.
        warmup: steps of linear rise to it.
    """
    folder = Path.cwd() / "nemo_experiments" / "default"  # the host's
    return ConfigContainer(
        model=model,
        dataset=dataset,
        train=TrainingConfig(
            train_iters=iterations,
            micro_batch_size=plan.micro_batch,
            global_batch_size=plan.global_batch,
            manual_gc=True,
            manual_gc_interval=100,
        ),
        validation=ValidationConfig(eval_interval=min(500, iterations), eval_iters=32),
        optimizer=OptimizerConfig(
            optimizer="adam",
            lr=rate,
            min_lr=rate / 10,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            clip_grad=1.0,
            bf16=True,
            use_distributed_optimizer=True,
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine",
            lr_warmup_iters=warmup,
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
        mixed_precision="bf16_mixed",  # parameters in bf16; gradients are summed in fp32
        logger=LoggerConfig(log_interval=10, tensorboard_dir=str(folder / "tb_logs")),
        tokenizer=TokenizerConfig(),
        checkpoint=CheckpointConfig(
            save=str(folder / "checkpoints"),
            load=str(folder / "checkpoints"),
            save_interval=500,
            ckpt_format="torch_dist",
            fully_parallel_save=True,
        ),
        rng=RNGConfig(seed=1234),
        env_vars=dict(ENVIRONMENT),
    )


def text(plan: Plan) -> GPTDatasetConfig:
    """Pretraining text: Megatron-Core's mock data until `blend` names files."""
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


def questions_and_answers(plan: Plan, root: str | Path | None, packed: bool) -> GPTSFTDatasetConfig:
    """`training.jsonl` and `validation.jsonl` with `input` and `output`, several to a sequence if `packed`.

    Without a folder it is SQuAD, the host's default, which the training run, not the recipe, would download.
    """
    specs = None
    if packed:
        multiple = (2 * plan.cp if plan.cp > 1 else 1) * (plan.layout.tp if plan.layout.sp else 1)
        specs = PackedSequenceSpecs(packed_sequence_size=plan.seq_length, pad_seq_to_mult=multiple)
    return GPTSFTDatasetConfig(
        seq_length=plan.seq_length,
        dataset_root=None if root is None else str(root),
        hf_dataset=HFDatasetSourceConfig(dataset_name="squad") if root is None else None,
        preprocessing=PromptCompletionSFTPreprocessingConfig(
            prompt_column="input", completion_column="output", separator="\n"
        ),
        do_test=False,
        enable_offline_packing=packed,
        offline_packing_specs=specs,
        dataset_kwargs={"pad_to_max_length": True} if packed else None,
        seed=5678,
        dataloader_type="batch",
        num_workers=2,
    )


def conversations(
    plan: Plan, root: str | Path | None, processor: str | Path | None, packed: bool
) -> DirectHFSFTDatasetConfig:
    """`training.jsonl` and `validation.jsonl` of conversations with images, a micro batch in one row if `packed`.

    A line has `messages`, turns of `role` and `content`, always a list of parts: text, image, video. A part names its
    file from the folder on (`path`), or takes the next of the line's `images`. Without a folder it is CORD v2, the
    host's default, which the training run, not the recipe, would download.

    Args:
        processor: the Hugging Face folder (or name) of the processor that makes words and pixels of them.
    """
    if root is None:
        source = HFDatasetSourceConfig(dataset_name="cord_v2")
    else:
        folder = Path(root).absolute()
        files = {
            "train": str(folder / "training.jsonl"),
            "validation": str(folder / "validation.jsonl"),
        }
        source = HFDatasetSourceConfig(
            path_or_dataset="json",
            load_kwargs={"data_files": files},
            schema_adapter=IN_FOLDER,
            adapter_kwargs={"root": str(folder)},
        )
    return DirectHFSFTDatasetConfig(
        seq_length=plan.seq_length,
        source=source,
        preprocessing=ChatSFTPreprocessingConfig(),
        hf_processor_path=None if processor is None else str(processor),
        do_test=False,
        enable_in_batch_packing=packed,
        dataloader_type="cyclic",
        num_workers=2,
    )
