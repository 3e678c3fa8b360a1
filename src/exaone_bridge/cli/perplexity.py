"""The command `perplexity`: Megatron-Core's perplexity of a text, beside that of Transformers."""

from __future__ import annotations

import dataclasses
import functools
from argparse import Namespace

from exaone_bridge.cli.generate import read_dtype
from exaone_bridge.cli.model_files import model_files
from exaone_bridge.cli.outputs import check_outputs, write_json
from exaone_bridge.cli.show import say, stages, table
from exaone_bridge.errors import ParityFailure, UnsupportedConfig
from exaone_bridge.runtime.launch import choose_launcher, is_rank_zero
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["perplexity"]

TOLERANCE = 1e-4  # nats per token, in fp32


def perplexity(options: Namespace, layout: Layout) -> None:
    """Compute the perplexity of a text; the options are those that `cli.arguments` defines.

    Raises:
        UnsupportedConfig: a dtype of a Megatron checkpoint, or a text shorter than one window.
        ParityFailure: in fp32, Megatron-Core's loss is not that of Transformers.
        BridgeError: the model cannot be loaded.
    """
    dtype = read_dtype(options.dtype)
    check_outputs([options.json])
    with (
        stages("perplexity", shown=is_rank_zero() and not options.json) as progress,
        choose_launcher(layout.ranks) as launcher,
        model_files(options.source, launcher, dtype=options.dtype) as (folder, megatron),
    ):
        if options.transformers and megatron is not None:
            wanted = "a Hugging Face folder, which `export` makes"
            raise UnsupportedConfig(
                "--transformers", got=str(options.source), wanted=wanted, where="command line"
            )
        progress.stage("importing Megatron-Core (half a minute)")
        from exaone_bridge.runtime.perplexity import megatron_perplexity, transformers_perplexity

        work = functools.partial(
            megatron_perplexity,
            folder,
            megatron,
            options.text,
            options.length,
            layout,
            backend=options.backend,
            dtype=dtype,
        )
        found = {"Megatron-Core": launcher.all(work, progress=progress)[0]}
        if options.transformers or (options.transformers is None and megatron is None):
            reference = functools.partial(
                transformers_perplexity, folder, options.text, options.length, dtype=dtype
            )
            found["Transformers"] = launcher.first(reference, progress=progress)
    losses = [each.loss for each in found.values()]
    difference = abs(losses[0] - losses[-1])
    if is_rank_zero() and options.json is not None:
        results = {name: dataclasses.asdict(each) for name, each in found.items()}
        write_json(results | {"difference": difference}, options.json, indent=None)
    elif is_rank_zero():
        table(
            f"{options.text}, {next(iter(found.values())).tokens:,} tokens in windows of "
            f"{options.length}, {layout}",
            ["model", "perplexity", "nats per token", "tokens/s"],
            [
                [
                    name,
                    f"{each.perplexity:.6g}",
                    f"{each.loss:.6f}",
                    f"{each.tokens_per_second:,.0f}",
                ]
                for name, each in found.items()
            ],
        )
        if len(found) > 1:
            say(f"The difference is {difference:.1e} nats per token.")
    if options.dtype == "float32" and difference > TOLERANCE:
        raise ParityFailure(
            f"the losses differ by {difference:.1e} nats per token, and {TOLERANCE:.0e} is allowed "
            "in fp32; `exaone-bridge verify` finds the first layer that differs"
        )
