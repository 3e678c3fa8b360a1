"""The part of train_loop.py that runs on each rank.

    torchrun --nproc-per-node N benchmarks/loop_rank.py FOLDER ROW_NUMBER ...

The folder has session.json; rank 0 appends each result to results.jsonl. All rows run in the same
processes, because importing Megatron takes longer than measuring a row. A rank that a row has no
use for waits. A row that fails ends the processes, because other ranks may be inside of a
collective, unless its config is rejected, which all ranks see before they start.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch  # before transformer_engine: each brings another version of cuDNN
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

import exaone_bridge
from exaone_bridge.errors import BridgeError
from exaone_bridge.recipes import recipe

exaone_bridge.supported()

from emulated_ranks import start_emulated_world  # noqa: E402
from loop_rows import Row, model_of  # noqa: E402
from measures import config_of, matmul_rate, operations, truncate  # noqa: E402
from megatron.bridge.training.callbacks import Callback, CallbackContext  # noqa: E402
from megatron.bridge.training.config import apply_environment_variables  # noqa: E402
from megatron.bridge.training.mixed_precision import get_mixed_precision_config  # noqa: E402
from step_timer import StepTimer  # noqa: E402


def build_config(row: Row, folder: str | Path) -> Any:
    """Build the ConfigContainer of a row; models and data that it needs are written to the folder.

    Nothing is saved and nothing is validated during the run.
    """
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    arguments = dict(row.arguments)
    folder = Path(folder)
    if row.layers is not None:
        hf_path = folder / f"{model_of(row.recipe)}-{row.layers}-layers"
        hf_path.mkdir(parents=True, exist_ok=True)
        (hf_path / "config.json").write_text(json.dumps(truncate(model_of(row.recipe), row.layers)))
        arguments["hf_path"] = hf_path
    elif "pretrain" not in row.recipe and "hf_path" not in arguments:
        arguments |= _fine_tuning_data(row.recipe, folder)
    config = recipe(row.recipe)(gpus=row.gpus, **arguments)
    if row.layers is not None:
        config.checkpoint.pretrained_checkpoint = None  # the folder has no weights
    if row.emulate:
        config.dist.use_gloo_process_groups = False
    config.validation.eval_iters, config.validation.eval_interval = 0, 10**6
    config.logger.log_interval, config.logger.tensorboard_dir = 10**6, None
    config.checkpoint.save = config.checkpoint.load = None
    return process_config_with_overrides(config, cli_overrides=row.overrides)


def _fine_tuning_data(recipe_name: str, folder: Path) -> dict[str, Any]:
    """Write a model with random weights and a dataset of text, once, on rank 0."""
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    from data import make_once, write_random_model, write_text

    model = folder / model_of(recipe_name)
    return {
        "hf_path": make_once(model, lambda path: write_random_model(path, recipe_name)),
        "dataset_root": make_once(folder / "text", write_text),
    }


def describe(config: Any) -> str:
    """Return the model, the layout and the batch of a config in one line."""
    model, train = config.model, config.train
    precision = get_mixed_precision_config(config.mixed_precision)  # its name, before the run
    return (
        f"{model.num_layers} layers, hidden {model.hidden_size}; "
        f"TP{model.tensor_model_parallel_size} PP{model.pipeline_model_parallel_size} "
        f"EP{model.expert_model_parallel_size} CP{model.context_parallel_size}; "
        f"{model.seq_length} tokens, batch {train.micro_batch_size} / {train.global_batch_size}; "
        f"CUDA graphs: {model.cuda_graph_impl}; "
        f"{'FP8 ' + precision.fp8_recipe if precision.fp8 else 'bf16'}"
    )


@contextlib.contextmanager
def world(row: Row, number: int, store: Any) -> Iterator[None]:
    """Start the process groups of a row, and end them with all that Megatron keeps globally."""
    outer = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    rank = int(os.environ["RANK"])
    os.environ["WORLD_SIZE"] = str(row.gpus)
    try:
        if row.emulate:
            start_emulated_world(row.gpus)
        else:
            dist.init_process_group(
                "nccl",
                store=dist.PrefixStore(f"row {number}", store),
                rank=rank,
                world_size=row.gpus,
                device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])),
                timeout=timedelta(seconds=180),
            )
        yield
    finally:
        os.environ.update({name: value for name, value in outer.items() if value is not None})


def clean_up() -> None:
    """Release what a run leaves behind in the process: graphs, groups, the RNG's tracker."""
    from megatron.bridge.training.initialize import destroy_global_state
    from megatron.core import full_cuda_graph
    from megatron.core.tensor_parallel import random

    wrapper = full_cuda_graph.FullCudaGraphWrapper
    wrapper.cuda_graph = dict.fromkeys(("training", "validation"))
    wrapper.curr_iteration = dict.fromkeys(("training", "validation"), 0)
    full_cuda_graph.StaticBufferLoader.static_buffers = {"training": [], "validation": []}
    full_cuda_graph._shared_graph_pool = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False  # rows may want another tracker
    with contextlib.suppress(AssertionError, AttributeError):  # parts that have not been set up
        destroy_global_state()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.cuda.set_stream(torch.cuda.default_stream())
    gc.enable()
    gc.collect()
    torch.cuda.empty_cache()


