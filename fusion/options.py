"""The options of `torch.compile(..., backend="flashfuse", options={...})`.

Keys that start with "flashfuse." are read here; every other key is Inductor's, and reaches Inductor unchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "flashfuse."

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "inner": ("inductor", "aot_eager", "eager"),
    "verify": (False, True),
    "strict": (False, True),
    "route": ("auto", "never", "always"),
}


@dataclass(frozen=True)
class Options:
    """What one `torch.compile` call asked for.

    inner: who compiles the graph once attention is rewritten: "inductor", "aot_eager" or "eager".
    verify: run the original graph beside the compiled one at the first call and raise on a mismatch.
    strict: raise flashfuse's own failures instead of compiling the graph without the rewrite.
    route: which plain attentions go to a kernel of torch's own: those that the recorded search found faster there,
        none, or all that one takes.
    inductor: everything else, for Inductor.
    """

    inner: str = "inductor"
    verify: bool = False
    strict: bool = False
    route: str = "auto"
    inductor: Mapping[str, Any] = field(default_factory=dict)


def parse(options: Mapping[str, Any] | None) -> Options:
    """Split the `options` of torch.compile. Raises ValueError for an unknown "flashfuse." key or a wrong value."""
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if not key.startswith(PREFIX):
            inductor[key] = value
            continue
        name = key.removeprefix(PREFIX)
        if name not in CHOICES:
            raise ValueError(f"unknown option {key!r}{_did_you_mean(key)}; valid options are {_valid()}")
        if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in CHOICES[name]):
            close = difflib.get_close_matches(str(value), [str(c) for c in CHOICES[name]], n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"option {key!r} is one of {_list(CHOICES[name])}, got {value!r}{hint}")
        ours[name] = value
    return Options(**ours, inductor=inductor)


def misspelt(keys: Mapping[str, Any]) -> str | None:
    """A hint for the first of Inductor's option keys that looks like one of flashfuse's, or None."""
    for key in keys:
        if meant := _closest(key):
            return f"{key!r} is not an Inductor option; did you mean {meant!r}? flashfuse's options are {_valid()}"
    return None


def _closest(key: str) -> str | None:
    """The option that `key`, with or without a prefix that resembles flashfuse's, was most likely meant to be."""
    head, dot, name = key.replace("_", ".").replace("-", ".").lower().rpartition(".")
    if dot and not difflib.get_close_matches(head + dot, [PREFIX], cutoff=0.75):
        return None
    close = difflib.get_close_matches(name, CHOICES, n=1, cutoff=0.6 if dot else 0.8)
    return PREFIX + close[0] if close else None


def _did_you_mean(key: str) -> str:
    meant = _closest(key)
    return f" (did you mean {meant!r}?)" if meant else ""


def _valid() -> str:
    return "; ".join(f"{PREFIX + name!r}: {_list(choices)}" for name, choices in CHOICES.items())


def _list(choices: tuple[Any, ...]) -> str:
    return " or ".join(repr(c) for c in choices)
