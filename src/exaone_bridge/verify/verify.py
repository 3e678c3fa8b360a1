"""Verifies one model: its round trip through Megatron-Core, and its logits there against Transformers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.checkpoint.convert import drain, shards_like
from exaone_bridge.checkpoint.headers import read_json
from exaone_bridge.checkpoint.source import HFSource, check_layout, open_source
from exaone_bridge.checkpoint.writer import write_hf_folder
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.parts.layout import Layout
from exaone_bridge.verify.digests import digest_folder
from exaone_bridge.verify.folders import compare_configs, compare_digests, compare_files
from exaone_bridge.verify.gradients import compare_gradients, gradients_of_megatron, gradients_of_transformers
from exaone_bridge.verify.greedy import Generated, compare_generated, generate
from exaone_bridge.verify.launch import run_alone, run_world, work_folder
from exaone_bridge.verify.locate import locate
from exaone_bridge.verify.logits import compare_half_precision, compare_logits, places_of, prompts
from exaone_bridge.verify.points import Point, points_of
from exaone_bridge.verify.report import Report, versions
from exaone_bridge.verify.summary import model_summary
from exaone_bridge.verify.traces import Traced

__all__ = ["DTYPES", "Job", "batches_of", "prompt_length", "verify"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OnEvent = Callable[[int, Any], None] | None

_LONGEST = 512  # positions of a prompt that a laptop computes in a minute
_LARGE = 2e8  # parameters from which on a laptop computes 64
_WORDS = 24  # of the prompt that needs no tokenizer


def prompt_length(windows: tuple[int | None, ...], original: int | None = None, longest: int = _LONGEST) -> int:
    """Long enough that the window's edge is met at many positions, and the length that RoPE was made for is passed,
    where that is affordable; else 64.

    Args:
        windows: keys that a query of each layer sees; None: all.
        original: positions before RoPE was scaled.
        longest: what is affordable.
    """
    window = max((window for window in windows if window is not None), default=0)
    wanted = [4 * window + 9 if window else 0, original + 33 if original else 0]
    return max((length for length in wanted if 0 < length <= longest), default=64)


def batches_of(source: HFSource, count: int, length: int | None, seed: int) -> list[torch.Tensor]:
    """Prompts, a batch for each length: long ones, and short ones that never meet the edge of a window."""
    facts = source.facts
    if length is not None:
        return [prompts(facts.vocab_size, count, length, seed)]
    longest = _LONGEST if source.parameters < _LARGE else 64
    if torch.cuda.is_available():
        longest = 16 * _LONGEST + 64
    long = prompt_length(facts.windows, _original_positions(source.config), min(longest, facts.max_positions))
    short = min([7, *(window for window in facts.windows if window is not None)])
    return [prompts(facts.vocab_size, count, long, seed), prompts(facts.vocab_size, 2, short, seed + 1)]


def _original_positions(config: Mapping[str, Any]) -> int | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original = rope.get("original_max_position_embeddings") if isinstance(rope, Mapping) else None
    return original if isinstance(original, int) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be run, on both sides.

    Attributes:
        batches: prompts [N, S], a batch for each length.
        dtype: of the arithmetic of ours, and of a second run of Transformers where it is not fp32.
        generate: also greedy generation.
        gradient_tokens: [N, S + 1], or None.
    """

    batches: Sequence[torch.Tensor]
    points: tuple[Point, ...]
    layout: Layout
    backend: str
    dtype: str = "float32"
    generate: bool = False
    gradient_tokens: torch.Tensor | None = None

    @property
    def words(self) -> list[int]:
        """The prompt that needs no tokenizer."""
        return self.batches[0][0, :_WORDS].tolist()


@dataclass(slots=True)
class Theirs:
    """What Transformers made of a job."""

    runs: list[Traced]
    half: list[Traced] | None = None
    generated: dict[str, Generated] | None = None
    gradients: Any = None


