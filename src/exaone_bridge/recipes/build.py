"""Build Megatron-Bridge's ConfigContainer from a training plan and a Hugging Face config.

The functions here are what every recipe calls. Arguments that the recipes share:

- `gpu_memory_gb`: memory of one GPU, 80 or 141, for which the recipe has a training plan.
- `hf_path`: a Hugging Face directory on disk, which gives the config, the tokenizer and the
  initial weights. None: the published config, random weights, and no tokenizer; fine-tuning cannot
  run before `config.tokenizer` and `config.checkpoint.pretrained_checkpoint` are set.
- `dataset_root` (SFT and PEFT): a directory with training.jsonl and validation.jsonl.
- `packed` (SFT and PEFT): pack several samples into one sequence.
- `last_turn` (chat SFT and chat PEFT): the loss covers the assistant's last turn only.
- `peft_scheme` (PEFT): "lora", "dora", or an object of Megatron-Bridge's PEFT class.
- `overrides`: other values for fields of the plan, by keyword: see `PlanOverrides`.

All of them raise UnsupportedConfig, UnsupportedLayout or CheckpointError before anything is built.

The model comes from the Hugging Face config through AutoBridge and our provider, so no architecture
field is repeated here. Importing this module imports neither torch nor Megatron-Bridge.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exaone_bridge.bridge.registration import supported
from exaone_bridge.errors import CheckpointError, UnsupportedConfig, UnsupportedLayout
from exaone_bridge.recipes.apply_plan import apply_to_config, apply_to_provider
from exaone_bridge.recipes.checked_plan import CheckedPlan, check_plan
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.recipes.training_plan import PlanOverrides, TrainingPlan
from exaone_bridge.recipes.training_plans import ADAPTER_RANK, training_plan

if TYPE_CHECKING:
    from megatron.bridge.peft.base import PEFT
    from megatron.bridge.training.config import ConfigContainer

    from exaone_bridge.modules.provider import ExactGPTModelProvider

__all__ = [
    "chat_peft_config",
    "chat_sft_config",
    "config_file",
    "peft_config",
    "pretrain_config",
    "sft_config",
]

# The processor that a run downloads where the recipe is given no directory.
_PROCESSORS = {"exaone45_vl_33b": "LGAI-EXAONE/EXAONE-4.5-33B"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TARGET_MODULES = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
_PEFT_SCHEMES = ("lora", "dora")


def pretrain_config(
    model: str,
    stage: str,
    gpu_memory_gb: int,
    hf_path: str | Path | None,
    overrides: PlanOverrides,
) -> ConfigContainer:
    """Build a pretraining config; its data are Megatron-Core's mock data until `dataset` is set.

    Args:
        model: a key of `published.CONFIGS`.
        stage: "pretrain", "64k_pretrain" or "128k_pretrain".
        gpu_memory_gb, hf_path, overrides: see the module's docstring.

    Raises:
        UnsupportedConfig: there is no plan for `gpu_memory_gb`, or an override has an unknown name.
        UnsupportedLayout: the plan does not fit the model (`TrainingPlan.check`), or the GPU.
        CheckpointError: `hf_path` has no config.json.
    """
    from exaone_bridge.recipes import common

    provider = _provider(model, hf_path)
    checked = _checked_plan(model, stage, gpu_memory_gb, provider, overrides)
    plan = checked.plan
    apply_to_provider(provider, plan)
    if provider.num_moe_experts:
        provider.set_published_balancing()
    dataset = common.mock_text(plan)
    config = common.container(
        provider, plan, dataset, train_iters=300_000, lr=3e-4, lr_warmup_iters=500
    )
    apply_to_config(config, plan, checked.graphs)
    _set_tokenizer_and_weights(config, hf_path)
    return config


def sft_config(
    model: str,
    gpu_memory_gb: int,
    hf_path: str | Path | None,
    dataset_root: str | Path | None,
    packed: bool,
    overrides: PlanOverrides,
) -> ConfigContainer:
    """Build a config for supervised fine-tuning of all parameters; see `pretrain_config`."""
    provider = _provider(model, hf_path)
    checked = _checked_plan(model, "sft", gpu_memory_gb, provider, overrides, packed)
    dataset = _samples(model, checked.plan, hf_path, dataset_root, packed)
    return _fine_tuning(model, provider, checked, hf_path, dataset, lr=5e-6)


def chat_sft_config(
    model: str,
    gpu_memory_gb: int,
    hf_path: str | Path | None,
    dataset_root: str | Path | None,
    packed: bool,
    last_turn: bool,
    overrides: PlanOverrides,
) -> ConfigContainer:
    """Build a config for supervised fine-tuning on conversations, with the plan of `sft_config`.

    Raises:
        CheckpointError: `hf_path` has a tokenizer without a chat template, or what
            `pretrain_config` raises.
        UnsupportedConfig, UnsupportedLayout: see `pretrain_config`.
    """
    from exaone_bridge.recipes import common

    _check_chat_template(hf_path)
    config = sft_config(model, gpu_memory_gb, hf_path, dataset_root, packed, overrides)
    plan = training_plan(model, "sft", gpu_memory_gb).with_overrides(**overrides)
    config.dataset = common.conversations(plan, dataset_root, hf_path, packed, last_turn)
    return config


def peft_config(
    model: str,
    peft_scheme: str | PEFT,
    gpu_memory_gb: int,
    hf_path: str | Path | None,
    dataset_root: str | Path | None,
    packed: bool,
    overrides: PlanOverrides,
) -> ConfigContainer:
    """Build a config for LoRA or DoRA, on all linears but those of routed experts.

    Raises:
        UnsupportedConfig: an unknown name of a scheme, or what `pretrain_config` raises.
        UnsupportedLayout, CheckpointError: see `pretrain_config`.
    """
    from megatron.bridge.peft.base import PEFT
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA

    if not isinstance(peft_scheme, PEFT) and peft_scheme not in _PEFT_SCHEMES:
        where = f"recipe {model}_peft_config"
        raise UnsupportedConfig("peft_scheme", got=peft_scheme, known=_PEFT_SCHEMES, where=where)
    provider = _provider(model, hf_path)
    checked = _checked_plan(model, "peft", gpu_memory_gb, provider, overrides, packed)
    dataset = _samples(model, checked.plan, hf_path, dataset_root, packed)
    config = _fine_tuning(model, provider, checked, hf_path, dataset, lr=1e-4)
    if isinstance(peft_scheme, PEFT):
        config.peft = peft_scheme
    else:
        targets = _TARGET_MODULES[:2] if provider.num_moe_experts else _TARGET_MODULES
        adapter = LoRA if peft_scheme == "lora" else DoRA
        config.peft = adapter(dim=ADAPTER_RANK, alpha=ADAPTER_RANK, target_modules=targets)
    return config


def chat_peft_config(
    model: str,
    peft_scheme: str | PEFT,
    gpu_memory_gb: int,
    hf_path: str | Path | None,
    dataset_root: str | Path | None,
    packed: bool,
    last_turn: bool,
    overrides: PlanOverrides,
) -> ConfigContainer:
    """Build a config for LoRA or DoRA on conversations, with the plan of `peft_config`.

    Raises:
        UnsupportedConfig, UnsupportedLayout, CheckpointError: see `peft_config` and
            `chat_sft_config`.
    """
    from exaone_bridge.recipes import common

    _check_chat_template(hf_path)
    config = peft_config(
        model, peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )
    plan = training_plan(model, "peft", gpu_memory_gb).with_overrides(**overrides)
    config.dataset = common.conversations(plan, dataset_root, hf_path, packed, last_turn)
    return config


def _check_chat_template(hf_path: str | Path | None) -> None:
    """Check that a directory with a tokenizer has a chat template."""
    if hf_path is None or not any((Path(hf_path) / name).is_file() for name in _TOKENIZER_FILES):
        return
    config = Path(hf_path) / "tokenizer_config.json"
    in_config = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    if not in_config and not (Path(hf_path) / "chat_template.jinja").is_file():
        raise CheckpointError(
            hf_path,
            "the tokenizer has no chat template",
            remedy="add chat_template.jinja, or use the recipe without `chat_` for prompts and "
            "completions",
        )


def _samples(
    model: str,
    plan: TrainingPlan,
    hf_path: str | Path | None,
    dataset_root: str | Path | None,
    packed: bool,
) -> Any:
    """Build the config of the dataset that suits the model: text, or text and images."""
    from exaone_bridge.recipes import common

    if "_vl_" not in model:
        return common.prompt_completions(plan, dataset_root, packed)
    if packed and plan.cp > 1:
        raise UnsupportedLayout(
            "cp",
            got=plan.cp,
            wanted="1 where conversations with images are packed",
            remedy="pass packed=False: context parallelism does not shard packed sequences of "
            "this model",
        )
    processor = hf_path or _PROCESSORS.get(model)
    return common.image_conversations(plan, dataset_root, processor, packed)


def _fine_tuning(
    model: str,
    provider: ExactGPTModelProvider,
    checked: CheckedPlan,
    hf_path: str | Path | None,
    dataset: Any,
    lr: float,
) -> ConfigContainer:
    from exaone_bridge.recipes import common

    plan = checked.plan
    apply_to_provider(provider, plan)
    if hasattr(provider, "freeze_vision_model"):
        # Text alone cannot train the vision encoder. Images train its merger, and nothing else.
        provider.freeze_vision_model = True
        provider.freeze_vision_projection = "_vl_" not in model
    config = common.container(provider, plan, dataset, train_iters=1000, lr=lr, lr_warmup_iters=50)
    apply_to_config(config, plan, checked.graphs)
    _set_tokenizer_and_weights(config, hf_path)
    # Answers differ in length: average the loss over tokens, not over microbatches or ranks.
    provider.calculate_per_token_loss = True
    config.ddp.average_in_collective = False
    return config


def config_file(hf_path: str | Path) -> Path:
    """Return config.json of a recipe's `hf_path`.

    Raises:
        CheckpointError: it is missing.
    """
    path = Path(hf_path) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            hf_path,
            "config.json is missing",
            remedy="pass a Hugging Face directory on disk; recipes download nothing",
        )
    return path


def _provider(model: str, hf_path: str | Path | None) -> ExactGPTModelProvider:
    """Build the provider from the config in `hf_path`, or else from the published config."""
    supported()
    from megatron.bridge import AutoBridge

    if hf_path is not None:
        config_file(hf_path)
        return AutoBridge.from_hf_pretrained(str(hf_path)).to_megatron_provider(load_weights=False)
    from transformers import CONFIG_MAPPING

    published = CONFIGS[model]
    hf_config = CONFIG_MAPPING[published["model_type"]].from_dict(dict(published))
    return AutoBridge.from_hf_config(hf_config).to_megatron_provider(load_weights=False)


def _checked_plan(
    model: str,
    stage: str,
    gpu_memory_gb: int,
    provider: ExactGPTModelProvider,
    overrides: PlanOverrides,
    packed: bool = False,
) -> CheckedPlan:
    """Look up the plan, apply the overrides, and check it against the model and the GPU."""
    plan = training_plan(model, stage, gpu_memory_gb).with_overrides(**overrides)
    return check_plan(model, stage, gpu_memory_gb, provider.hf_config, plan, packed)


def _set_tokenizer_and_weights(config: ConfigContainer, hf_path: str | Path | None) -> None:
    """Use the tokenizer and weights in `hf_path`, if given; the vocabulary size stays."""
    tokenizer = config.tokenizer
    if hf_path is not None and any((Path(hf_path) / name).is_file() for name in _TOKENIZER_FILES):
        tokenizer.tokenizer_type, tokenizer.tokenizer_model = "HuggingFaceTokenizer", str(hf_path)
    else:
        tokenizer.tokenizer_type, tokenizer.vocab_size = "NullTokenizer", config.model.vocab_size
    if hf_path is not None:
        # Megatron-Bridge loads a Hugging Face directory here through our bridge.
        config.checkpoint.pretrained_checkpoint = str(hf_path)
