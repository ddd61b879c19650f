"""What the demos were held to: checks, and how they are told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from millstream.cli.output import Output, count_text


@dataclass(frozen=True)
class Check:
    """One comparison of what was read back with the source."""

    what: str
    expected: int
    found: int

    @property
    def well(self) -> bool:
        """Whether both sides agree."""
        return bool(self.expected == self.found)


def conclude(output: Output, checks: list[Check]) -> bool:
    """Print each check and return whether all went well; what differs is said on stderr too."""
    output.line("Against the source:", "bold")
    for check in checks:
        if check.well:
            shown = {0: "none", True: "yes"}.get(check.expected) or count_text(check.expected)
            output.line(f"  ✓ {check.what}: {shown}", "green")
        else:
            output.line(f"  MISMATCH {check.what}", "bold red")
            output.say(
                f"millstream: {check.what}: expected {check.expected}, read back {check.found}"
            )
    output.gap()
    return all(check.well for check in checks)


def as_json(checks: list[Check]) -> dict[str, Any]:
    """Return the checks, and whether all went well, as JSON has them."""
    return {
        "checks": [{**asdict(check), "well": check.well} for check in checks],
        "well": all(check.well for check in checks),
    }
