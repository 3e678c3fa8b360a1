"""The command line: parse, call, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
import time

from exaone_bridge.cli.plain import inspect_arguments
from exaone_bridge.errors import BridgeError, ParityFailure

__all__ = ["main"]

PASSED, FAILED, BAD_INPUT, BROKEN = 0, 1, 2, 3
_GRACE = 5  # seconds


def main() -> None:
    """Run the command; exit code 0: it holds, 1: it differs, 2: bad input, 3: something of ours broke.

    torchrun's own exit code is 1 whichever of its ranks' is not 0.
    """
    try:
        _run(sys.argv[1:])
    except ParityFailure as error:
        _say(str(error), error)
        sys.exit(FAILED)
    except BridgeError as error:
        _say(f"exaone-bridge: {error}", error)
        from exaone_bridge.runtime.fork import RankFailure

        sys.exit(BROKEN if isinstance(error, RankFailure) else BAD_INPUT)
    except Exception as error:
        if os.environ.get("EXAONE_BRIDGE_TRACEBACK"):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        _say(f"exaone-bridge: {text} (EXAONE_BRIDGE_TRACEBACK=1 shows where).", error)
        sys.exit(BROKEN)


def _say(text: str, error: Exception) -> None:
    """Print an error: rank 0 one that all ranks have met, any rank one of its own.

    The other ranks wait for rank 0 to print, because torchrun ends all ranks when one ends.
    """
    from exaone_bridge.runtime.launch import is_rank_zero
    from exaone_bridge.runtime.torchrun import is_local_to_rank

    if is_rank_zero() or is_local_to_rank(error):
        print(text, file=sys.stderr)
    else:
        time.sleep(_GRACE)


def _run(arguments: list[str]) -> None:
    asked = inspect_arguments(arguments)
    if asked is None:
        from exaone_bridge.cli.app import app

        app()
        return
    from exaone_bridge.cli.inspect import inspect

    try:
        inspect(asked.folder, asked.layout, as_json=asked.as_json)
    except BrokenPipeError:  # whoever read it has seen enough; this and the next as typer does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(PASSED)
