"""Convert model checkpoints between Hugging Face folders and Megatron's torch_dist, and compare them.

    hf-to-megatron SRC DST   Hugging Face folder (bf16, fp32 or DeepSeek's FP8) to a torch_dist checkpoint that loads
                             under any parallel layout
    megatron-to-hf SRC DST   torch_dist checkpoint to a folder that transformers and vLLM load
    hf-to-hf SRC DST         another precision or other file sizes, e.g. FP8 to bf16
    verify A B               exit status 0 only if both hold the same model
    inspect PATH             what a folder holds

Exit status: 0 done (verify: equal), 1 not equal, 2 a fault, which is named with its remedy, or stopped.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from megatron_r1.errors import ConfigError, UserError

    try:
        with _terminated_as_interrupted():
            return options.run(options)
    except ConfigError as error:
        _say("\n".join(error.faults), sys.stderr)
    except (UserError, OSError) as error:
        _say(str(error), sys.stderr)
    except KeyboardInterrupt:
        _say(options.stopped, sys.stderr)
    except Exception:  # 1 would mean "not equal"
        traceback.print_exc()
        _say("this is a fault of the tool; please report it with the lines above", sys.stderr)
    return 2


@contextmanager
def _terminated_as_interrupted():
    """SIGTERM (a batch system's, or kill's) ends the work in order, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set a handler
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str, file: TextIO | None = None) -> None:
    """Print lines. What is not printable in them (names come from strangers' files) is escaped."""
    for line in text.split("\n"):
        print("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line), file=file)


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
            help="of the written weights (keep: as stored; FP8 becomes bf16 on the way to Megatron, and is rounded to "
            "bf16 on the way to fp32)",
        )  # fmt: skip
        command.add_argument("--workers", type=_count, default=2, help="processes, each of about 150 MB of memory")
        if target == "hf":
            command.add_argument(
                "--scale-format", choices=("auto", "float32", "ue8m0"), default="auto",
                help="of scales that --precision fp8 makes: ue8m0 are powers of two, as DeepSeek-V3.1's (auto: as the "
                "source's config.json says)",
            )  # fmt: skip
            command.add_argument("--file-gb", type=_gigabytes, default=2.0, help="largest safetensors file in GB")
        command.add_argument("--resume", action="store_true", help="go on with what an earlier try left")
        command.add_argument(
            "--no-sync", action="store_true",
            help="do not wait for the disk, as cp does not: faster, but a power cut soon after may leave damage that "
            "only verify finds",
        )  # fmt: skip
        command.add_argument("--allow-nonfinite", action="store_true", help="write NaN and infinite weights too")
        command.set_defaults(
            run=_convert, to=target, source_kind="torch_dist" if name == "megatron-to-hf" else "hf",
            stopped="stopped; what is done is kept: repeat the command with --resume",
        )  # fmt: skip
    command = commands.add_parser("verify")
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    command.add_argument("--workers", type=_count, default=2)
    command.add_argument("--names-only", action="store_true", help="names, shapes and dtypes, without reading numbers")
    command.add_argument(
        "--tolerance", type=_tolerance, default=0.0,
        help="accept another dtype, and differences up to this times a tensor's largest magnitude",
    )  # fmt: skip
    command.add_argument("--logits", action="store_true", help="also run a few tokens through both, one rank in fp32")
    command.add_argument("--text", default="The quick brown fox jumps over the lazy dog. 2 + 2 =", help="for --logits")
    command.set_defaults(run=_verify, stopped="stopped; begin again when you like: nothing was written")
    command = commands.add_parser("inspect")
    command.add_argument("path", type=Path)
    command.set_defaults(run=_inspect, stopped="stopped")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _gigabytes(text: str) -> float:
    value = float(text)
    if not 1e-9 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and finite")
    return value


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or above, and finite")
    return value


def _convert(options: argparse.Namespace) -> int:
    from megatron_r1.config.model_folder import mtp_left_out
    from megatron_r1.weights.convert import convert
    from megatron_r1.weights.folders import check_kind
    from megatron_r1.weights.plan import ConvertOptions

    check_kind(options.source, options.source_kind)
    settings = ConvertOptions(
        target=options.to,
        precision=options.precision,
        workers=options.workers,
        resume=options.resume,
        allow_nonfinite=options.allow_nonfinite,
        sync=not options.no_sync,
    )
    if options.to == "hf":
        settings = replace(settings, file_bytes=int(options.file_gb * 1e9), scale_format=options.scale_format)
    with _bar(f"{options.source.name} -> {options.target.name}") as progress:
        done = convert(options.source, options.target, settings, progress=progress)
    rate = done.source_bytes / max(done.seconds, 1e-9) / 1e9
    _say(
        f"{options.target}: {done.tensors:,} tensors, {done.source_bytes / 1e9:.2f} GB read, "
        f"{done.written_bytes / 1e9:.2f} GB written in {done.seconds:.1f} s ({rate:.2f} GB/s); names, shapes and "
        "dtypes are checked"
    )
    if left_out := mtp_left_out(options.source):
        _say(left_out)
    for name in done.skipped:
        _say(f"left out, every loader computes it: {name}")
    for name, count in done.nonfinite.items():
        _say(f"NaN or infinite: {count:,} numbers of {name}")
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
        _say(f"{difference.name}: {difference.what}{worst}")
    if len(result.differences) > 20:
        _say(f"... and {len(result.differences) - 20} more")
    equal = result.equal
    what = "names, shapes and dtypes" if options.names_only else f"{result.num_bytes / 1e9:.2f} GB"
    _say(f"{'equal' if equal else 'NOT equal'}: {result.compared:,} tensors compared, {what}")
    if options.logits and equal:
        from megatron_r1.policy.compare import compare_logits

        found = compare_logits(options.first, options.second, options.text)
        _say(
            f"logits of {found.positions} positions: largest difference {found.worst:.3g}, likeliest token the same at "
            f"{found.same_likeliest}"
        )
        limit = max(1e-4, 100 * options.tolerance) * found.largest
        equal = found.same_likeliest == found.positions and found.worst <= limit
    return 0 if equal else 1


def _inspect(options: argparse.Namespace) -> int:
    from megatron_r1.weights.inspect import describe

    _say(describe(options.path))
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
