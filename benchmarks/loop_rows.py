"""The rows of train_loop.py: its tables, and how a row is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from exaone_bridge.cli.train_settings import read_settings
from exaone_bridge.recipes import recipe as find_recipe
from exaone_bridge.recipes.training_plans import plan_of_recipe

P12 = "exaone4_1p2b_pretrain_config micro_batch_size=1"
ERNIE = "ernie45_21b_a3b_pretrain_config micro_batch_size=1 seq_length=8192"
P32 = "exaone4_32b_pretrain_config pp=1 vpp=1 micro_batch_size=1"
TP2 = f"{P12} gpus=2 tp=2 seq_length=8192 global_batch_size=4"
CP2 = f"{P12} gpus=2 cp=2 layers=12 seq_length=32768 global_batch_size=2"
# Models are truncated where one GPU of 80 GB has no room for the optimizer of all layers.
TABLES: dict[str, list[str]] = {
    "one-gpu": [
        f"1.2B, 8192: {P12} gpus=1 seq_length=8192 global_batch_size=4",
        f"12 layers of the 1.2B, 32768: {P12} gpus=1 layers=12 seq_length=32768 "
        "global_batch_size=2",
        f"3 layers of the 32B, 8192: {P32} gpus=1 tp=1 layers=3 seq_length=8192 "
        "global_batch_size=4",
        f"4 layers of ERNIE 21B, 8192: {ERNIE} gpus=1 ep=1 layers=4 global_batch_size=4",
    ],
    "two-gpus": [
        f"1.2B, 8192: {P12} gpus=1 seq_length=8192 global_batch_size=4",
        f"1.2B, 8192, TP2: {TP2}",
        f"1.2B, 8192, PP2: {P12} gpus=2 pp=2 seq_length=8192 global_batch_size=8",
        "1.2B, 4096: exaone4_1p2b_pretrain_config gpus=1 micro_batch_size=4 global_batch_size=4",
        "1.2B, 4096, DP2: exaone4_1p2b_pretrain_config gpus=2 micro_batch_size=4 "
        "global_batch_size=8",
        f"12 layers of the 1.2B, 32768: {P12} gpus=1 layers=12 seq_length=32768 "
        "global_batch_size=2",
        f"12 layers of the 1.2B, 32768, CP2: {CP2}",
        f"4 layers of ERNIE 21B: {ERNIE} gpus=1 ep=1 layers=4 global_batch_size=4",
        f"4 layers of ERNIE 21B, EP2: {ERNIE} gpus=2 ep=2 layers=4 global_batch_size=8",
        f"1.2B, 32768, CP2: {P12} gpus=2 cp=2 seq_length=32768 global_batch_size=2",
        f"8 layers of the 32B, TP2: {P32} gpus=2 tp=2 layers=8 seq_length=8192 global_batch_size=4",
        f"6 layers of ERNIE 21B, EP2: {ERNIE} gpus=2 ep=2 layers=6 global_batch_size=8",
    ],
    "overlap": [
        f"TP2: {TP2}",
        f"TP2, graphs of layers: {TP2} cuda_graphs=layers",
        f"TP2, graph of a full iteration: {TP2} cuda_graphs=full-iteration",
        f"TP2, fused weight gradients: {TP2} fuse_weight_gradients=true",
        f"CP2, p2p: {CP2} cp_full_attention=p2p",
        f"CP2, all_gather: {CP2} cp_full_attention=all_gather",
        f"CP2, a2a: {CP2} cp_full_attention=a2a",
        f"TP2, tp_overlap: {TP2} tp_overlap=true",  # the last: its buffers stay in the process
    ],
    "fine-tuning": [
        f"pretraining, 4096: {P12} gpus=1 seq_length=4096 global_batch_size=4",
        "packed SFT, 4096: exaone4_1p2b_sft_config gpus=1 packed=true seq_length=4096 "
        "global_batch_size=4",
        "LoRA, packed, 4096: exaone4_1p2b_peft_config gpus=1 packed=true seq_length=4096 "
        "global_batch_size=4",
    ],
    "fp8": [
        f"3 layers of the 32B, bf16: {P32} gpus=1 tp=1 layers=3 seq_length=8192 "
        "global_batch_size=4",
        # The recipe leaves the first and the last layer in bf16, which are two of these three.
        f"3 layers of the 32B, FP8: {P32} gpus=1 tp=1 layers=3 seq_length=8192 "
        "global_batch_size=4 precision=fp8 mixed_precision.first_last_layers_bf16=false",
        f"3 layers of the 32B, FP8 by blocks: {P32} gpus=1 tp=1 layers=3 seq_length=8192 "
        "global_batch_size=4 precision=fp8-blockwise",
    ],
    "tp8-rank": [
        f"a TP8 rank, 16 layers of the 32B: {P32} gpus=8 tp=8 layers=16 seq_length=8192 "
        "global_batch_size=4 emulate=true",
    ],
}

_OWN = ("gpus", "layers", "emulate")  # settings of rows, beside those of `train`


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: what is printed.
        recipe: the name of the recipe.
        gpus: ranks of the layout.
        arguments: of the recipe, without `gpus`.
        overrides: of Megatron-Bridge's ConfigContainer.
        environment: variables of the processes.
        layers: the first layers of the published model; None: all.
        emulate: whether one process runs one rank, and collectives are copies.
    """

    name: str
    recipe: str
    gpus: int
    arguments: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    layers: int | None = None
    emulate: bool = False

    @property
    def processes(self) -> int:
        """The number of processes, each with a GPU, that run the row."""
        return 1 if self.emulate else self.gpus

    @property
    def model(self) -> tuple[str, int | None]:
        """What rows must have in common for a ratio, beside the sequence length."""
        return model_of(self.recipe), self.layers