def run_theirs(folder: Path, job: Job) -> Theirs:
    """On one rank: Transformers' fp32 run of every prompt, and what else the job asks for."""
    from exaone_bridge.host.world import emit
    from exaone_bridge.verify.reference import load, run_reference

    emit("Transformers' logits")
    model = load(folder, torch.float32)
    found = Theirs([run_reference(model, job.points, tokens) for tokens in job.batches])
    if job.generate:
        emit("Transformers' greedy generation")
        found.generated = generate(model, folder, job.words)
    if job.gradient_tokens is not None:
        emit("Transformers' gradients")
        found.gradients = gradients_of_transformers(model, job.gradient_tokens)
    if job.dtype != "float32":
        emit(f"Transformers' logits in {job.dtype}")
        model = load(folder, DTYPES[job.dtype])
        found.half = [run_reference(model, job.points, tokens, nudged=False) for tokens in job.batches]
    return found


def run_generation(folder: Path, job: Job) -> dict[str, Generated]:
    """On one rank: greedy generation from another folder."""
    from exaone_bridge.verify.reference import load

    return generate(load(folder, torch.float32), folder, job.words)


@dataclass(slots=True)
class Ours:
    """What one rank of Megatron-Core made of a job."""

    config: dict[str, Any]
    runs: list[Traced]
    gradients: Any = None


def run_megatron(source: Path, megatron: Path | None, target: Path | None, files: Mapping[str, str], job: Job) -> Ours:
    """On a rank: load, export to `target`, run every prompt.

    Args:
        source: a Hugging Face folder.
        megatron: a Megatron checkpoint of the same model: weights come from it.
        target: an empty folder; None: no export.
        files: tensor -> file in it.
    """
    from megatron.bridge import AutoBridge

    from exaone_bridge.host.bridge_base import config_mapping
    from exaone_bridge.host.model import build, load_megatron
    from exaone_bridge.host.world import emit
    from exaone_bridge.verify.ours import run_ours

    bridge = AutoBridge.from_hf_pretrained(source)
    source_config = config_mapping(bridge.hf_pretrained.config)
    dtype = DTYPES[job.dtype]
    if megatron is None:
        emit("HF -> Megatron-Core")
        model = build(bridge, job.layout, backend=job.backend)
    else:
        emit("loading the Megatron checkpoint")
        model = load_megatron(bridge, megatron, job.layout, backend=job.backend)
    if target is not None:
        emit("Megatron-Core -> HF")
        weights = bridge.export_hf_weights(model, cpu=True, show_progress=False)
        config = bridge._model_bridge.megatron_to_hf_config(model[0].config)
        drain(weights, lambda stream: write_hf_folder(target, stream, files, config, source))
    if next(model[0].parameters()).dtype != dtype:
        del model  # its bits are known to be the source's by now, or the check of tensors says otherwise
        model = build(bridge, job.layout, dtype=dtype, backend=job.backend)
    emit("Megatron-Core's logits")
    found = Ours(source_config, [run_ours(model, job.points, tokens) for tokens in job.batches])
    if job.gradient_tokens is not None:
        emit("Megatron-Core's gradients")
        found.gradients = gradients_of_megatron(source, job.layout, job.backend, job.gradient_tokens)
    return found


def arithmetic(theirs: Theirs, ours: Sequence[Traced], gradients: Any, source: HFSource, job: Job) -> dict[str, Any]:
    """The report's fields that compare arithmetic: checks, places, location."""
    half = job.dtype != "float32"
    places = places_of(job.points, theirs.runs, ours, source.facts, theirs.half)
    if half:
        assert theirs.half is not None
        check = compare_half_precision(theirs.runs, theirs.half, ours, job.dtype)
    else:
        check = compare_logits(theirs.runs, ours, places)
    location = locate(places) if not check.holds or not half else None
    if location is not None:  # also where a place parts and the logits do not show it
        check = dataclasses.replace(check, holds=False, where=str(location))
    checks = [check]
    if job.gradient_tokens is not None:
        positions = job.gradient_tokens.shape[0] * (job.gradient_tokens.shape[1] - 1)
        checks.append(compare_gradients(theirs.gradients, gradients, source.facts, positions))
    return {"checks": checks, "places": places, "location": location}


