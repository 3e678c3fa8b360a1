"""EXAONE and ERNIE models for Megatron-Bridge: exact conversion Hugging Face <-> Megatron-Core.

    >>> import exaone_bridge                       # registers the models
    >>> from megatron.bridge import AutoBridge
    >>> bridge = AutoBridge.from_hf_pretrained("LGAI-EXAONE/EXAONE-4.0-1.2B")
    >>> provider = bridge.to_megatron_provider()

The import itself is fast and loads neither torch nor Megatron. It installs import hooks: they
register the model bridges and apply the patches (docs/dev/patches.md) when Megatron-Bridge is
imported, at once if it has been, and make it importable where Transformer Engine is missing. It
also hides messages about missing GPU packages; EXAONE_BRIDGE_SHOW_WARNINGS=1 shows them. Where the
user has no passwd entry and no home, as in some containers, it sets USER and HOME for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exaone_bridge import errors
from exaone_bridge.bridge.registration import register, register_when_imported, supported
from exaone_bridge.errors import BridgeError
from exaone_bridge.patches.environment import provide_user_and_home
from exaone_bridge.patches.import_guard import transformer_engine_placeholder
from exaone_bridge.patches.known_messages import hide_known_messages

if TYPE_CHECKING:  # an editor and mypy see these; `__getattr__` imports them when they are used
    from exaone_bridge import recipes
    from exaone_bridge.bridge.ernie45 import Ernie45Bridge
    from exaone_bridge.bridge.exaone4 import Exaone4Bridge
    from exaone_bridge.bridge.exaone45 import Exaone45Bridge
    from exaone_bridge.bridge.exaone_moe import ExaoneMoeBridge
    from exaone_bridge.bridge.peft_loading import lora_from_peft
    from exaone_bridge.checkpoint.hf.tiny import write_random
    from exaone_bridge.checkpoint.inspection import Inspection
    from exaone_bridge.convert.inspection import MegatronInspection, inspect
    from exaone_bridge.convert.progress import Summary
    from exaone_bridge.convert.to_hf import export_checkpoint
    from exaone_bridge.convert.to_megatron import import_checkpoint
    from exaone_bridge.runtime.cpu import cpu_runtime
    from exaone_bridge.schema.parallel_layout import Layout
    from exaone_bridge.verification import verify
    from exaone_bridge.verification.report.report import Report

__version__ = "0.1.0"
__all__ = [
    "BridgeError",
    "Ernie45Bridge",
    "Exaone4Bridge",
    "Exaone45Bridge",
    "ExaoneMoeBridge",
    "Inspection",
    "Layout",
    "MegatronInspection",
    "Report",
    "Summary",
    "__version__",
    "cpu_runtime",
    "errors",
    "export_checkpoint",
    "import_checkpoint",
    "inspect",
    "lora_from_peft",
    "recipes",
    "register",
    "supported",
    "verify",
    "write_random",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used; the import of the package stays fast."""
    match name:
        case "recipes":
            import exaone_bridge.recipes as module

            return module
        case "Inspection":
            from exaone_bridge.checkpoint import inspection

            return inspection.Inspection
        case "MegatronInspection" | "inspect":
            from exaone_bridge.convert import inspection as inspections

            return getattr(inspections, name)
        case "Layout":
            from exaone_bridge.schema import parallel_layout

            return parallel_layout.Layout
        case "verify":
            from exaone_bridge import verification

            return verification.verify
        case "write_random":
            from exaone_bridge.checkpoint.hf import tiny

            return tiny.write_random
        case "Report":
            from exaone_bridge.verification.report import report

            return report.Report
        case "Summary":
            from exaone_bridge.convert import progress

            return progress.Summary
        case "cpu_runtime":
            from exaone_bridge.runtime import cpu

            return cpu.cpu_runtime
        case "import_checkpoint":
            from exaone_bridge.convert import to_megatron

            return to_megatron.import_checkpoint
        case "export_checkpoint":
            from exaone_bridge.convert import to_hf

            return to_hf.export_checkpoint
        case "lora_from_peft":
            from exaone_bridge.bridge import peft_loading

            return peft_loading.lora_from_peft
        case "Ernie45Bridge" | "Exaone4Bridge" | "Exaone45Bridge" | "ExaoneMoeBridge":
            # Megatron-Bridge comes first: the hook of its import imports the bridge classes.
            return {bridge.__name__: bridge for bridge in supported().values()}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, also those that have not been imported yet."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


provide_user_and_home()
hide_known_messages()
transformer_engine_placeholder.apply()
register_when_imported()
