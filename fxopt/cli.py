"""The command ``fxopt``: demo, doctor, plan, inspect, tune, evaluate, bench."""

from __future__ import annotations

import sys

COMMANDS = {
    "demo": "Compile a model, generate text, and print what was rewritten and what it was worth.",
    "doctor": "Look for what keeps fxopt from being reached or from being fast, and say what to write.",
    "plan": "What would be rewritten, on fake tensors: no weights, no GPU, nothing compiled.",
    "inspect": "Look at what was compiled: summary, why, diff, kernels, numerics, repro, explain.",
    "tune": "Calibrate or choose settings on a text, and write a recipe.",
    "evaluate": "Quality and speed of settings on a text.",
    "bench": "Measure against the strongest peers, on this machine.",
}


def main() -> None:
    """Entry point of the console script."""
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit(_without_typer(sys.argv[1:]))
    from fxopt.commands import app

    app()


def _without_typer(arguments: list[str]) -> int:
    print("Usage: fxopt COMMAND [OPTIONS]\n")
    for name, text in COMMANDS.items():
        print(f"  {name:<9} {text}")
    print("\nThe commands need the inspect extra: pip install 'fxopt[inspect]'")
    return 0 if not arguments or arguments[0] in ("--help", "-h") else 2
