"""Measures the cost of loading, saving and converting. docs/benchmarks.md has the results.

    python benchmarks/convert.py --work DIR                 # everything: 40 GB of disk, 20 minutes
    python benchmarks/convert.py --work DIR --only load     # one measure
    python benchmarks/convert.py --work DIR --small         # the same code on tiny models, 1 minute

Variants that are compared are interleaved, and the minimum of each counts, because other work on
the machine adds to all of them. Page caches are warm. Each measure runs in a process of its own,
forked after Megatron-Core has been imported.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import TensorSpec
from exaone_bridge.checkpoint.hf.shards import ShardWriter, assign_files, shard_layout, write_index
from exaone_bridge.checkpoint.hf.writer import write_config_json
from exaone_bridge.checkpoint.reshard.plan import reshard_plan
from exaone_bridge.checkpoint.reshard.validate import validate_plan
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.models import family_of
from exaone_bridge.models.ernie45.tiny import TINY as ERNIE
from exaone_bridge.models.exaone4.tiny import TINY as EXAONE
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.hf_config import with_num_layers
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.param_mapping import hf_tensors

SMALL = EXAONE["exaone4-1.2b"] | {
    "dtype": "bfloat16",
    "num_key_value_heads": 4,
    "num_attention_heads": 8,
}
B1 = CONFIGS["exaone4_1p2b"]  # 2.6 GB
B32 = with_num_layers(CONFIGS["exaone4_32b"], 14)  # 16 GB


@dataclass
class Run:
    """One run of this program."""

    work: Path
    repeats: int
    small: bool


def many(layers: int, experts: int) -> dict[str, Any]:
    """Return a config with some more than 3 x layers x experts tensors, all of them tiny."""
    return ERNIE["ernie45-300b"] | {
        "num_hidden_layers": layers, "moe_num_experts": experts, "moe_layer_start_index": 0,
        "moe_layer_end_index": layers - 1, "moe_layer_interval": 1, "hidden_size": 16,
        "intermediate_size": 32,
        "moe_intermediate_size": 8, "head_dim": 8, "vocab_size": 64, "dtype": "bfloat16",
    }  # fmt: skip


def checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """Write a Hugging Face folder with random bits as weights, unless it exists."""
    if folder.exists():
        return folder
    family = family_of(config["architectures"], where="benchmark")
    model_config = family.read_hf_config(config)
    kinds = {"bfloat16": "BF16", "float32": "F32"}
    specs = [
        TensorSpec(
            name,
            "F32" if tensor.fp32 else kinds[model_config.dtype],
            tensor.shape(model_config.dims),
        )
        for name, tensor in hf_tensors(family.mappings(model_config)).items()
    ]
    places = shard_layout(specs, assign_files({spec.name: spec.nbytes for spec in specs}))
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer = ShardWriter.create(partial, places)
    pool = memoryview(
        torch.randint(
            256, (1 << 26,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        ).numpy()
    )
    for number, spec in enumerate(specs):
        start = number * 4096 % (1 << 20)
        step = len(pool) - (1 << 20)
        writer.put(
            spec.name,
            [
                pool[start : start + min(step, spec.nbytes - at)]
                for at in range(0, spec.nbytes, step)
            ],
        )
    writer.close()
    write_index(partial, places)
    write_config_json(partial, config)
    partial.rename(folder)
    return folder


class Least(NamedTuple):
    """Seconds of wall time and of CPU time of all threads; other work adds less to the second."""

    wall: float
    cpu: float


def least(repeats: int, ways: dict[str, Callable[[], object]]) -> dict[str, Least]:
    """Return the minimum seconds of each variant, children included; they are interleaved."""
    found = {name: Least(math.inf, math.inf) for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started, before = time.perf_counter(), cpu_seconds()
            way()
            cpu = cpu_seconds() - before
            found[name] = Least(*map(min, found[name], (time.perf_counter() - started, cpu)))
    return found


def cpu_seconds() -> float:
    """Return CPU seconds of all threads and ended children (`os.times` has 10 ms resolution)."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def ratio(a: float, b: float) -> str:
    """Return `a / b` as text, or a dash if `b` is below the resolution of the clock."""
    return f"{a / b:.2f}" if b > 0 else "-"


def unfilled(bridge: Any, layout: Layout) -> list[Any]:
    """Build a model whose weights are in memory and differ from the checkpoint's."""

    provider = bridge.to_megatron_provider(load_weights=False)
    provider.perform_initialization = False
    provider.apply_overrides_and_finalize(provider.params_dtype, layout.provider_overrides())
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.fill_(1.0)
    return list(model)


