"""Injects faults into one tiny model, and verifies it with the workflow of `verify`."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.errors import BridgeError
from exaone_bridge.models import FAMILIES
from exaone_bridge.runtime.launch import Launcher
from exaone_bridge.runtime.progress import Progress
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.verification.report.report import Check
from exaone_bridge.verification.self_test.fault import Fault, FolderFault, MegatronFault
from exaone_bridge.verification.self_test.outcome import Findings
from exaone_bridge.verification.workflow.options import VerifyOptions
from exaone_bridge.verification.workflow.run import Session, run
from exaone_bridge.verification.workflow.transformers import run_transformers

if TYPE_CHECKING:
    from exaone_bridge.modules.provider import ExactGPTModelProvider

__all__ = ["FaultInjector"]


class FaultInjector:
    """A tiny model that is verified again and again, with a fault each time.

    The reference run is made once and shared by all faults. The injector needs one rank of an
    initialised process group; without a GPU, inside `cpu_runtime`.

    Args:
        work: a folder for the tiny model and for faulty copies.
        model: the name of the tiny model.
        seed: the seed of its random weights and of the prompts.
    """

    def __init__(self, work: Path, model: str, seed: int = 0) -> None:
        configs = {name: config for family in FAMILIES for name, config in family.tiny.items()}
        self._folder, self._seed = work / f"{model}-{seed}", seed
        self._launcher = _ThisRank()
        write_random(self._folder, configs[model], seed=seed)

    def clean(self) -> Findings:
        """Verify the model without a fault."""
        return self._verify()

    def inject(self, fault: Fault) -> Findings:
        """Inject a fault, verify, and undo it.

        Returns:
            The findings; an error of `exaone_bridge.errors` is a check named `rejected` that fails.
        """
        if isinstance(fault, FolderFault):
            copy = self._folder.with_name("faulty")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self._folder, copy)
            fault.change(copy)
            return self._verify(copy, generation=fault.generation)
        assert isinstance(fault, MegatronFault)
        with fault.injected():
            try:
                return self._verify()
            except BridgeError as error:
                rejected = Check("rejected", type(error).__name__, False, str(error))
            if fault.site is None:
                return Findings((rejected,))
            # The model can be run, but config.json cannot express it.
            with _config_of_the_source():
                found = self._verify()
            return Findings((rejected, *found.checks), found.divergence)

    def _verify(self, other: Path | None = None, generation: bool = False) -> Findings:
        options = VerifyOptions(backend="torch", count=2, seed=self._seed, generation=generation)
        report = run(
            Session(source=self._folder, other=other, options=options, launcher=self._launcher)
        )
        return Findings(report.checks, report.divergence)


class _ThisRank(Launcher):
    """Runs functions on the calling rank, and the reference once for each workload."""

    def __init__(self) -> None:
        self._references: dict[bool, Any] = {}

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Do nothing: nothing was started."""

    def all[T](self, fn: Callable[..., T], *args: Any, progress: Progress | None = None) -> list[T]:
        """Run `fn` here."""
        return [fn(*args, **_keywords(progress))]

    def first[T](self, fn: Callable[..., T], *args: Any, progress: Progress | None = None) -> T:
        """Run `fn` here; return the former result if it is the reference run."""
        call: Callable[..., Any] = fn
        if call is not run_transformers:
            return fn(*args, **_keywords(progress))
        _, workload = args
        if workload.generate not in self._references:
            self._references[workload.generate] = fn(*args, **_keywords(progress))
        found: T = self._references[workload.generate]
        return found

    def subprocess[T](
        self, fn: Callable[..., T], *args: Any, progress: Progress | None = None
    ) -> T:
        """Run `fn` here."""
        return fn(*args, **_keywords(progress))

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """Make a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="exaone_bridge-") as path:
            yield Path(path)


def _keywords(progress: Progress | None) -> dict[str, Progress]:
    return {} if progress is None else {"progress": progress}


@contextlib.contextmanager
def _config_of_the_source() -> Iterator[None]:
    """Replace the config that a bridge derives from a model by that of the model's source."""
    from exaone_bridge.bridge.exact_bridge import ExactBridge

    def source_config(provider: ExactGPTModelProvider, source: JSONMapping | None) -> JSONObject:
        return dict(provider.hf_config if source is None else source)

    with mock.patch.object(ExactBridge, "config_json_of", staticmethod(source_config)):
        yield
