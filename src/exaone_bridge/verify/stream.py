"""Verifies a model that does not fit into memory twice: a layer at a time, on both sides.

Both sides run their own whole model; only its weights come and go. Transformers' and Megatron-Core's layers are filled
just before they run and emptied after, so that masks, RoPE, schedule and residuals are those of the real thing.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.checkpoint.headers import TensorInfo, read_json
from exaone_bridge.checkpoint.source import HFSource, check_layout, open_source
from exaone_bridge.checkpoint.writer import write_config
from exaone_bridge.parts.files import copy_travelling_files
from exaone_bridge.parts.layout import Layout
from exaone_bridge.verify.digests import Digest, digest_folder, digest_stream
from exaone_bridge.verify.folders import compare_configs, compare_digests, compare_files
from exaone_bridge.verify.launch import is_first, run_alone, run_world, work_folder
from exaone_bridge.verify.report import Check, Report, versions
from exaone_bridge.verify.summary import model_summary
from exaone_bridge.verify.verify import DTYPES, Job, OnEvent, Ours, Theirs, arithmetic, check_backend, make_job

__all__ = ["Reader", "streams", "verify_streaming"]

_HOLDABLE = 2**31  # bytes of weights in fp32 that are held whole
_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def streams(folder: Path, wish: bool | None) -> bool:
    """Whether to go layer by layer: as wished, or by size."""
    return wish if wish is not None else open_source(folder).parameters * 4 > _HOLDABLE


class Reader(Mapping[str, torch.Tensor]):
    """Tensors of a folder, each read when it is asked for and held by nobody; no file stays mapped."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        data = bytearray(info.nbytes)
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset)
            view, at = memoryview(data), 0
            while at < info.nbytes:
                at += file.readinto(view[at:])
        return torch.frombuffer(data, dtype=_TORCH[info.dtype]).view(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


# --- Transformers' side ---------------------------------------------------------------------------------------------


def streamed_transformers(source: HFSource, dtype: torch.dtype) -> Any:
    """Transformers' eager model whose layers are filled when they run; what is outside them stays."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source.folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    reader = Reader(source.tensors)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # RoPE's frequencies: no weights
            model.set_submodule(name, type(module)(config=model.config))
    stacks = [name for name, module in model.named_modules() if _are_layers(module, source.facts)]
    layers = {f"{name}.{number}" for name in stacks for number in range(source.facts.num_layers)}
    for name, module in model.named_modules():
        if name in layers:
            _fill_when_run(module, name, reader, dtype)
        elif not any(name.startswith(f"{layer}.") for layer in layers):
            _fill(module, name, reader, dtype, recurse=False)
    if source.facts.tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def _are_layers(module: torch.nn.Module, facts: Any) -> bool:
    return isinstance(module, torch.nn.ModuleList) and len(module) == facts.num_layers and hasattr(module[0], "mlp")


def _fill_when_run(layer: torch.nn.Module, name: str, reader: Reader, dtype: torch.dtype) -> None:
    layer.register_forward_pre_hook(lambda module, _: _fill(module, name, reader, dtype))
    layer.register_forward_hook(lambda module, *_: module.to("meta") and None)


def _fill(module: torch.nn.Module, prefix: str, reader: Reader, dtype: torch.dtype, recurse: bool = True) -> None:
    """Put the weights on disk in the places of parameters on "meta"."""
    for name, parameter in list(module.named_parameters(recurse=recurse)):
        full = f"{prefix}.{name}" if prefix else name
        if parameter.is_meta and (value := _read(full, reader)) is not None:
            owner, _, leaf = name.rpartition(".")
            keep = parameter.dtype if parameter.dtype == torch.float32 else dtype
            setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(value.to(keep), requires_grad=False))


def _read(name: str, reader: Reader) -> torch.Tensor | None:
    """The tensor of this parameter; Transformers stacks experts in memory. None: tied to another."""
    if name in reader:
        return reader[name]
    if (renamed := _renamed(name, reader)) is not None:
        return reader[renamed]
    module, _, leaf = name.rpartition(".")
    which = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(leaf)
    if which is None or not module.endswith(".experts"):
        return None
    count = sum(1 for each in reader if re.fullmatch(rf"{re.escape(module)}\.\d+\.down_proj\.weight", each))
    experts = [torch.cat([reader[f"{module}.{expert}.{one}_proj.weight"] for one in which]) for expert in range(count)]
    return torch.stack(experts)


def run_theirs_streaming(folder: Path, job: Job) -> Theirs:
    """On one rank: as `run_theirs`, a layer at a time."""
    from exaone_bridge.host.world import emit
    from exaone_bridge.verify.reference import run_reference

    source = open_source(folder)
    emit("Transformers' logits, layer by layer")
    model = streamed_transformers(source, torch.float32)
    found = Theirs([run_reference(model, job.points, tokens) for tokens in job.batches])
    if job.dtype != "float32":
        del model
        model = streamed_transformers(source, DTYPES[job.dtype])
        found.half = [run_reference(model, job.points, tokens, nudged=False) for tokens in job.batches]
    return found


def _renamed(name: str, reader: Reader) -> str | None:
    """Transformers holds some tensors in another module than on disk: the same layer, and the same last two words."""
    layer, tail = re.match(r".*?\.\d+\.|", name)[0], name.split(".")[-2:]  # type: ignore[index]
    found = [each for each in reader if each.startswith(layer) and each.split(".")[-2:] == tail]
    return found[0] if layer and len(found) == 1 else None


# --- Megatron-Core's side -------------------------------------------------------------------------------------------


class StreamedMegatron:
    """A Megatron-Core model whose parameters are filled through Megatron-Bridge's own conversion, group by group.

    Until a parameter is filled its memory is only promised by the operating system; emptying it takes the promise anew.

    Args:
        bridge: an AutoBridge of the Hugging Face folder.
        dtype: of the parameters.
    """

    def __init__(self, bridge: Any, source: HFSource, layout: Layout, backend: str, dtype: torch.dtype) -> None:
        from exaone_bridge.host.model import model_parallel_of

        provider = bridge.to_megatron_provider(load_weights=False)
        fields = model_parallel_of(layout) | {
            "backend": backend,
            "pipeline_dtype": dtype,
            "autocast_dtype": dtype,
            "perform_initialization": False,
        }
        provider.apply_overrides_and_finalize(dtype, fields)
        cpu = not torch.cuda.is_available()
        self.model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=cpu)
        self.converter = bridge._model_bridge
        self.hf = bridge.hf_pretrained
        self.weights = _State(Reader(source.tensors), self.hf.config)
        self.groups = self._tasks()

    def _tasks(self) -> dict[str, list[Any]]:
        """The host's tasks by layer; each outside the layers by itself."""
        groups: dict[str, list[Any]] = {}
        for task in self.converter.build_conversion_tasks(self.hf, self.model):
            layer = re.match(r"decoder\.layers\.(\d+)\.", task.global_param_name)
            groups.setdefault(layer[1] if layer else f"outside {task.global_param_name}", []).append(task)
        return groups

    @torch.no_grad()
    def fill(self, tasks: Sequence[Any]) -> None:
        """Hugging Face -> this rank's parameters."""
        for task in tasks:
            for weight in self.converter.stream_weights_hf_to_megatron(self.weights, self.model, [task]):
                task.param_weight.data.copy_(weight.weight)

    @torch.no_grad()
    def empty(self, tasks: Sequence[Any]) -> None:
        """Give the memory back."""
        for task in tasks:
            if task.param_weight is not None:
                task.param_weight.data = torch.empty_like(task.param_weight.data)

    def round_trip(self) -> dict[str, Digest]:
        """Every tensor to Megatron-Core and back, a layer at a time."""
        found: dict[str, Digest] = {}
        # A mapping that has imported does not ask other pipeline stages what it has learnt, and they would wait: the
        # way back has mappings of its own, as in the host's export.
        back = self._tasks()
        for name, tasks in self.groups.items():
            self.fill(tasks)
            found |= digest_stream(
                self.converter.stream_weights_megatron_to_hf(
                    self.model, self.hf, cpu=True, show_progress=False, conversion_tasks=back[name]
                )
            )
            self.empty(tasks)
        return found

    def stream_layers(self) -> None:
        """From now on each layer is filled when it runs; what is outside the layers is filled at once."""
        from megatron.core.utils import unwrap_model

        for name, tasks in self.groups.items():
            if name.startswith("outside"):
                self.fill(tasks)
        self.converter._broadcast_shared_embeddings(self.model)
        for chunk in unwrap_model(self.model):
            for layer in chunk.decoder.layers:
                tasks = self.groups[str(layer.layer_number - 1)]
                layer.register_forward_pre_hook(lambda *_, mine=tasks: self.fill(mine))
                layer.register_forward_hook(lambda *_, mine=tasks: self.empty(mine))


class _State:
    """What the host's stream asks of a Hugging Face model."""

    def __init__(self, state: Reader, config: Any) -> None:
        self.state, self.config = state, config


def run_megatron_streaming(folder: Path, target: Path, job: Job) -> tuple[Ours, dict[str, Digest]]:
    """On a rank: as `run_megatron`, a layer at a time; weights are digested instead of written to `target`."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.host.bridge_base import config_mapping
    from exaone_bridge.host.world import emit
    from exaone_bridge.verify.ours import run_ours

    source = open_source(folder)
    bridge = AutoBridge.from_hf_pretrained(folder)
    emit("HF -> Megatron-Core -> HF, layer by layer")
    streamed = StreamedMegatron(bridge, source, job.layout, job.backend, DTYPES[source.facts.dtype])
    digests = streamed.round_trip()
    if is_first():
        write_config(target, bridge._model_bridge.megatron_to_hf_config(streamed.model[0].config))
        copy_travelling_files(folder, target)
    del streamed
    gc.collect()
    emit("Megatron-Core's logits, layer by layer")
    streamed = StreamedMegatron(bridge, source, job.layout, job.backend, DTYPES[job.dtype])
    streamed.stream_layers()
    runs = [run_ours(streamed.model, job.points, tokens) for tokens in job.batches]
    return Ours(config_mapping(bridge.hf_pretrained.config), runs), digests


def verify_streaming(
    source_folder: Path,
    layout: Layout,
    *,
    backend: str = "auto",
    dtype: str = "float32",
    count: int = 1,
    length: int | None = None,
    seed: int = 0,
    generation: bool = False,
    gradients: bool = False,
    on_event: OnEvent = None,
) -> Report:
    """`verify`, holding one layer's weights at a time on either side.

    Generation and gradients need the whole model, and are not run; prompts are `count`, at most one of each length.
    """
    from exaone_bridge.host.registration import supported
    from exaone_bridge.verify.ours import merge

    started = time.perf_counter()
    source_folder = source_folder.resolve()
    source = open_source(source_folder)
    check_layout(source.facts, layout)
    job = make_job(
        source,
        layout,
        backend=backend,
        dtype=dtype,
        count=1,
        length=length,
        seed=seed,
        generation=False,
        gradients=False,
    )
    supported()
    check_backend(backend)
    theirs = run_alone(run_theirs_streaming, source_folder, job, on_event=on_event)
    before = digest_folder(source_folder)
    with work_folder() as work:
        results = run_world(run_megatron_streaming, layout.ranks, source_folder, work, job, on_event=on_event)
        # What travels beside the model is copied, not converted.
        after = {name: before[name] for name in source.carried} | results[0][1]
        checks = [
            compare_digests(before, after),
            compare_configs(results[0][0].config, read_json(work / "config.json")),
            compare_files(source_folder, work),
        ]
    ours = [merge([result.runs[number] for result, _ in results]) for number in range(len(job.batches))]
    found = arithmetic(theirs, ours, None, source, job)
    why = "it needs the whole model in memory (--no-stream)"
    asked = {"generation": generation, "gradients": gradients}
    skipped = [Check.not_run(name, why) for name, wanted in asked.items() if wanted]
    return Report(
        source=source_folder.name,
        layout=str(layout),
        checks=(*checks, *found["checks"], *skipped),
        backend=backend,
        dtype=dtype,
        model=model_summary(source),
        places=found["places"],
        location=found["location"],
        tensors={name: digest.as_json() for name, digest in before.items()},
        setup={"prompts": [list(tokens.shape) for tokens in job.batches], "seed": seed, "streaming": True},
        versions=versions(),
        seconds=time.perf_counter() - started,
    )