def check_backend(name: str) -> None:
    """Refuse an unknown backend before half a minute of Transformers.

    Raises:
        UnsupportedConfig: see `resolve_backend`.
    """
    from exaone_bridge.parts.backend import resolve_backend

    resolve_backend(name)


def make_job(
    source: HFSource,
    layout: Layout,
    *,
    backend: str,
    dtype: str,
    count: int,
    length: int | None,
    seed: int,
    generation: bool,
    gradients: bool,
) -> Job:
    """A job whose prompts fit the model."""
    if dtype not in DTYPES:
        raise UnsupportedConfig("--dtype", got=dtype, known=tuple(DTYPES), where="verify")
    tokens = None
    if gradients:
        positions = min(48 * layout.tp, source.facts.max_positions // layout.tp * layout.tp)
        tokens = prompts(source.facts.vocab_size, max(2, layout.pp), positions + 1, seed + 2)
        if isinstance(pad := source.config.get("pad_token_id"), int):
            tokens[tokens == pad] = 1 if pad == 0 else 0  # Transformers gives the padding word's embedding no gradient
    return Job(
        batches=batches_of(source, count, length, seed),
        points=points_of(source.rows),
        layout=layout,
        backend=backend,
        dtype=dtype,
        generate=generation,
        gradient_tokens=tokens,
    )


def verify(
    source_folder: Path,
    layout: Layout,
    *,
    megatron: Path | None = None,
    backend: str = "auto",
    dtype: str = "float32",
    count: int = 3,
    length: int | None = None,
    seed: int = 0,
    generation: bool = False,
    gradients: bool = False,
    on_event: OnEvent = None,
) -> Report:
    """Check that a model survives Megatron-Core: what lies on disk after a round trip, and what it computes there.

    Args:
        source_folder: a Hugging Face folder.
        layout: ranks are processes on this machine, or torchrun's.
        megatron: a Megatron checkpoint of the same model, whose weights are to be looked at.
        dtype: of the arithmetic: float32, bfloat16 or float16.
        count, length, seed: of the prompts; length None: past the window and RoPE's own length where affordable.
        generation: also compare greedy generation before and after.
        gradients: also compare the gradients of one step, in fp32.
        on_event: called with (rank, stage) while it works.

    Raises:
        BridgeError: bad input; see `open_source`.
    """
    from exaone_bridge.host.registration import supported

    started = time.perf_counter()
    source_folder = source_folder.resolve()
    source = open_source(source_folder)
    check_layout(source.facts, layout)
    job = make_job(
        source,
        layout,
        backend=backend,
        dtype=dtype,
        count=count,
        length=length,
        seed=seed,
        generation=generation,
        gradients=gradients,
    )
    supported()
    check_backend(backend)
    theirs = run_alone(run_theirs, source_folder, job, on_event=on_event)
    before = digest_folder(source_folder)
    with work_folder() as work:
        target = work / source_folder.name
        target.mkdir(exist_ok=True)
        arguments = (source_folder, megatron, target, shards_like(source), job)
        results = run_world(run_megatron, layout.ranks, *arguments, on_event=on_event)
        checks = [
            compare_digests(before, digest_folder(target)),
            compare_configs(results[0].config, read_json(target / "config.json")),
            compare_files(source_folder, target),
        ]
        if generation:
            if on_event is not None:
                on_event(0, "generation after the round trip")
            after = run_alone(run_generation, target, job)
            checks.append(compare_generated(theirs.generated or {}, after))
    from exaone_bridge.verify.ours import merge

    ours = [merge([result.runs[number] for result in results]) for number in range(len(job.batches))]
    found = arithmetic(theirs, ours, results[0].gradients, source, job)
    return Report(
        source=source_folder.name,
        layout=str(layout),
        checks=(*checks, *found["checks"]),
        backend=backend,
        dtype=dtype,
        model=model_summary(source),
        places=found["places"],
        location=found["location"],
        tensors={name: digest.as_json() for name, digest in before.items()},
        setup={"prompts": [list(tokens.shape) for tokens in job.batches], "seed": seed},
        versions=versions(),
        seconds=time.perf_counter() - started,
    )
