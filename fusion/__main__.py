"""The command line: `python -m flashfuse explain module:callable [--json]`.

The callable takes no arguments and returns what to look at: `(model, args)` or `(model, args, kwargs)`, where args is a
tuple or list; or `(model, tensor)` for a model of one input.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class UsageError(Exception):
    """Something about the command line that its user can put right."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for a mistake in the arguments."""
    arguments = _parser().parse_args(argv)
    sys.path.insert(0, "")  # as `python -m` does for the current folder; the `flashfuse` script does not
    try:
        model, args, kwargs = _load(arguments.target)
    except UsageError as error:
        print(f"flashfuse: {error}", file=sys.stderr)
        return 2
    from flashfuse.explanation import explain

    report = explain(model)(*args, **kwargs)
    print(report.to_json() if arguments.json else report.to_text())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flashfuse", description="Look at what flashfuse does with a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("explain", help="report the attention found in a model, and what was left alone")
    command.add_argument(
        "target",
        metavar="module:callable",
        help="a function without arguments that returns (model, args) or (model, args, kwargs)",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _load(target: str) -> Call:
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise UsageError(f"expected module:callable, got {target!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise
        raise UsageError(f"no module named {error.name!r}; run from the folder that holds it") from error
    factory = getattr(module, name, None)
    if factory is None:
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UsageError(f"module {module_name!r} has no {name!r}; it has {', '.join(names) or 'no callables'}")
    if not callable(factory):
        raise UsageError(f"{target} is a {type(factory).__name__}, not a callable")
    return _call(target, factory())


def _call(target: str, returned: Any) -> Call:
    wanted = "(model, args) or (model, args, kwargs)"
    if not isinstance(returned, (tuple, list)) or len(returned) not in (2, 3):
        raise UsageError(f"{target} returned {_shape(returned)}, expected {wanted}")
    model, args, *rest = returned
    kwargs = rest[0] if rest else {}
    if not callable(model):
        raise UsageError(f"{target} returned a {type(model).__name__} first, expected a model; {wanted}")
    if isinstance(args, dict) and not rest:
        args, kwargs = (), args
    if not isinstance(kwargs, dict):
        raise UsageError(f"{target} returned a {type(kwargs).__name__} third, expected a dict of keyword arguments")
    return model, tuple(args) if isinstance(args, (tuple, list)) else (args,), kwargs


def _shape(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"


if __name__ == "__main__":
    sys.exit(main())
