"""The command line: parse, call, print. Only the commands that need torch or rich import them."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace

from exaone_bridge.cli.arguments import make_parser
from exaone_bridge.cli.options import find_models, layout_of
from exaone_bridge.errors import BridgeError, ParityFailure
from exaone_bridge.schema.hf_files import FOLLOW_LINKS

__all__ = ["main"]

PASSED, MISMATCH, INVALID_INPUT, INTERNAL_ERROR, INTERRUPTED = 0, 1, 2, 3, 130
_GRACE_SECONDS = 5


def main() -> None:
    """Run the command of `sys.argv` and exit.

    Exit codes: 0 passed, 1 mismatch, 2 invalid input, 3 internal error. torchrun itself exits with
    1 whichever nonzero code its ranks exit with.
    """
    try:
        _run(sys.argv[1:])
    except ParityFailure as error:
        _print_error(str(error), error)
        sys.exit(MISMATCH)
    except BridgeError as error:
        _print_error(f"exaone-bridge: {error}", error)
        from exaone_bridge.runtime.fork import RankFailure

        sys.exit(INTERNAL_ERROR if isinstance(error, RankFailure) else INVALID_INPUT)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(MISMATCH)
    except Exception as error:
        if os.environ.get("EXAONE_BRIDGE_TRACEBACK"):
            raise
        if isinstance(error, ModuleNotFoundError) and error.name:
            from exaone_bridge.cli.doctor import install_command, package_of

            name = package_of(error.name)
            remedy = f"run `{install_command(name)}`"
            _print_error(f"exaone-bridge: {name} is not installed; {remedy}.", error)
            sys.exit(INVALID_INPUT)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        _print_error(
            f"exaone-bridge: {text} (EXAONE_BRIDGE_TRACEBACK=1 prints the traceback).", error
        )
        sys.exit(INTERNAL_ERROR)
    sys.exit(PASSED)


def _print_error(text: str, error: Exception) -> None:
    """Print an error: rank 0 one that all ranks have met, any rank one of its own.

    The other ranks wait for rank 0 to print, because torchrun ends all ranks when one ends.
    """
    from exaone_bridge.runtime.launch import is_rank_zero
    from exaone_bridge.runtime.torchrun import is_local_to_rank

    if is_rank_zero() or is_local_to_rank(error):
        print(text, file=sys.stderr)
    else:
        time.sleep(_GRACE_SECONDS)


def _run(arguments: list[str]) -> None:
    parser = make_parser()
    if not arguments:
        parser.print_help()
        parser.exit(INVALID_INPUT)
    options = parser.parse_args(arguments)
    if getattr(options, "follow_links", False):
        os.environ[FOLLOW_LINKS] = "1"  # for every rank, and for what Megatron-Bridge calls
    find_models(options)
    _call(options)
    sys.stdout.flush()  # raises BrokenPipeError here, where main() catches it


def _call(options: Namespace) -> None:
    match options.command:
        case "demo":
            from exaone_bridge.cli.demo import demo

            demo(layout_of(options), options.backend)
        case "tiny":
            from exaone_bridge.cli.tiny import first_layers, random_model

            if options.source is not None:
                first_layers(options)
            else:
                random_model(options)
        case "inspect":
            from exaone_bridge.cli.inspect import inspect

            inspect(options.folder, layout_of(options), json=options.json)
        case "import":
            from exaone_bridge.cli.convert import import_

            import_(
                options.source,
                options.target,
                layout_of(options),
                backend=options.backend,
                workers=options.workers,
                dry_run=options.dry_run,
            )
        case "export":
            from exaone_bridge.cli.convert import export

            export(
                options.source,
                options.target,
                iteration=options.iteration,
                hf_source=options.hf_source,
                adapter=options.adapter,
                peft=options.peft,
                max_shard_size=options.max_shard_size,
                drop_passthrough=options.drop_passthrough,
                workers=options.workers,
                dry_run=options.dry_run,
            )
        case "train":
            from exaone_bridge.cli.train import train

            train(options)
        case "generate":
            from exaone_bridge.cli.generate import generate

            generate(options, layout_of(options))
        case "perplexity":
            from exaone_bridge.cli.perplexity import perplexity

            perplexity(options, layout_of(options))
        case "verify":
            from exaone_bridge.cli.verify import verify

            verify(options, layout_of(options))
        case "doctor":
            from exaone_bridge.cli.doctor import doctor

            doctor()
