"""The command line: settings are KEY=VALUE, errors are one message and exit code 2.

Heavy imports are inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from eval.errors import UserError
from eval.people import IN_LOG_ALONE, for_people
from eval.processes import is_main, joined

app = typer.Typer(
    help="Steer, filter, heal, stack: from two opposite personas to an ordinary LoRA adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="for example N=3 model=PATH heal.rank=8"),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="a folder in rounds/")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders in rounds/")]
RunsAndOut = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="folders in rounds/; out=PATH: where it is written"),
]


@app.command()
def round(
    settings: Settings = None,
    processes: Annotated[
        int, typer.Option(min=1, help="that share the work, each with the model: one a GPU")
    ] = 1,
    profile: Annotated[
        bool, typer.Option("--profile", help="tells what each stage took, as a table")
    ] = False,
) -> None:
    """Runs steer-heal rounds and draws the report; the same command again goes on."""
    with _working("the same command goes on from there"):
        from steer_heal.config import resolve_config
        from steer_heal.manifest import describe
        from steer_heal.trait import load_trait

        config = resolve_config(settings or [])
        describe(config, load_trait(config.trait, config.pos, config.neg))  # or refuses, at once
        if processes > 1:
            from steer_heal.apart import run_together

            raise typer.Exit(run_together(processes, [*(settings or []), *["--profile"] * profile]))
        with joined(config.device):
            from steer_heal.loop import run_rounds
            from steer_heal.manifest import run_path
            from steer_heal.report import write_report

            path = run_path(config)
            run_rounds(config, path, profile)
            write_report(path)


@app.command()
def report(runs: Runs) -> None:
    """Draws the report of a run again, from its files alone."""
    with _working("nothing was changed"):
        from steer_heal.report import write_report

        for path in runs:
            write_report(_run_folder(path))


@app.command(name="list")
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="rounds/ by default")] = Path(
        "rounds"
    ),
) -> None:
    """Lists the runs in a folder and below it: how far, how well, what state, how large."""
    with _working("nothing was changed"):
        from steer_heal.listing import list_runs as run_list

        typer.echo(run_list(folder, _width()))


@app.command()
def compare(runs: RunsAndOut) -> None:
    """Prints the paired differences between runs, with their intervals, and draws compare.html."""
    with _working("nothing was changed"):
        from steer_heal.compare import compare_runs
        from steer_heal.compare_page import PAGE_FILE, write_page

        paths, given = _runs_and_out(runs)
        comparison = compare_runs(paths)
        out = given or paths[0].resolve().parent / PAGE_FILE
        write_page(comparison, out)
        typer.echo(f"{comparison.text}\n\npage: {out}")


@app.command()
def judge(
    runs: Runs,
    samples: Annotated[int, typer.Option(min=1, help="replies to each held-out prompt")] = 24,
) -> None:
    """Asks a run's best model and the persona prompt for many more replies, and compares them."""
    with _working("nothing was changed"):
        from steer_heal.judge import judge as run_judge

        found = run_judge([_run_folder(path) for path in runs], samples)
        typer.echo("\n".join(map(str, found)))


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="what is not there yet")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE...",
            help="round=best or a number; as=adapter, merged, vector or gguf-vector; rank=64",
        ),
    ] = None,
) -> None:
    """Writes a run's rounds, up to the best one, as one adapter that is proved to load."""
    with _working("nothing was written"):
        from steer_heal.export import export as write_export

        typer.echo(write_export(_run_folder(run), out, settings or []))


@app.command(name="eval")
def evaluate(
    subject: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="organism, a folder, a Hub id, or a run")
    ],
    settings: Settings = None,
) -> None:
    """Asks a suite of a model or a run: suite=NAME think=64 items=A.jsonl,B.jsonl."""
    with _working("the same command goes on from there"):
        from steer_heal.examine import examine

        typer.echo(examine(subject, settings or []))