def _load_rank(folder: Path, repeats: int) -> dict[str, Least]:
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unfilled(bridge, Layout())
    files = sorted(folder.glob("*.safetensors"))
    copies = {
        name: torch.ones_like(tensor) for file in files for name, tensor in load_file(file).items()
    }

    def plain() -> None:
        for file in files:
            for name, tensor in load_file(file).items():
                copies[name].copy_(tensor)

    def upstream() -> None:
        MegatronModelBridge.load_weights_hf_to_megatron(
            bridge._model_bridge, bridge.hf_pretrained, model
        )

    torch.set_num_threads(1)
    return least(
        repeats,
        {
            "plain copy": plain,
            "planned": lambda: bridge.load_hf_weights(model),
            "Megatron-Bridge": upstream,
        },
    )


def measure_load(run: Run) -> None:
    """Measure a load at TP1, a plain copy, and Megatron-Bridge's loader."""
    folder = checkpoint(run.work / "b1", SMALL if run.small else B1)
    (found,) = ForkLauncher(1).all(_load_rank, folder, run.repeats)
    plain, planned, upstream = found["plain copy"], found["planned"], found["Megatron-Bridge"]
    for what, a, b, c in zip(("seconds", "of CPU"), plain, planned, upstream, strict=True):
        print(
            f"| import at TP1, {what}: plain copy, planned, Megatron-Bridge "
            f"| {a:.3f}, {b:.3f}, {c:.3f} |"
        )
        print(f"| planned / plain copy (at most 1.5), {what} | {ratio(b, a)} |")
        print(f"| Megatron-Bridge / planned (at least 5), {what} | {ratio(c, b)} |", flush=True)


def _bytes_rank(folder: Path, layout: Layout) -> tuple[int, int]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.bridge.eligibility import local_model
    from exaone_bridge.checkpoint.reshard.load import load_weights

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unfilled(bridge, layout)
    source = HFCheckpoint.open(folder)
    moved = load_weights(source, source.model, local_model(model))
    return moved.nbytes, moved.sharded_nbytes


def measure_bytes(run: Run) -> None:
    """Count the bytes that each rank reads."""
    folder = checkpoint(run.work / "b1", SMALL if run.small else B1)
    total = 0
    for tp in (1, 2, 4, 8):
        layout = Layout(tp=tp)
        moved = ForkLauncher(tp).all(_bytes_rank, folder, layout)
        if tp == 1:
            source = HFCheckpoint.open(folder)
            plan = reshard_plan(source.model, Layout(tp=2))
            sharded = [param for param in plan.params if len(param.shards) > 1]
            total = sum(param.hf_nbytes * (len(param.mapping.layers) or 1) for param in sharded)
            print(
                "| TP1: bytes read by the rank; of the files "
                f"| {moved[0][0]:,}; {source.nbytes:,} |"
            )
            continue
        shares = sorted({nbytes for _, nbytes in moved})
        text = ", ".join(f"{share * tp / total:.6f}" for share in shares)
        print(
            f"| TP{tp}: bytes a rank reads of sharded tensors, x {tp} / total | {text} |",
            flush=True,
        )