def measure(row: Row, config: Any, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run a row on this rank; return its result, the same on all ranks."""
    from exaone_bridge.recipes.training_loop import run_training

    began = time.time()
    timer = StepTimer(settings["warm_up"], settings["steps"], settings["profile"])
    config.train.train_iters = config.scheduler.lr_decay_iters = timer.train_iters
    config.scheduler.lr_warmup_iters = 1
    rates = [matmul_rate()]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if config.model.cuda_graph_impl == "transformer_engine":
        # Megatron-Bridge does so where it starts the process group (`_initialize_distributed`).
        torch.cuda.set_stream(torch.cuda.Stream())
    marks: dict[str, float] = {}
    part: dict[str, Any] = {}

    class Ends(Callback):
        def on_train_step_end(self, context: CallbackContext) -> None:
            marks.setdefault("first", time.time())

        def on_train_end(self, context: CallbackContext) -> None:
            part["ms"] = timer.milliseconds()
            part["peak"] = torch.cuda.max_memory_allocated()
            part["losses"] = timer.losses()
            rates.append(matmul_rate())
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, part)
            part["all"] = gathered

    output = Path(tempfile.mkdtemp(dir=folder))
    run_training(config, output, callbacks=[timer, Ends()], quiet=True)
    shutil.rmtree(output)
    ranks, rate = part["all"], statistics.mean(rates)
    per_step = [max(step) for step in zip(*(each["ms"] for each in ranks), strict=True)]
    taken = statistics.median(per_step)
    tokens = config.model.seq_length * config.train.global_batch_size
    hf_config = config_of(config.model.hf_config)
    needed = operations(hf_config.get_text_config(), config.model.seq_length)
    needed *= config.train.global_batch_size / row.gpus
    losses = next((each["losses"] for each in reversed(ranks) if each["losses"]), [])
    result = {
        "config": describe(config),  # with what the run has changed
        "seq_length": config.model.seq_length,
        "device": torch.cuda.get_device_name(),
        "ms": round(taken, 1),
        "min_ms": round(min(per_step), 1),
        "max_ms": round(max(per_step), 1),
        "all_ms": [round(ms, 1) for ms in per_step],
        "tokens_per_s_per_gpu": round(tokens / taken * 1e3 / row.gpus),
        "matmul_tflops": round(rate / 1e12),
        "peak_gib": round(max(each["peak"] for each in ranks) / 2**30, 1),
        "first_step_s": round(marks["first"] - began, 1),
        "losses": losses,
    }
    if "pretrain" in row.recipe:  # frozen weights and packed samples need fewer operations
        result["of_matmul_rate"] = round(needed / (taken / 1e3) / rate, 3)
    return result | timer.kernels()


def run_rows(
    folder: Path,
    rows: dict[int, Row],
    settings: dict[str, Any],
    report: Callable[[dict[str, Any]], object],
) -> None:
    """Measure rows one after the other, as long as there is time for the longest so far.

    Args:
        folder: for models, data and logs.
        rows: by number.
        settings: warm_up, steps, profile, and the deadline in seconds since the epoch.
        report: is called on rank 0 with each result.
    """
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    # Before CUDA starts, which reads some of them; all rows here have the same.
    for row in rows.values():
        with contextlib.suppress(BridgeError):
            apply_environment_variables(build_config(row, folder))
            break
    torch.cuda.set_device(local)
    store, _, _ = next(rendezvous("env://"))
    store.set_timeout(timedelta(hours=1))
    longest = 30.0
    for number, row in rows.items():
        if rank == 0:
            has_time = time.time() + longest < settings["deadline"]
            store.set(f"{number} goes", "1" if has_time else "0")
        if store.get(f"{number} goes") == b"0":
            break
        begin = time.time()
        if rank < row.processes:
            result, failed, config = {"row": row.name, "gpus": row.gpus}, None, None
            result["emulate"] = row.emulate
            try:
                config = build_config(row, folder)
                with world(row, number, store):
                    result |= measure(row, config, folder, settings)
            except Exception as error:
                traceback.print_exc()
                failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                result["failed"] = failed
            if rank == 0:
                report(result)
            if failed and config is not None:
                sys.stdout.flush()
                os._exit(3)  # without waiting for collectives; the rest runs in new processes
            clean_up()
            if rank == 0:
                store.set(f"{number} done", "1")
        store.wait([f"{number} done"])
        longest = max(longest, time.time() - begin)


def main() -> None:
    folder, numbers = Path(sys.argv[1]), [int(number) for number in sys.argv[2:]]
    session = json.loads((folder / "session.json").read_text())
    rows = {number: Row(**session["rows"][number]) for number in numbers}

    def report(result: dict[str, Any]) -> None:
        with (folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")

    run_rows(folder, rows, session, report)


if __name__ == "__main__":
    main()