@app.command()
def chat(run: Run, settings: Settings = None) -> None:
    """Opens a local page where base, prompted, steered and healed model answer side by side."""
    with _working("nothing was changed"):
        from steer_heal.chat_server import serve

        serve(_run_folder(run), settings or [])


@app.command()
def bench(settings: Settings = None, seeds: int = 3) -> None:
    """N=3 rounds on each of several seeds, from nothing; prints the table of what was reached."""
    with _working("the seeds that were done stay in rounds/bench"):
        from steer_heal.bench import bench as run_bench

        typer.echo(run_bench(Path("rounds/bench"), range(seeds), settings or []))


@app.command()
def pictures(runs: RunsAndOut) -> None:
    """Draws pictures for README: drift.png, screenshots in images/; needs a Chromium (out=docs)."""
    with _working("what was drawn stays"):
        paths, out = _runs_and_out(runs)
        from steer_heal.pictures import draw_pictures

        draw_pictures(paths, out or Path("docs"))


@app.command()
def study(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="without one the studies are listed")
    ] = None,
    settings: Settings = None,
) -> None:
    """Runs variants of a run on several seeds (seeds=3); prints a table of what each came to."""
    with _working("the same command goes on from there"):
        from steer_heal.studies import describe_studies, load_study

        if name is None:
            typer.echo(describe_studies())
            return
        chosen = load_study(name)
        from steer_heal.study import run_study

        typer.echo(run_study(chosen, settings or []))


@app.command()
def lint(
    trait: Annotated[str, typer.Argument(metavar="TRAIT", help="a shipped trait, or a .toml file")],
    settings: Settings = None,
) -> None:
    """Says what a trait lacks or gets wrong, with model=... also of that model; a fault exits 1."""
    with _working("nothing was changed"):
        from steer_heal.lint import lint as run_lint

        found = run_lint(trait, settings or [])
        typer.echo(found)
    if found.has_fault:
        raise typer.Exit(1)


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="organism, a folder, or a hub id")],
    settings: Settings = None,
) -> None:
    """Checks, in seconds, what a run needs of a model, one line a check; a failed one exits 1."""
    with _working("nothing was changed"):
        from steer_heal.doctor import doctor as run_doctor

        found = run_doctor(model, settings or [])
        typer.echo(found)
    if found.failed:
        raise typer.Exit(1)


@app.command()
def settings() -> None:
    """Lists every setting with its meaning and default."""
    from steer_heal.config import describe_settings

    typer.echo(describe_settings())


def main() -> None:
    """Entry point of the console script."""
    app()


@contextmanager
def _working(if_stopped: str) -> Iterator[None]:
    """What every command does for people, and its log lines, above the progress bars."""
    from loguru import logger
    from tqdm import tqdm

    logger.remove()
    line = "{time:HH:mm:ss} {level: <7} {message}"
    if is_main():
        logger.add(
            lambda text: tqdm.write(text, file=sys.stderr, end=""),
            format=line,
            colorize=False,
            filter=lambda record: IN_LOG_ALONE not in record["extra"],
        )
    with for_people(if_stopped):
        yield


def _width() -> int | None:
    """Columns of the terminal, or as COLUMNS says; None where the output is no terminal."""
    is_known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return shutil.get_terminal_size().columns if is_known else None


def _runs_and_out(words: list[str]) -> tuple[list[Path], Path | None]:
    """The runs that are named, at least one, and the path of out=PATH."""
    paths = [_run_folder(Path(word)) for word in words if not word.startswith("out=")]
    given = [Path(word.removeprefix("out=")) for word in words if word.startswith("out=")]
    if len(given) > 1:
        raise UserError("out is given twice")
    if not paths:
        raise UserError("no run is named; `just list` names those that there are")
    return paths, given[0] if given else None


def _run_folder(path: Path) -> Path:
    folder = path if path.exists() else Path("rounds") / path
    if not folder.is_dir():
        raise UserError(f"no run {path}: there is no such folder, here or in rounds/")
    return folder
