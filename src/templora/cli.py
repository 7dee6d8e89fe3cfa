"""The command line: one app, a command a module. Nothing here imports torch before it must."""

import os
import sys
from logging import ERROR, getLogger
from math import ceil
from pathlib import Path
from typing import Annotated

import typer

from templora import __version__
from templora.commands import bench, read, score, sessions, translate, write

SPINS = "3000"  # some 10 µs awake first; costs a twentieth to an eighth where no other program runs
FEW_CORES = 4
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")

app = typer.Typer(
    name="templora",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(help=write.HELP)(write.write)
app.command(help=read.HELP)(read.read)
app.command(help=score.HELP)(score.score)
app.command(help=translate.HELP)(translate.translate)
app.add_typer(sessions.app, name="sessions")
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Unlimited memory for one text: a temporary adapter learns what is written, as it is written."""
    if version:
        typer.echo(f"templora {__version__}")
        raise typer.Exit


def main() -> None:
    """The `templora` command."""
    _open_streams()
    if os.environ.get("COLUMNS") == "0":  # a terminal that does not know its width: Rich would print nothing
        del os.environ["COLUMNS"]
    _share_machine()
    # The bars of libraries that read files; they look at it when they are imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Of a kernel for 4 bits that it does without, where it is imported, whoever wants 4 bits or not.
    getLogger("bitsandbytes").setLevel(ERROR)
    app(prog_name="templora")


def _share_machine() -> None:
    """Have no more threads than there are cores, and on few let them wait asleep; before torch is imported.

    By themselves they wait awake, for milliseconds: where any other program keeps a single core busy, all of
    them wait for the one that shares it, at each step, and everything takes three to fifteen times as long.
    To wake many takes longer than to wake one, so where there are more cores it stays as it is.
    """
    shown = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    cores = min(shown, _quota(CPU_MAX) or shown)
    if cores < shown:  # torch looks at what is shown, and would have as many threads
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    if cores <= FEW_CORES and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _quota(file: Path) -> int | None:
    """How many cores a container may use, of all that it is shown; None without a limit."""
    try:
        used, of = file.read_text("ascii").split()
        return max(1, ceil(int(used) / int(of)))
    except (OSError, ValueError):  # there is none, or it says "max"
        return None


def _open_streams() -> None:
    """Give the program those of its three streams that it was started without.

    Else the next file that is opened, perhaps a text, is where others print to.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free is that one
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
