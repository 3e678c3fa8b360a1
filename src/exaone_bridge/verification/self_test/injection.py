"""Injects faults into one tiny model, and verifies the result as `verify` does."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from functools import cached_property
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
from exaone_bridge.verification.checks.digests import digest_folder
from exaone_bridge.verification.checks.folders import (
    compare_configs,
    compare_digests,
    compare_files,
)
from exaone_bridge.verification.checks.generation import Generated, compare_generation, generate
from exaone_bridge.verification.report.report import Check
from exaone_bridge.verification.self_test.fault import (
    CodeFault,
    Fault,
    FolderFault,
    ProviderFault,
    WeightFault,
)
from exaone_bridge.verification.self_test.outcome import Findings
from exaone_bridge.verification.workflow.options import VerifyOptions
from exaone_bridge.verification.workflow.run import compare_arithmetic
from exaone_bridge.verification.workflow.transformers import ReferenceResult
from exaone_bridge.verification.workflow.workload import make_workload

__all__ = ["FaultInjector"]


class FaultInjector:
    """A tiny model, its reference run in Transformers, and a Megatron-Core model without a fault.

    The reference run and the Megatron-Core model are made once and shared by all faults. The
    injector needs one rank of an initialised process group; without a GPU, inside `cpu_runtime`.

    Args:
        work: a folder for the tiny model, for exports and for faulty copies.
        model: the name of the tiny model.
        seed: the seed of its random weights and of the prompts.
    """

    def __init__(self, work: Path, model: str, seed: int = 0) -> None:
        from megatron.bridge import AutoBridge

        from exaone_bridge.verification.workflow.transformers import capture_transformers, load

        configs = {name: config for family in FAMILIES for name, config in family.tiny.items()}
        self.folder = work / f"{model}-{seed}"
        write_random(self.folder, configs[model], seed=seed)
        self.source = HFCheckpoint.open(self.folder)
        options = VerifyOptions(backend="torch", count=2, seed=seed)
        self.workload = make_workload(self.source, Layout(), options)
        self.hf_model = load(self.folder, torch.float32)
        self.reference = ReferenceResult(
            [
                capture_transformers(self.hf_model, self.workload.points, batch)
                for batch in self.workload.batches
            ]
        )
        self.digests = digest_folder(self.folder)
        self.bridge = AutoBridge.from_hf_pretrained(self.folder)

    @cached_property
    def clean_model(self) -> list[Any]:
        """The chunks of a Megatron-Core model without a fault."""
        return self._build()

    @cached_property
    def generated(self) -> dict[str, Generated]:
        """The greedy generation of the reference."""
        return generate(self.hf_model, self.folder, self.workload.plain_prompt)

    def clean(self) -> Findings:
        """Verify the model without a fault."""
        return self._verify(self.clean_model)

    def inject(self, fault: Fault) -> Findings:
        """Inject a fault, verify, and undo it.

        Returns:
            The findings; an error of `exaone_bridge.errors` is a check named `rejected` that fails.
        """
        try:
            match fault:
                case FolderFault():
                    return self._verify_folder(fault)
                case WeightFault():
                    with _restored(self.clean_model), torch.no_grad():
                        fault.change(self.clean_model)
                        return self._verify(self.clean_model)
                case ProviderFault():
                    return self._verify(self._build(**fault.fields))
                case CodeFault():
                    with fault.patch():
                        return self._verify(self._build())
                case _:
                    raise TypeError(f"{type(fault).__name__} is not a kind of fault")
        except BridgeError as error:
            return Findings((_rejected(error),))

    def _build(self, **fields: Any) -> list[Any]:
        from exaone_bridge.runtime.model import build

        return build(self.bridge, Layout(), backend="torch", **fields)

    def _verify(self, model: list[Any]) -> Findings:
        """Export a Megatron-Core model and compare the folders; run it and compare activations."""
        from exaone_bridge.bridge.exact_bridge import hf_config_dict
        from exaone_bridge.verification.workflow.megatron import capture_megatron

        checks: list[Check] = []
        with _empty(self.folder.with_name("exported")) as target:
            try:
                self.bridge.save_hf_pretrained(model, target, show_progress=False)
                checks.append(compare_digests(self.digests, digest_folder(target)))
                checks.append(compare_files(self.folder, target))
                config = self.bridge._model_bridge.megatron_to_hf_config(model[0].config)
                expected = hf_config_dict(self.bridge.hf_pretrained.config)
                checks.append(compare_configs(expected, config))
            except BridgeError as error:
                checks.append(_rejected(error))
        return self._compare_activations(
            checks,
            [
                capture_megatron(model, self.workload.points, batch)
                for batch in self.workload.batches
            ],
        )

    def _verify_folder(self, fault: FolderFault) -> Findings:
        """Compare a faulty copy of the folder with the original, on disk and in Transformers."""
        from exaone_bridge.verification.workflow.transformers import capture_transformers, load

        with _empty(self.folder.with_name("faulty")) as folder:
            shutil.copytree(self.folder, folder)
            fault.change(folder)
            checks = [
                compare_digests(self.digests, digest_folder(folder)),
                compare_configs(self.source.config, read_json(folder / "config.json")),
                compare_files(self.folder, folder),
            ]
            try:
                HFCheckpoint.open(folder)
            except BridgeError as error:
                checks.append(Check("logits", "the model cannot be run", False, str(error)))
                return Findings(tuple(checks))
            model = load(folder, torch.float32)
            if fault.generation:
                generated = generate(model, folder, self.workload.plain_prompt)
                checks.append(compare_generation(self.generated, generated))
            runs = [
                capture_transformers(model, self.workload.points, batch, perturb=False)
                for batch in self.workload.batches
            ]
            return self._compare_activations(checks, runs)

    def _compare_activations(self, checks: list[Check], runs: list[Activations]) -> Findings:
        found = compare_arithmetic(
            self.reference, runs, None, self.source.model_config, self.workload
        )
        return Findings((*checks, *found.checks), found.divergence)


def _rejected(error: BridgeError) -> Check:
    return Check("rejected", type(error).__name__, False, str(error))


@contextlib.contextmanager
def _empty(folder: Path) -> Iterator[Path]:
    """Yield a folder that does not exist, and remove it afterwards."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _restored(model: list[Any]) -> Iterator[None]:
    """Restore all parameters and buffers of these chunks afterwards."""
    tensors = [each for chunk in model for each in (*chunk.parameters(), *chunk.buffers())]
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
