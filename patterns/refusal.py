"""Why a site is refused: raised inside matching, turned into a `Refusal` with a source line at its edge."""

from __future__ import annotations

from torch import fx


class Refused(Exception):
    """A site that must be left alone. `code` is stable, `reason` one plain sentence, `node` where it shows."""

    def __init__(self, code: str, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.code, self.reason, self.node = code, reason, node
