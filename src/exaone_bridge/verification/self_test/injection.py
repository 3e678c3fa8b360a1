"""One miniature in which faults are planted: Transformers' reference and a clean Megatron-Core model, made once."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.errors import BridgeError
from exaone_bridge.models import FAMILIES
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.activations.capture import Activations
from exaone_bridge.verification.checks.digests import Digest, digest_folder, digest_stream
from exaone_bridge.verification.checks.folders import (
    compare_configs,
    compare_digests,
    compare_files,
)
from exaone_bridge.verification.checks.generation import Generated, compare_generation, generate
from exaone_bridge.verification.report.report import Check, Divergence
from exaone_bridge.verification.self_test.fault import Fault
from exaone_bridge.verification.self_test.upstream_criteria import UpstreamVerdict, upstream_verdict
from exaone_bridge.verification.workflow.job import (
    ReferenceResult,
    VerifyOptions,
    Workload,
    make_workload,
)
from exaone_bridge.verification.workflow.verify import arithmetic

__all__ = ["Bench", "Verdicts"]

Verdicts = tuple[list[Check], Divergence | None, UpstreamVerdict]


class Bench:
    """One miniature: its folder, Transformers' reference, and a clean Megatron-Core model.

    Args:
        work: an empty folder.
        name: of the miniature.
    """

    def __init__(self, work: Path, name: str, seed: int = 0) -> None:
        from megatron.bridge import AutoBridge

        from exaone_bridge.verification.workflow.transformers import capture_transformers, load

        self.folder = work / f"{name}-{seed}"
        write_random(self.folder, _tiny_configs()[name], seed=seed)
        self.source: HFCheckpoint = HFCheckpoint.open(self.folder)
        self.job: Workload = make_workload(
            self.source, Layout(), VerifyOptions(backend="torch", count=2, seed=seed)
        )
        self.host_run = (
            len(self.job.batches) - 1 if any(self.job.images) else 0
        )  # the prompts the host is asked about
        self.hf = load(self.folder, torch.float32)
        self.theirs = ReferenceResult(
            [capture_transformers(self.hf, self.job.points, *batch) for batch in self.job.runs()]
        )
        self.digests = digest_folder(self.folder)
        self.bridge = AutoBridge.from_hf_pretrained(self.folder)
        self.weights = _weights_of(self.folder)
        self.generated: dict[str, Generated] | None = None
        self._clean: list[Any] | None = None

    @property
    def clean(self) -> list[Any]:
        """A model without faults, built once."""
        if self._clean is None:
            self._clean = self.build()
        return self._clean

    def build(self, **provider: Any) -> list[Any]:
        """A Megatron-Core model with these fields of the provider."""
        from exaone_bridge.runtime.model import build

        return build(self.bridge, Layout(), backend="torch", **provider)

    def look(self, model: list[Any]) -> Verdicts:
        """Round trip and arithmetic of a loaded model."""
        from exaone_bridge.bridge.exact_bridge import config_mapping
        from exaone_bridge.verification.workflow.megatron import capture_megatron

        checks: list[Check] = []
        weights: dict[str, torch.Tensor] = {}
        try:
            stream = self.bridge.export_hf_weights(model, cpu=True, show_progress=False)
            weights = {name: tensor.clone() for name, tensor in stream}
            config = self.bridge._model_bridge.megatron_to_hf_config(model[0].config)
            checks.append(compare_configs(config_mapping(self.bridge.hf_pretrained.config), config))
        except BridgeError as error:
            checks.append(_refused(error))
        after: Mapping[str, Digest] = digest_stream(weights.items())
        if weights:
            checks.append(compare_digests(self.digests, after))
        runs = [capture_megatron(model, self.job.points, *batch) for batch in self.job.runs()]
        found = arithmetic(self.theirs, runs, None, self.source, self.job)
        upstream = self._host(runs[self.host_run].logits, weights)
        return [*checks, *found.checks], found.divergence, upstream

    def look_at_folder(self, folder: Path, generation: bool) -> Verdicts:
        """Another folder against this one, by Transformers."""
        from exaone_bridge.verification.workflow.transformers import capture_transformers, load

        checks = [
            compare_digests(self.digests, digest_folder(folder)),
            compare_configs(self.source.config, read_json(folder / "config.json")),
            compare_files(self.folder, folder),
        ]
        weights = _weights_of(folder)
        try:
            HFCheckpoint.open(folder)
        except BridgeError as error:
            checks.append(Check("logits", "the other model cannot be run", False, str(error)))
            return checks, None, self._host(self._anyway(folder), weights)
        model = load(folder, torch.float32)
        runs: Sequence[Activations] = [
            capture_transformers(model, self.job.points, *batch, perturbed=False)
            for batch in self.job.runs()
        ]
        found = arithmetic(self.theirs, runs, None, self.source, self.job)
        checks += found.checks
        if generation:
            if self.generated is None:
                self.generated = generate(self.hf, self.folder, self.job.plain_prompt)
            checks.append(
                compare_generation(self.generated, generate(model, folder, self.job.plain_prompt))
            )
        upstream = self._host(runs[self.host_run].logits, weights)
        return checks, found.divergence, upstream

    def _host(
        self, logits: torch.Tensor | None, weights: Mapping[str, torch.Tensor]
    ) -> UpstreamVerdict:
        """What the host's criteria say of these logits, and of what was exported."""
        return upstream_verdict(
            self.theirs.runs[self.host_run].logits, logits, self.weights, weights
        )

    def _anyway(self, folder: Path) -> torch.Tensor | None:
        """Logits of a folder that we refuse, where Transformers loads it in spite of everything."""
        from exaone_bridge.verification.workflow.transformers import capture_transformers, load

        try:
            other = capture_transformers(
                load(folder, torch.float32), (), *self.job.runs()[self.host_run], perturbed=False
            )
        except Exception:  # whatever Transformers thinks of a broken folder
            return None
        return other.logits

    def plant(self, fault: Fault) -> Verdicts:
        """Plant one fault and look; what refuses the model is a check that does not hold."""
        location: Divergence | None = None
        try:
            if fault.folder is not None:
                copy = self.folder.with_name("faulty")
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(self.folder, copy)
                fault.folder(copy)
                checks, location, upstream = self.look_at_folder(copy, fault.generation)
            elif fault.weights is not None:
                with _put_back(self.clean), torch.no_grad():
                    fault.weights(self.clean)
                    checks, location, upstream = self.look(self.clean)
            else:
                with (fault.code or contextlib.nullcontext)():
                    checks, location, upstream = self.look(self.build(**fault.provider))
        except BridgeError as error:
            checks, upstream = [_refused(error)], UpstreamVerdict.nothing()
        return checks, location, upstream


def _refused(error: BridgeError) -> Check:
    return Check("refused", type(error).__name__, False, str(error))


def _tiny_configs() -> dict[str, Any]:
    return {name: config for family in FAMILIES for name, config in family.tiny.items()}


def _weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@contextlib.contextmanager
def _put_back(model: list[Any]) -> Any:
    """Undo what the body does to parameters and buffers."""
    held = [*model[0].parameters(), *model[0].buffers()]
    kept = [tensor.detach().clone() for tensor in held]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(held, kept, strict=True):
                tensor.copy_(value)
