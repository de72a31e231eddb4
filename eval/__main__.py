"""`python -m eval MODEL suite=NAME think=64 ...`: what a model answers to a suite."""

from __future__ import annotations

from typing import Annotated

import typer

from eval.people import for_people


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder or a Hub id")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...")] = None,
) -> None:
    """Asks a suite of a model; the same command again goes on where it stopped."""
    with for_people("the same command goes on from there"):
        from eval.command import evaluate_model

        typer.echo(evaluate_model(model, settings or []))


if __name__ == "__main__":
    typer.run(main)
