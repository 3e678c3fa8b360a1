"""A Llama behaves as without exaone_bridge: each patch, and AutoBridge in a process of its own."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exaone_bridge.models import FAMILIES
from exaone_bridge.patches.patch import Patch, ValuePatch
from exaone_bridge.patches.table import PATCHES
from tests.helpers.fresh import HAS_TE, IMPORT_GUARD, fresh

ARCHITECTURES = {name for family in FAMILIES for name in family.architectures}
LLAMA = SimpleNamespace(architectures=["LlamaForCausalLM"])
RESULT = SimpleNamespace(hf_pretrained=SimpleNamespace(config=LLAMA))


@pytest.fixture(scope="module")
def llama(megatron_bridge: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Llama with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama") / "hf"
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


# --- each patch ---


def _auto_bridge(folder: Path) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return SimpleNamespace(hf_pretrained=config, hf_model_id=str(folder))


def _save(folder: Path) -> tuple[Any, ...]:
    return _auto_bridge(folder), [object()], folder.parent / "out"


def _save_megatron(folder: Path) -> tuple[Any, ...]:
    return _auto_bridge(folder), [object()], folder.parent / "out", folder.parent  # no tokenizer


def _load_tokenizer(folder: Path) -> tuple[Any, ...]:
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM

    without = folder.parent / "without"
    shutil.copytree(folder, without, ignore=shutil.ignore_patterns("tok*"), dirs_exist_ok=True)
    return (PreTrainedCausalLM.from_pretrained(without),)


def _checkpoint(folder: Path) -> Path:
    """A checkpoint whose newest iteration is not the tracked one."""
    checkpoint = folder.parent / "megatron"
    for name in ("iter_0000000", "iter_0000001"):
        (checkpoint / name).mkdir(parents=True, exist_ok=True)
        (checkpoint / name / "run_config.yaml").write_text("model: {_target_: megatron.Llama}")
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("0")
    return checkpoint


def _run_config(_: Path) -> tuple[Any, ...]:
    target = "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider"
    return ({"model": {"_target_": target, "mtp_windowed": True, "layers": [1, {"a": None}]}},)


def _adapter(_: Path) -> tuple[Any, ...]:
    """DoRA with dropout on routed experts, which is rejected for our models."""
    from megatron.bridge.peft.dora_layers import DoRALinear

    adapter = SimpleNamespace(
        base_linear_name="decoder.layers.0.mlp.experts.linear_fc1", dropout=torch.nn.Dropout(0.1)
    )
    return object.__new__(DoRALinear), SimpleNamespace(layer_norm_weight=torch.ones(4)), adapter


def _row_parallel(_: Path) -> tuple[Any, ...]:
    adapter = SimpleNamespace(
        input_is_parallel=True, tp_group=SimpleNamespace(size=lambda: 2), config=SimpleNamespace()
    )
    return (SimpleNamespace(adapter=adapter, to_wrap=SimpleNamespace(config=SimpleNamespace())),)


def _magnitude(_: Path) -> tuple[Any, ...]:
    return SimpleNamespace(input_is_parallel=False, config=SimpleNamespace()), torch.ones(4)


def _conversation(folder: Path) -> tuple[Any, ...]:
    from transformers import AutoTokenizer

    return {"messages": []}, AutoTokenizer.from_pretrained(folder)


def _rows(folder: Path) -> tuple[Any, ...]:
    from transformers import AutoTokenizer

    return folder / "training.jsonl", AutoTokenizer.from_pretrained(folder), 8


def _run(_: Path) -> tuple[Any, ...]:
    """Data that are rejected for our models."""
    return (SimpleNamespace(model=SimpleNamespace(), dataset=SimpleNamespace(data_path="absent")),)


CASES: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "AutoBridge.save_hf_weights": _save,
    "AutoBridge.save_hf_pretrained": _save,
    "AutoBridge.save_hf_adapter": _save,
    "AutoBridge.export_hf_weights": lambda folder: (_auto_bridge(folder), [object()]),
    "AutoBridge.save_megatron_model": _save_megatron,
    "AutoBridge.from_hf_pretrained": lambda _: (object, "meta-llama/Llama-3.2-1B"),
    "AutoBridge.load_megatron_model": lambda folder: (_auto_bridge(folder), _checkpoint(folder)),
    "AutoBridge.from_auto_config": lambda folder: (object, _checkpoint(folder), str(folder)),
    "PreTrainedCausalLM._load_tokenizer": _load_tokenizer,
    "_mtp_source_key_prefixes": lambda _: (SimpleNamespace(), SimpleNamespace()),
    "apply_run_config_backward_compat": _run_config,
    "_warmup_jit_function": lambda _: (SimpleNamespace(), 1),
    "tokenize_chat_example": _conversation,
    "tokenize_dataset": _rows,
    "ConfigContainer.validate": _run,
    "_resolve_pretrained_wrapper_cls": lambda _: (
        SimpleNamespace(architectures=["LlamaForSequenceClassification"]),
    ),
    "mtp_block_spec": lambda _: (SimpleNamespace(),),
    "AdapterWrapper.__init__": _adapter,
    "DoRALinear._get_weight_norm": _row_parallel,
    "ParallelLinearDoRAAdapter.init_weight_magnitude": _magnitude,
    "infer_rank_pattern_from_adapter_weights": lambda _: (
        [SimpleNamespace(param_name="q_proj.lora_A.weight")],
    ),
}
OF_OUR_MODELS = {"Ernie4_5_MoeConfig.from_dict"}  # a class that no other model has
TESTED_BELOW = {"DistributedOptimizer._build_optimizer_group_ranges"}


def _name(patch: Patch) -> str:
    return patch.target.partition(":")[2]


def test_every_patch_of_a_function_has_a_case() -> None:
    assert {_name(patch) for patch in PATCHES if type(patch) is Patch} == (
        CASES.keys() | OF_OUR_MODELS | TESTED_BELOW
    )


@pytest.mark.parametrize("patch", [one for one in PATCHES if _name(one) in CASES], ids=_name)
def test_a_patch_passes_the_call_of_another_model_on(llama: Path, patch: Patch) -> None:
    calls = []

    def original(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, {name: value for name, value in kwargs.items() if value is not None}))
        return RESULT

    args = CASES[_name(patch)](llama)
    result = patch.replacement(original, *args)
    assert result in (RESULT, None) and len(calls) == 1
    assert calls[0] == (args, {})


def test_tokenizer_files_alone_are_enough(llama: Path) -> None:
    """A tokenizer is read from a folder without a config, as by Megatron-Bridge."""
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM

    folder = llama.parent / "tokenizer"
    shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    assert PreTrainedCausalLM.from_pretrained(folder).tokenizer.eos_token == "</s>"
    empty = llama.parent / "empty"
    empty.mkdir()
    with pytest.raises(Exception) as with_us:
        PreTrainedCausalLM.from_pretrained(empty)._load_tokenizer()
    with pytest.raises(Exception) as without:
        PreTrainedCausalLM._load_tokenizer.__wrapped__(PreTrainedCausalLM.from_pretrained(empty))
    assert repr(with_us.value) == repr(without.value)


def test_the_optimizer_numbers_other_models_as_before(megatron_bridge: Any) -> None:
    from exaone_bridge.patches.optimizer import build_optimizer_group_ranges

    bf16, fp32 = (torch.zeros(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    numbers, ranges = {bf16: (0, 0), fp32: (0, 1)}, [{"params": [bf16, fp32]}]

    found = build_optimizer_group_ranges.replacement(lambda _: (numbers, ranges), object)
    assert found == (numbers, ranges) and found[1][0]["params"][0] is bf16
    fp32.stays_fp32 = True  # type: ignore[attr-defined]
    found = build_optimizer_group_ranges.replacement(lambda _: (numbers, ranges), object)
    assert found[0] == {fp32: (0, 0), bf16: (0, 1)} and found[1][0]["params"][0] is fp32


@pytest.mark.parametrize(
    "patch", [one for one in PATCHES if isinstance(one, ValuePatch)], ids=_name
)
def test_a_table_keeps_its_entries(megatron_bridge: Any, patch: ValuePatch) -> None:
    if _name(patch) == "HAVE_TE":  # without Transformer Engine, Llama's adapters raise a TypeError
        assert patch.replacement(True) is HAS_TE
        return
    if _name(patch) == "SUPPORTED_HF_ARCHITECTURES":
        added = set(patch.replacement(("ForCausalLM",))) - {"ForCausalLM"}
        assert added <= ARCHITECTURES
        return
    importlib.import_module(patch.target.partition(":")[0])
    before = {"other": object()}
    assert patch.replacement(before).items() >= before.items()


# --- AutoBridge ---

CONVERT = """
import json, os, sys, torch
from unittest import mock
from megatron.bridge import AutoBridge
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from transformers import GPT2Config