def model_of(recipe_name: str) -> str:
    """Return the model of a recipe, a key of `published.CONFIGS`."""
    return plan_of_recipe(recipe_name, {})[0]


def parse_row(text: str, variant: str = "") -> Row:
    """Parse "NAME: RECIPE SETTINGS"; a variant is "NAME: SETTINGS", which win.

    Raises:
        ValueError: a row without a name or a recipe.
        BridgeError: there is no such recipe, or it has no such settings.
    """
    name, _, words = text.partition(":")
    suffix, _, changes = variant.partition(":")
    recipe, *settings = words.split() or [""]
    if not recipe or "=" in recipe:
        raise ValueError(f"a row is 'NAME: RECIPE SETTINGS', got {text!r}")
    settings += changes.split()
    environment = [setting for setting in settings if setting.partition("=")[0].isupper()]
    own = dict(each.split("=", 1) for each in settings if each.partition("=")[0] in _OWN)
    plain = [
        each for each in settings if each not in environment and each.partition("=")[0] not in _OWN
    ]
    arguments, overrides = read_settings(find_recipe(recipe), plain)
    variables = _variables(recipe, arguments) | dict(each.split("=", 1) for each in environment)
    return Row(
        name=f"{name.strip()}, {suffix.strip()}" if suffix else name.strip(),
        recipe=recipe,
        gpus=int(own.get("gpus", 1)),
        arguments=arguments,
        overrides=overrides,
        environment=variables,
        layers=int(own["layers"]) if "layers" in own else None,
        emulate=own.get("emulate") == "true",
    )


def _variables(recipe_name: str, arguments: dict[str, Any]) -> dict[str, str]:
    """Return the environment variables of the recipe's plan, which CUDA reads when it starts."""
    *_, plan = plan_of_recipe(recipe_name, arguments)
    return {key: str(value) for key, value in plan.environment.items()}


def rows_of(tables: Sequence[str], texts: Sequence[str], variants: Sequence[str]) -> list[Row]:
    """Return the rows of tables and those that are given, or each variant of them.

    Rows with the same environment variables follow each other, because they share processes.
    """
    texts = [text for table in tables for text in TABLES[table]] + [*texts]
    rows = [parse_row(text, variant) for text in texts for variant in variants or [""]]
    environments = [row.environment for row in rows]
    return sorted(rows, key=lambda row: environments.index(row.environment))
