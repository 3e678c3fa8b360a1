"""Measures steps of Megatron-Bridge's training loop, optimizer included, for recipes and layouts.

    python benchmarks/train_loop.py --table two-gpus                # docs/benchmarks.md lists them
    python benchmarks/train_loop.py --row "TP2: exaone4_1p2b_pretrain_config gpus=2 tp=2" \\
        --variant "graphs off: cuda_graphs=off" --variant "layers: cuda_graphs=layers"
    python benchmarks/train_loop.py --table two-gpus --dry-run        # builds the configs, no GPU

A row is "NAME: RECIPE SETTINGS". Settings are those of `exaone-bridge train`: NAME=VALUE for the
recipe and its plan, SECTION.FIELD=VALUE for Megatron-Bridge. Four more are the benchmark's own:

- gpus=N: the ranks of the row. Rows of different sizes share the same processes.
- layers=N: the first N layers of the published model.
- emulate=true: one process on one GPU runs rank 0 of `gpus`; collectives are copies on that GPU
  (emulated_ranks.py), so the time without waiting for other ranks remains.
- UPPER_CASE=VALUE: an environment variable. Rows with others, also those of the recipe's plan,
  run in other processes.

Each row is printed when it has been measured; what is left at --limit-s is named. The ratio is that
of tokens per second and GPU to the first row of the same model and sequence length on one GPU.
Fractions are of the bf16 8192^3 matmul rate, measured before and after each row on the same GPU.
With --profile one more step is traced: kernel time is the time in which any kernel runs, and
"exposed" is the part of it in which only NCCL's do. Under torchrun the rows run in its ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exaone_bridge.cli.train_settings import read_settings
from exaone_bridge.errors import BridgeError
from exaone_bridge.recipes import recipe as find_recipe
from exaone_bridge.recipes.training_plan import PlanOverrides
from exaone_bridge.recipes.training_plans import TRAINING_PLANS, training_plan

START_S = 20  # processes that would have less time than this are not started
RANK_SCRIPT = Path(__file__).with_name("loop_rank.py")

P12 = "exaone4_1p2b_pretrain_config micro_batch_size=1"
ERNIE = "ernie45_21b_a3b_pretrain_config micro_batch_size=1 seq_length=8192"
P32 = "exaone4_32b_pretrain_config pp=1 vpp=1 micro_batch_size=1"
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
        f"1.2B, 8192, TP2: {P12} gpus=2 tp=2 seq_length=8192 global_batch_size=4",
        f"1.2B, 8192, PP2: {P12} gpus=2 pp=2 seq_length=8192 global_batch_size=8",
        "1.2B, 4096: exaone4_1p2b_pretrain_config gpus=1 micro_batch_size=4 global_batch_size=4",
        "1.2B, 4096, DP2: exaone4_1p2b_pretrain_config gpus=2 micro_batch_size=4 "
        "global_batch_size=8",
        f"12 layers of the 1.2B, 32768: {P12} gpus=1 layers=12 seq_length=32768 "
        "global_batch_size=2",
        f"12 layers of the 1.2B, 32768, CP2: {P12} gpus=2 cp=2 layers=12 seq_length=32768 "
        "global_batch_size=2",
        f"4 layers of ERNIE 21B: {ERNIE} gpus=1 ep=1 layers=4 global_batch_size=4",
        f"4 layers of ERNIE 21B, EP2: {ERNIE} gpus=2 ep=2 layers=4 global_batch_size=8",
        f"1.2B, 32768, CP2: {P12} gpus=2 cp=2 seq_length=32768 global_batch_size=2",
        f"8 layers of the 32B, TP2: {P32} gpus=2 tp=2 layers=8 seq_length=8192 global_batch_size=4",
        f"6 layers of ERNIE 21B, EP2: {ERNIE} gpus=2 ep=2 layers=6 global_batch_size=8",
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
        f"3 layers of the 32B, FP8, current scaling: {P32} gpus=1 tp=1 layers=3 seq_length=8192 "
        "global_batch_size=4 mixed_precision=bf16_with_fp8_current_scaling_mixed",
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
    models = {model for model, _ in TRAINING_PLANS}
    return max((each for each in models if recipe_name.startswith(f"{each}_")), key=len)


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
    precision = [each for each in settings if each.startswith("mixed_precision=")]
    own = dict(each.split("=", 1) for each in settings if each.partition("=")[0] in _OWN)
    others = [*environment, *precision]
    plain = [each for each in settings if each not in others and each.partition("=")[0] not in _OWN]
    arguments, overrides = read_settings(find_recipe(recipe), plain)
    variables = _variables(recipe, arguments) | dict(each.split("=", 1) for each in environment)
    return Row(
        name=f"{name.strip()}, {suffix.strip()}" if suffix else name.strip(),
        recipe=recipe,
        gpus=int(own.get("gpus", 1)),
        arguments=arguments,
        overrides=overrides + precision,
        environment=variables,
        layers=int(own["layers"]) if "layers" in own else None,
        emulate=own.get("emulate") == "true",
    )


def _variables(recipe_name: str, arguments: dict[str, Any]) -> dict[str, str]:
    """Return the environment variables of the recipe's plan, which CUDA reads when it starts."""
    stages = {f"{model}_{stage}_config": (model, stage) for model, stage in TRAINING_PLANS}
    stage = stages[recipe_name.replace("_chat", "")]
    plan = training_plan(*stage, arguments.get("gpu_memory_gb", 80))
    fields = {
        key: value for key, value in arguments.items() if key in PlanOverrides.__annotations__
    }
    return {key: str(value) for key, value in plan.with_overrides(**fields).environment.items()}


