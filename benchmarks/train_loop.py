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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loop_rows import TABLES, Row, rows_of

from exaone_bridge.errors import BridgeError

START_S = 20  # processes that would have less time than this are not started
RANK_SCRIPT = Path(__file__).with_name("loop_rank.py")

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


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    try:
        rows = rows_of(options.table, options.row, options.variant)
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