def _export_rank(folder: Path, work: Path, repeats: int) -> dict[str, float]:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unfilled(bridge, Layout())
    bridge.load_hf_weights(model)
    copies = {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    copies = {name: tensor.clone() for name, tensor in copies.items()}
    torch.set_num_threads(1)

    def fresh(name: str) -> Path:
        for path in work.iterdir():
            shutil.rmtree(path)
        (work / name).mkdir() if name.startswith("save_file") else None
        return work / name

    def baseline(flush: bool) -> None:
        path = fresh("save_file") / "model.safetensors"
        started = time.perf_counter()
        save_file(copies, path, metadata={"format": "pt"})
        if flush:
            from exaone_bridge.checkpoint.staging import sync_to_disk

            sync_to_disk(path)
        seconds["save_file + fsync" if flush else "save_file"].append(time.perf_counter() - started)

    def planned(flush: bool) -> None:
        path = fresh("planned")
        with contextlib.ExitStack() as stack:
            if not flush:
                stack.enter_context(mock.patch.object(os, "fsync", return_value=None))
            started = time.perf_counter()
            bridge.save_hf_weights(model, path, show_progress=False)
            seconds["planned + fsync" if flush else "planned"].append(time.perf_counter() - started)

    seconds: dict[str, list[float]] = {
        name + flushed: [] for name in ("save_file", "planned") for flushed in ("", " + fsync")
    }
    for _ in range(repeats):
        for flush in (False, True):
            baseline(flush)
            planned(flush)
    return {name: min(values) for name, values in seconds.items()}


def measure_export(run: Run) -> None:
    """Measure the export of a model at one rank, and safetensors' own writer."""
    folder = checkpoint(run.work / "b1", SMALL if run.small else B1)
    work = run.work / "exports"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (found,) = ForkLauncher(1).all(_export_rank, folder, work, run.repeats)
    for flushed in ("", " + fsync"):
        plain, planned = found["save_file" + flushed], found["planned" + flushed]
        print(f"| export{flushed}, seconds: save_file, planned | {plain:.2f}, {planned:.2f} |")
        print(f"| planned{flushed} / save_file{flushed} (at most 1.3) | {ratio(planned, plain)} |")
    shutil.rmtree(work)
    sys.stdout.flush()


def measure_stream(run: Run) -> None:
    """Measure the memory of `import` and `export` above that of the process before."""
    shapes = {"2.6 GB": ("b1", B1), "16 GB": ("b32", B32)}
    if run.small:
        shapes = {"small": ("b1", SMALL)}
    for size, (name, config) in shapes.items():
        folder = checkpoint(run.work / name, config)
        source = HFCheckpoint.open(folder)
        largest = max(tensor.nbytes for tensor in source.tensors.values())
        megatron, exported = run.work / f"{name}-megatron", run.work / f"{name}-exported"
        for path in (megatron, exported):
            shutil.rmtree(path, ignore_errors=True)
        to = import_checkpoint(folder, megatron, Layout())
        back = export_checkpoint(megatron, exported)
        same = subprocess.run(
            ["diff", "-rq", folder, exported], capture_output=True, text=True, check=False
        ).stdout
        for what, done in (("import", to), ("export", back)):
            used, bound = done.peak_bytes - done.base_bytes, 512 * 2**20 + 2 * largest
            print(
                f"| {what}, {size}: {done.seconds:.1f} s, "
                f"{done.nbytes / 1e9 / done.seconds:.2f} GB/s; memory, bound |"
                f" {used / 2**20:.0f} MiB, {bound / 2**20:.0f} MiB |"
            )
        print(
            f"| {size}: files that differ after the round trip | {same.count(chr(10))} |",
            flush=True,
        )
        shutil.rmtree(megatron)
        shutil.rmtree(exported)


def prove_plan(source: HFCheckpoint) -> None:
    """Plan a load at TP2 x PP2 from the headers alone, and validate the plan."""
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    validate_plan(reshard_plan(source.model, Layout(tp=2, pp=2)), shapes)


def measure_linear(run: Run) -> None:
    """Measure seconds as a function of the number of tensors."""

    sizes = [(4, 8), (8, 16)] if run.small else [(10, 31), (20, 165), (40, 248), (60, 331)]
    print(
        "| tensors | plan and validation, TP2 x PP2 | inspect, with --json | import | export "
        "| microseconds per tensor, both |"
    )
    print("|---|---|---|---|---|---|")
    for layers, experts in sizes:
        folder = checkpoint(run.work / f"many-{layers}-{experts}", many(layers, experts))
        source = HFCheckpoint.open(folder)
        count = len(source.tensors)
        validate_plan = functools.partial(prove_plan, source)
        plan = least(run.repeats, {"": validate_plan})[""].wall
        command = [sys.executable, "-m", "exaone_bridge", "inspect", str(folder)]
        seen = least(
            run.repeats,
            {
                kind: functools.partial(
                    subprocess.run, [*command, kind], stdout=subprocess.DEVNULL, check=True
                )
                for kind in ("--tp=2", "--json")
            },
        )
        inspect = ", ".join(f"{each.wall:.2f} s ({each.cpu:.2f} of CPU)" for each in seen.values())
        megatron, exported = run.work / "many-megatron", run.work / "many-exported"
        to = back = math.inf
        for _ in range(1 if count > 20_000 else 2):
            for path in (megatron, exported):
                shutil.rmtree(path, ignore_errors=True)
            to = min(to, import_checkpoint(folder, megatron, Layout()).seconds)
            back = min(back, export_checkpoint(megatron, exported).seconds)
        each = f"{to / count * 1e6:.0f}, {back / count * 1e6:.0f}"
        print(
            f"| {count:,} | {plan:.3f} s | {inspect} | {to:.1f} s | {back:.1f} s | {each} |",
            flush=True,
        )
        for path in (megatron, exported):
            shutil.rmtree(path)


MEASURES = {
    "load": measure_load,
    "bytes": measure_bytes,
    "export": measure_export,
    "stream": measure_stream,
    "linear": measure_linear,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="a folder for checkpoints; those of earlier runs serve",
    )
    parser.add_argument("--only", choices=MEASURES, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--small", action="store_true", help="tiny models instead of published shapes"
    )
    options = parser.parse_args()
    import exaone_bridge

    exaone_bridge.supported()
    logging.disable(logging.WARNING)
    run = Run(
        options.work / ("small" if options.small else "published"), options.repeats, options.small
    )
    run.work.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"torch": torch.__version__, "repeats": run.repeats, "small": run.small}))
    for name in options.only or MEASURES:
        print(f"\n{MEASURES[name].__doc__}\n", flush=True)
        MEASURES[name](run)


if __name__ == "__main__":
    main()
