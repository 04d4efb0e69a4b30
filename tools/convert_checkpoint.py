"""Convert model checkpoints between Hugging Face folders and Megatron's torch_dist, and compare them.

    hf-to-megatron SRC DST   Hugging Face folder (bf16, fp32 or DeepSeek's FP8) to a torch_dist checkpoint that loads
                             under any parallel layout
    megatron-to-hf SRC DST   torch_dist checkpoint to a folder that transformers and vLLM load
    hf-to-hf SRC DST         another precision or other file sizes, e.g. FP8 to bf16
    verify A B               exit status 0 only if both hold the same model
    inspect PATH             what a folder holds

Exit status: 0 done (verify: equal), 1 not equal, 2 a fault, which is named with its remedy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from megatron_r1.errors import CheckpointError, ConfigError

    try:
        return options.run(options)
    except ConfigError as error:
        print("\n".join(error.faults), file=sys.stderr)
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; what is done is kept: go on with --resume", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, target in (("hf-to-megatron", "torch_dist"), ("megatron-to-hf", "hf"), ("hf-to-hf", "hf")):
        command = commands.add_parser(name)
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path, help="a folder that does not exist or is empty")
        command.add_argument(
            "--precision", choices=("keep", "bf16", "fp32", "fp8"), default="keep",
            help="of the written weights (keep: as stored; FP8 becomes bf16 on the way to Megatron)",
        )  # fmt: skip
        command.add_argument("--workers", type=int, default=2, help="processes, each with a buffer of 64 MiB or so")
        command.add_argument("--file-gb", type=float, default=2.0, help="largest safetensors file in GB")
        command.add_argument("--resume", action="store_true", help="go on with what an earlier try left")
        command.add_argument("--allow-nonfinite", action="store_true", help="write NaN and infinite weights too")
        command.set_defaults(run=_convert, to=target, source_kind="torch_dist" if name == "megatron-to-hf" else "hf")
    command = commands.add_parser("verify")
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    command.add_argument("--workers", type=int, default=2)
    command.add_argument("--names-only", action="store_true", help="names, shapes and dtypes, without reading numbers")
    command.add_argument(
        "--tolerance", type=float, default=0.0,
        help="accept another dtype, and differences up to this times a tensor's largest magnitude",
    )  # fmt: skip
    command.add_argument("--logits", action="store_true", help="also run a few tokens through both, one rank in fp32")
    command.add_argument("--text", default="The quick brown fox jumps over the lazy dog. 2 + 2 =", help="for --logits")
    command.set_defaults(run=_verify)
    command = commands.add_parser("inspect")
    command.add_argument("path", type=Path)
    command.set_defaults(run=_inspect)
    return parser


def _convert(options: argparse.Namespace) -> int:
    from megatron_r1.errors import CheckpointError
    from megatron_r1.weights.convert import ConvertOptions, convert, kind_of

    if options.source.is_dir() and kind_of(options.source) != options.source_kind:
        raise CheckpointError(f"{options.source}: is a {kind_of(options.source)} folder; choose the command for that")
    settings = ConvertOptions(
        target=options.to,
        precision=options.precision,
        workers=options.workers,
        file_bytes=int(options.file_gb * 1e9),
        resume=options.resume,
        allow_nonfinite=options.allow_nonfinite,
    )
    with _bar(f"{options.source.name} -> {options.target.name}") as progress:
        done = convert(options.source, options.target, settings, progress=progress)
    rate = done.source_bytes / max(done.seconds, 1e-9) / 1e9
    print(
        f"{options.target}: {done.tensors:,} tensors, {done.source_bytes / 1e9:.2f} GB read, "
        f"{done.written_bytes / 1e9:.2f} GB written in {done.seconds:.1f} s ({rate:.2f} GB/s); names, shapes and "
        "dtypes are checked"
    )
    for name in done.skipped:
        print(f"left out, every loader computes it: {name}")
    for name, count in done.nonfinite.items():
        print(f"NaN or infinite: {count:,} numbers of {name}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from megatron_r1.weights.verify import compare

    with _bar("comparing") as progress:
        result = compare(
            options.first,
            options.second,
            workers=options.workers,
            data=not options.names_only,
            tolerance=options.tolerance,
            progress=progress,
        )
    for difference in result.differences[:20]:
        worst = f", by up to {difference.worst:.3g}" if difference.worst else ""
        print(f"{difference.name}: {difference.what}{worst}")
    if len(result.differences) > 20:
        print(f"... and {len(result.differences) - 20} more")
    equal = result.equal
    what = "names, shapes and dtypes" if options.names_only else f"{result.num_bytes / 1e9:.2f} GB"
    print(f"{'equal' if equal else 'NOT equal'}: {result.compared:,} tensors compared, {what}")
    if options.logits and equal:
        from megatron_r1.policy.compare import compare_logits

        found = compare_logits(options.first, options.second, options.text)
        print(
            f"logits of {found.positions} positions: largest difference {found.worst:.3g}, likeliest token the same at "
            f"{found.same_likeliest}"
        )
        equal = found.same_likeliest == found.positions and found.worst <= max(1e-4, 100 * options.tolerance)
    return 0 if equal else 1


def _inspect(options: argparse.Namespace) -> int:
    from megatron_r1.weights.inspect import describe

    print(describe(options.path))
    return 0


@contextmanager
def _bar(title: str):
    """A bar with GB/s and the time left on a terminal; a line every ten seconds elsewhere."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, time.monotonic())
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console)
    task = bar.add_task(title, total=None)
    started = False

    def report(done: int, total: int) -> None:
        nonlocal started
        if not started:  # its thread starts after the worker processes have been forked
            bar.start()
            started = True
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        if started:
            bar.stop()


def _lines(title: str, start: float) -> Callable[[int, int], None]:
    import time

    last = start

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 10 or not done:
            return
        last = now
        left = (now - start) * (total - done) / done
        rate = done / (now - start) / 1e9
        print(
            f"{title}: {done / total:.0%} of {total / 1e9:.1f} GB, {rate:.2f} GB/s, {left:,.0f} s left", file=sys.stderr
        )

    return report


if __name__ == "__main__":
    sys.exit(main())