def message(architecture):
    try:
        AutoBridge.from_hf_config(GPT2Config(architectures=[architecture]))
    except ValueError as error:
        return str(error)

source, output = FOLDERS
bridge = AutoBridge.from_hf_pretrained(source)
provider = bridge.to_megatron_provider()
for name in ("apply_rope_fusion", "gradient_accumulation_fusion", "masked_softmax_fusion"):
    setattr(provider, name, False)
provider.persist_layer_norm = provider.bias_dropout_fusion = False
provider.transformer_layer_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
provider.finalize()
torch.distributed.init_process_group(
    "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
)
on_cpu = mock.patch("torch.cuda.current_device", lambda: torch.device("cpu"))
with on_cpu, mock.patch("torch.cuda.set_device"):
    parallel_state.initialize_model_parallel()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_hf_pretrained(model, output)
result = {
    "models": AutoBridge.list_supported_models(),
    "messages": [message("GPT2LMHeadModel"), message("OtherForCausalLM")],
}
print("RESULT" + json.dumps(result))
"""


@pytest.mark.slow
def test_a_llama_is_converted_as_without_exaone_bridge(llama: Path, tmp_path: Path) -> None:
    found, files = {}, {}
    for name, first in (("with", "import exaone_bridge\n"), ("without", IMPORT_GUARD)):
        output = tmp_path / name
        folders = f"FOLDERS = ({str(llama)!r}, {str(output)!r})\n"
        found[name] = fresh(first + folders + CONVERT)
        files[name] = {path.name: path.read_bytes() for path in sorted(output.iterdir())}
    assert files["with"] == files["without"] and "model.safetensors" in files["with"]
    assert json.loads(files["with"]["config.json"])["architectures"] == ["LlamaForCausalLM"]
    added = sorted(ARCHITECTURES - set(found["without"]["models"]))
    assert found["with"]["models"] == sorted([*found["without"]["models"], *added])
    for with_us, without in zip(
        found["with"]["messages"], found["without"]["messages"], strict=True
    ):
        kept = [line for line in with_us.splitlines() if line[4:] not in added]
        assert without and kept == without.splitlines()