COLUMNS = (
    "row", "GPUs", "step, ms", "min to max", "tokens/s per GPU", "of the matmul rate",
    "against one GPU", "kernels, ms", "exposed NCCL, ms", "step / kernels", "GiB", "first step, s",
)  # fmt: skip


def with_ratios(rows: list[Row], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each result its ratio to one GPU, and that of its step to its kernels."""
    base: dict[Any, float] = {}
    for row, result in zip(rows, results, strict=False):
        key = (*row.model, result.get("seq_length"))
        if row.gpus == 1 and "ms" in result:
            base.setdefault(key, result["tokens_per_s_per_gpu"])
        if "ms" in result and key in base:
            result["against_one_gpu"] = round(result["tokens_per_s_per_gpu"] / base[key], 3)
        if "ms" in result and result.get("kernel_ms"):
            result["wall_over_kernels"] = round(result["ms"] / result["kernel_ms"], 3)
    return results


def table_line(result: dict[str, Any]) -> str:
    """Return a result as a line of a Markdown table with `COLUMNS`."""
    gpus = f"1 of {result['gpus']}" if result.get("emulate") else result["gpus"]
    if "ms" not in result:
        cells = [result["row"], gpus, result["failed"], *["-"] * (len(COLUMNS) - 3)]
    else:
        cells = [
            result["row"], gpus, result["ms"], f"{result['min_ms']} to {result['max_ms']}",
            f"{result['tokens_per_s_per_gpu']:,}",
            *(result.get(key, "-") for key in ("of_matmul_rate", "against_one_gpu", "kernel_ms",
              "exposed_nccl_ms", "wall_over_kernels", "peak_gib", "first_step_s")),
        ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def print_table(results: list[dict[str, Any]]) -> None:
    """Print all results as one Markdown table."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for result in results:
        print(table_line(result))
    sys.stdout.flush()


def plan_of(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Return what the ranks need beside the rows; the deadline is in seconds since the epoch."""
    return {key: getattr(options, key) for key in ("warm_up", "steps", "profile")} | {
        "deadline": deadline
    }


class Session:
    """Runs rows in torchrun's processes, which end at a row that fails, until the time is over."""

    def __init__(self, folder: Path, rows: list[Row], options: argparse.Namespace) -> None:
        """Set up the session.

        Args:
            folder: for the rows, the results and the logs of the ranks.
            rows: what is measured.
            options: of the command line.
        """
        self.folder, self.rows = folder, rows
        self.deadline = time.time() + options.limit_s
        session = plan_of(options, self.deadline) | {"rows": [asdict(row) for row in rows]}
        (folder / "session.json").write_text(json.dumps(session))
        self.results: list[dict[str, Any]] = []

    def _read(self) -> None:
        """Read the results that the ranks have written, and print those that are new."""
        path = self.folder / "results.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        for line in lines[len(self.results) :]:
            self.results.append(json.loads(line))
            with_ratios(self.rows, self.results)
            print(table_line(self.results[-1]), flush=True)

    def _end(self, failed: str) -> None:
        """Note that the next row has no result."""
        row = self.rows[len(self.results)]
        result = {"row": row.name, "gpus": row.gpus, "emulate": row.emulate, "failed": failed}
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        self._read()

    def _group(self) -> list[int]:
        """Return the numbers of the next rows that can share processes."""
        first = len(self.results)
        numbers = [first]
        for number in range(first + 1, len(self.rows)):
            if self.rows[number].environment != self.rows[first].environment:
                break
            numbers.append(number)
        return numbers

    def command(self, numbers: list[int]) -> list[str]:
        """Return the command that runs rows in new processes."""
        ranks = max(self.rows[number].processes for number in numbers)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), str(RANK_SCRIPT), str(self.folder)]
        return [*command, *map(str, numbers)]

    def run(self) -> list[dict[str, Any]]:
        """Measure all rows for which there is time; return the results."""
        while len(self.results) < len(self.rows):
            if time.time() > self.deadline - START_S:
                self._end("no time left")
                continue
            numbers = self._group()
            environment = dict(os.environ) | self.rows[numbers[0]].environment
            with (self.folder / "torchrun.log").open("ab") as log:
                process = subprocess.Popen(
                    self.command(numbers),
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                try:
                    while process.poll() is None and time.time() < self.deadline:
                        time.sleep(0.2)
                        self._read()
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
            self._read()
            if process.returncode == 0 or time.time() >= self.deadline:
                while len(self.results) <= numbers[-1]:
                    self._end("no time left")
            elif len(self.results) == numbers[0]:
                self._end(f"the processes ended with {process.returncode}")
        return self.results


def under_torchrun(
    folder: Path, rows: list[Row], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure the rows in the ranks that torchrun has started; a row that fails ends them."""
    import loop_rank

    results: list[dict[str, Any]] = []

    def report(result: dict[str, Any]) -> None:
        results.append(result)
        with_ratios(rows, results)
        print(table_line(result), flush=True)

    deadline = time.time() + options.limit_s
    loop_rank.run_rows(folder, dict(enumerate(rows)), plan_of(options, deadline), report)
    return results


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", action="append", default=[], choices=TABLES, help="rows that are defined here")
    add("--row", action="append", default=[], metavar="ROW", help="'NAME: RECIPE SETTINGS'")
    add("--variant", action="append", default=[], help="'NAME: SETTINGS': each row with these too")
    add("--steps", type=int, default=8, help="steps that are measured")
    add("--warm-up", type=int, default=6, help="steps before them; graphs are captured after three")
    add("--profile", action="store_true", help="trace one more step: time of kernels")
    add("--limit-s", type=float, default=540, help="seconds after which nothing more is measured")
    add("--json", type=Path, help="file for the results")
    add("--work", type=Path, help="folder for logs and models; a temporary one by default")
    add("--dry-run", action="store_true", help="build the config of each row, and stop")
    return parser


def rows_of(options: argparse.Namespace) -> list[Row]:
    """Return the rows that the command line names: each one, and each variant of it.

    Rows with the same environment variables follow each other, because they share processes.
    """
    texts = [text for table in options.table for text in TABLES[table]] + options.row
    rows = [parse_row(text, variant) for text in texts for variant in options.variant or [""]]
    environments = [row.environment for row in rows]
    return sorted(rows, key=lambda row: environments.index(row.environment))


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    try:
        rows = rows_of(options)
    except (ValueError, BridgeError) as error:
        parser.error(str(error))
    if not rows:
        parser.error("name a --table or a --row")
    if options.dry_run:
        import loop_rank

        with tempfile.TemporaryDirectory() as folder:
            for row in rows:
                try:
                    text = loop_rank.describe(loop_rank.build_config(row, folder))
                except BridgeError as error:
                    text = f"rejected: {error}"
                print(f"{row.name}: {text}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if "RANK" in os.environ:
            results = under_torchrun(folder, rows, options)
        else:
            results = Session(folder, rows, options).run()
        if os.environ.get("RANK", "0") != "0":
            return
        print_table(results)
        failed = len(rows) > sum("ms" in result for result in results)
        log = folder / "torchrun.log"
        if failed and log.is_file():
            print(log.read_text(errors="replace")[-4000:])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
