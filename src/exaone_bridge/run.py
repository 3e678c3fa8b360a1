"""`python -m exaone_bridge.run SCRIPT ARGS...` runs a Megatron-Bridge script with our bridges.

    python -m exaone_bridge.run convert.py --hf-model LGAI-EXAONE/EXAONE-4.0-1.2B
    torchrun --nproc-per-node 8 -m exaone_bridge.run pretrain.py --recipe ...
    python -m exaone_bridge.run -m PACKAGE.MODULE ARGS...

The script is not changed. It runs as `__main__` in this process, with the arguments and the import
path that Python itself would give it; its exceptions and its exit code are the process's. Importing
`exaone_bridge` in the script has the same effect.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import runpy
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import exaone_bridge  # noqa: F401  registers as soon as the script imports megatron.bridge

__all__ = ["main"]

_USAGE = "usage: python -m exaone_bridge.run [-m MODULE | SCRIPT] ARGS..."


def _exit_with(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def _exists(module: str) -> bool:
    """Return whether Python finds this module or package."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # no such parent package, or not a module name
        return False


def main() -> None:
    """Run the script or module that the arguments name, as Python would.

    Raises:
        SystemExit: 2 if there is no such script or module, or the script's own.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{_USAGE}\n\n{__doc__}")
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "-m":
        if len(arguments) == 1:
            _exit_with(f"exaone_bridge.run: -m names no module; {_USAGE}.")
        module = arguments[1]
        if not _exists(module):
            _exit_with(
                f"exaone_bridge.run: there is no module {module!r} on the import path; "
                "check its name."
            )
        sys.argv = arguments[1:]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    script = Path(arguments[0])
    file = script / "__main__.py" if script.is_dir() else script
    if not file.is_file():
        _exit_with(
            f"exaone_bridge.run: there is no script {str(script)!r}; "
            "name a Python file, or a module after -m."
        )
    sys.argv = arguments
    if not sys.flags.safe_path:  # with it, Python adds nothing to the import path
        sys.path[0] = str(script.absolute() if script.is_dir() else script.resolve().parent)
    inside = ["__main__.py"] if script.is_dir() else []
    _execute(os.path.join(os.getcwd(), arguments[0], *inside))  # noqa: PTH109, PTH118


def _execute(file: str) -> None:
    """Run a file as `__main__`, which it stays until the process ends, for atexit and pickle.

    runpy would put the file's absolute name into `sys.argv`, or a relative one into `__file__`;
    Python does neither.
    """
    loader = SourceFileLoader("__main__", file)
    module = ModuleType("__main__")
    module.__file__, module.__loader__, module.__builtins__ = file, loader, builtins  # type: ignore[attr-defined]
    code = loader.source_to_code(loader.get_data(file), file)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


if __name__ == "__main__":
    main()
