"""The table of claims as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from kvzip.eval.claims.claims import EXACT, Claim, Claims, Own, Published

_COLUMNS = ("claim", "what is exact", "of", "needed beside the file", "speed", "measured on")
_CHECKED = {
    "source": "read at the source",
    "part": "read in part",
    "reported": "as reported in",
    "nowhere": "not found",
}


def blocks(claims: Claims) -> dict[str, str]:
    """What stands between the page's marks, by their names."""
    return {
        "published": _section(claims.published),
        "own": _section(claims.own),
        "checked": f"All of this was looked up on {claims.checked_on}.",
    }


def _section(claims: Sequence[Claim]) -> str:
    """A table of claims, then what each of them means and where it stands."""
    lines = [f"| | {' | '.join(_COLUMNS)} |", "|" + "---|" * (len(_COLUMNS) + 1)]
    for n, claim in enumerate(claims, 1):
        cells = (claim.claim, EXACT[claim.exact], claim.dtype, claim.beside, claim.speed)
        lines.append(f"| {n}. {claim.name} | {' | '.join((*cells, claim.measured_on))} |")
    lines.append("")
    for n, claim in enumerate(claims, 1):
        said = f"{n}. **{claim.name}.** {claim.means} {_rests_on(claim)}"
        lines += textwrap.wrap(
            said, 120, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)


def _rests_on(claim: Claim) -> str:
    """Where a claim's figures stand."""
    if isinstance(claim, Own):
        return f"*Stored in* [{claim.stored}]({_from_docs(claim.stored)})."
    assert isinstance(claim, Published)
    source = f"[{_short(claim.source)}]({claim.source})" if "://" in claim.source else claim.source
    places = ", ".join(f"<{place}>" if "://" in place else place for place in claim.reported_in)
    where = f"{_CHECKED[claim.checked]}{' ' if places else ''}{places}"
    return f"*Source*: {source}, {claim.date}; {where}. We read {claim.read}."


def _short(address: str) -> str:
    return address.removeprefix("https://").removeprefix("www.").rstrip("/")


def _from_docs(path: str) -> str:
    """A path in the repository as a link of a page in docs/."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
