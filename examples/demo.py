"""`make demo`: real models, library code unmodified, compiled with backend="flashfuse" beside eager and Inductor.

Runs on the GPU in bfloat16 where there is one, else on the CPU in float32, in a few minutes on two cores. Exits with 1
when a compiled model disagrees with the unmodified one, when an attention was not fused, or when memory grows as it
should not.
"""

from __future__ import annotations

import os
import sys

# Quiet libraries that would print over the progress line; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from embeddings import embeddings
from long_sequence import long_sequence
from prefill import prefill
from rich.console import Console


def main() -> int:
    """Run every part, print what went wrong, and return the exit status."""
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"torch {torch.__version__}, {name}, {str(dtype).removeprefix('torch.')}")
    torch.manual_seed(0)
    problems: list[str] = []
    with torch.no_grad():
        for part in (embeddings, prefill, long_sequence):
            problems += part(console, device, dtype)
    for problem in problems:
        console.print(f"[red]disagreement:[/red] {problem}")
    console.print("[green]everything agrees[/green]" if not problems else f"[red]{len(problems)} problems[/red]")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
