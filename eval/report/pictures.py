"""Charts as SVG files of their own, which bring the styles that a page would give them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvzip.entropy import Ladder
from kvzip.eval.report import charts, svg
from kvzip.eval.results.frontier import Frontier
from kvzip.eval.results.links import Links
from kvzip.eval.results.whole_frontier import WholeFrontier

_STYLE = f"""
svg {{ --page: #faf9f6; --ink: #1c1e22; --soft: #585e68; --rule: #dfdcd4;
  {svg.variables(svg.LIGHT)} }}
@media (prefers-color-scheme: dark) {{ svg {{ --page: #15171b; --ink: #e9e7e2; --soft: #a5abb5;
  --rule: #353a42; {svg.variables(svg.DARK)} }} }}
"""
_STYLE += """.page { fill: var(--page); }
text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.heading { font-size: 14px; font-weight: 650; }
.tick, .axis, .note { fill: var(--soft); } .note { font-size: 11px; }
.grid { stroke: var(--rule); fill: none; }
.guide { stroke: var(--soft); stroke-dasharray: 2 3; fill: none; }
.label, .note { paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
.line { fill: none; stroke-width: 2; } .line.ideal { stroke: var(--ink); stroke-width: 1; }
.leader { fill: none; opacity: .75; } .mark { stroke: var(--page); fill-opacity: .8; }
.cell { fill: var(--s3); } .band { stroke: none; fill-opacity: .18; }
"""
_STYLE += "".join(
    f".s{i} {{ stroke: var(--s{i}); }} .band.s{i} {{ fill: var(--s{i}); stroke: none; }}\n"
    f".mark.s{i}, .bar.s{i} {{ fill: var(--s{i}); stroke: var(--page); }}\n"
    for i in range(svg.COLOURS)
)


def standalone(svgs: Sequence[str], headings: Sequence[str] = ()) -> str:
    """An SVG file with the charts one below the other, each under its heading if there is one."""
    tall, parts, width = 8, [], 0
    for i, drawn in enumerate(svgs):
        box = re.search(r'viewBox="0 0 (\d+) (\d+)"', drawn)
        if box is None:
            raise ValueError("not a chart of svg.py")
        width = max(width, int(box[1]))
        if i < len(headings):
            parts.append(f'<text class="heading" x="12" y="{tall + 16}">{headings[i]}</text>')
            tall += 28
        parts.append(drawn.replace("<svg ", f'<svg y="{tall}" ', 1))
        tall += int(box[2]) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" width="{width}" '
        f'height="{tall}"><style>{_STYLE}</style><rect class="page" width="100%" height="100%"/>'
        f"{''.join(parts)}</svg>\n"
    )


def ladder_files(ladder: Ladder) -> dict[str, bytes]:
    """All figures of a ladder as SVG files, by file name."""
    found = {"ladder.svg": charts.ladder_svg(ladder)}
    if any(part.heads for layer in ladder.rungs[0].layers for part in layer.values()):
        found["heat.svg"] = charts.heat_svg(ladder)
    if ladder.spectra:
        found["spectrum.svg"] = charts.spectrum_svg(ladder)
    return {name: standalone([drawn]).encode() for name, drawn in found.items()}


def frontier_file(result: Frontier) -> str:
    """All runs' charts as one SVG file."""
    svgs = [charts.frontier_svg(result, run, f"frontier-{run.dtype}") for run in result.runs]
    headings = [
        f"{result.model}, {run.dtype}"
        + (f" (cast from {run.cast_from})" if run.cast_from else "")
        + ": bits against compute; areas: bytes to know"
        for run in result.runs
    ]
    return standalone(svgs, headings)


def whole_file(result: WholeFrontier) -> str:
    """The charts of all models as one SVG file."""
    svgs = [charts.whole_svg(run, f"whole-{i}") for i, run in enumerate(result.runs)]
    about = 'whole files; "n layers" are computed, and the others loaded'
    headings = [f"{run.shape.name}, {run.dtype}: {about}" for run in result.runs]
    return standalone(svgs, headings)


def links_file(links: Links) -> str:
    """The charts of every delay as one SVG file."""
    delays = list(dict.fromkeys(point.delay for point in links.points))
    svgs = [charts.links_svg(links, delay, f"links-{i}") for i, delay in enumerate(delays)]
    about = (
        f"{links.model}, {links.dtype}, {links.tokens:,} tokens: lines predicted, points measured"
    )
    return standalone(svgs, [f"{about}{_far(delay)}" for delay in delays])


def _far(delay: float) -> str:
    return f", {1e3 * delay:g} ms each way" if delay else ""
