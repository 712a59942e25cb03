"""Building of report.html from the artifacts of a run and its original images."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from ..data.sources import Source
from ..runs import artifacts
from ..runs.folder import RunFolder
from ..text import shown as shown_name
from ..text import shown_lines
from . import details, overview
from .charts import Series, line_chart
from .content import Content, read_content
from .findings import Findings, find
from .originals import Originals
from .overview import Group
from .pagedata import IN_MARKUP, as_script, for_script, page_data
from .text import count, number, percent
from .thumbnails import choose, data_urls, write_thumbnails

EMBEDDED = 600
"""The page of no more images holds their thumbnails itself, about 8 kB each, so that it can be sent as one file."""
CONFUSION_CLASSES = 40
"""A larger confusion matrix is shown as a picture."""
LISTED = 60
"""Entries of each list; all are in the CSV files."""
COPIES_SHOWN = 24
_SCRIPTS = ("state.js", "gallery.js", "viewer.js", "map.js", "start.js")


def write_report(
    run: RunFolder,
    sources: Mapping[str, Source],
    *,
    title: str,
    thumbnails: int | None = None,
    single_file: bool = False,
) -> Path:
    """Write report.html and what it shows: data, thumbnails, the map, and tables of copies and outliers.

    Only the configuration and the assignments must be there. The page asks for nothing from elsewhere; the images'
    thumbnails are inside it, or beside it in report/.

    Args:
        run: the run folder.
        sources: the images by split. Those that are lost or cannot be read are shown by their name.
        title: the heading.
        thumbnails: the largest number of thumbnails; by default that of the configuration.
        single_file: write report-single.html instead, with at most a few hundred thumbnails inside.

    Returns:
        The path of the page.

    Raises:
        RunError: if the assignments are missing, or a file is damaged.
        OSError: if a file cannot be written.
    """
    content = read_content(run, largest_confusion=CONFUSION_CLASSES)
    table, settings = content.assignments, content.config.evaluation
    originals = Originals(sources, table)
    groups = overview.groups_of(content)
    limit = settings.thumbnails if thumbnails is None else thumbnails
    embedded = single_file or len(table.paths) <= EMBEDDED
    limit = min(limit, EMBEDDED) if embedded else limit
    folder = run.path / artifacts.THUMBNAILS
    # The best image of each group first, if not all find room.
    strips = [g.strip[rank] for rank in range(overview.STRIP_IMAGES) for g in groups if rank < len(g.strip)]
    make = data_urls if embedded else write_thumbnails
    # Pixels are compared by the thumbnails if all images have one, else by the originals: which images get one depends
    # on what is found.
    shown: dict[int, str] = {}
    if len(table.paths) <= limit and not embedded:
        shown = make(folder, originals, range(len(table.paths)))
    findings = find(run, table, content.embeddings, originals, with_map=settings.map, thumbnails=shown)
    wanted = choose(table, limit, [*strips, *_listed(findings)])
    shown = shown or make(folder, originals, wanted)
    unreadable = sum(int(i) not in shown for i in wanted) if limit else originals.lost
    if not embedded:
        shown = {i: f"{artifacts.THUMBNAILS}/{name}" for i, name in shown.items()}
    in_markup = set(strips) & shown.keys() if embedded else set()
    urls: dict[int, str | int] = {**shown, **dict.fromkeys(in_markup, IN_MARKUP)}
    data = page_data(content, groups, findings, originals, urls, str(run.path))
    page = _render(
        run, content, groups, findings, data, title=title, shown=shown, embedded=embedded, unreadable=unreadable
    )
    if not embedded:
        run.write(artifacts.REPORT_DATA, as_script(data))
    return run.write(artifacts.SINGLE_REPORT if single_file else artifacts.REPORT, page)


def _listed(findings: Findings) -> list[int]:
    """Return the images that the page's lists show."""
    copies = [i for group in findings.duplicates[:LISTED] for i in group[:COPIES_SHOWN]]
    return [*copies, *(i for i, _, _ in findings.outliers[:LISTED])]


def _render(
    run: RunFolder,
    content: Content,
    groups: Sequence[Group],
    findings: Findings,
    data: Mapping[str, Any],
    *,
    title: str,
    shown: Mapping[int, str],
    embedded: bool,
    unreadable: int,
) -> str:
    loader = PackageLoader("scan_fast.report", "page")
    environment = Environment(
        loader=loader,
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "count": count}
    script = "\n".join(loader.get_source(environment, name)[0] for name in _SCRIPTS)
    script = f'(function () {{\n"use strict";\n{script}\n}})();'
    style = loader.get_source(environment, "page.css")[0]
    choice, suggested = overview.choice(content), overview.suggested_k(content)
    n = len(content.assignments.paths)
    return environment.get_template("page.html").render(
        title=title,
        style=Markup(style),
        script=Markup(script),
        script_hash=_hash(script),
        data=Markup(for_script(data)) if embedded else None,
        data_file=artifacts.REPORT_DATA.name,
        facts=overview.facts(content, groups),
        results=details.results(content.summary),
        warnings=overview.warnings(content, groups, findings, unreadable),
        groups=sorted(groups, key=lambda group: (-group.size, group.id)),
        by_id={group.id: group for group in groups},
        largest=max((g.share for g in groups), default=0.0) or 1.0,
        labelled=any(g.label for g in groups),
        shown=shown,
        partial=len(shown) + unreadable < n,
        n=n,
        paths=list(map(shown_name, content.assignments.paths)),
        findings=findings,
        listed=LISTED,
        copies_shown=COPIES_SHOWN,
        n_copies=sum(map(len, findings.duplicates)),
        choice=choice,
        candidates=overview.candidates(choice) if choice else [],
        suggested=suggested,
        curves=_curves(suggested),
        stages=details.stages(content.summary),
        baselines=details.baselines(content.summary),
        charts=details.charts(content.series),
        confusion=content.confusion,
        confusion_figure=_data_url(content.confusion_figure),
        config_text=content.config.to_yaml(),
        commands=details.commands(run.path),
        run_folder=str(run.path),
        made=datetime.fromtimestamp(run.path_of(artifacts.ASSIGNMENTS).stat().st_mtime, timezone.utc),
    )


def _shown(value: Any) -> Any:
    """Return what the page shows of a value: names may hold characters that reverse or hide what follows."""
    return shown_lines(value) if type(value) is str else value


def _hash(script: str) -> str:
    """Return the hash by which the page's own policy allows its script and no other."""
    digest = hashlib.sha256(script.encode("utf-8", errors="replace")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _curves(suggested: Mapping[str, Any] | None) -> list[tuple[str, Markup]]:
    """Return name and drawing of what was measured for each number of groups."""
    points = [entry for entry in (suggested or {}).get("curve", ()) if isinstance(entry, Mapping) and "k" in entry]
    points.sort(key=lambda entry: entry["k"])
    drawn = []
    for name in ("score", "stability"):
        known = [(float(e["k"]), float(e[name])) for e in points if isinstance(e.get(name), int | float)]
        chart = (
            line_chart(Series(name, [k for k, _ in known], [v for _, v in known]), ("groups:", "numbers of groups"))
            if known
            else None
        )
        if chart is not None:
            drawn.append((name, chart))
    return drawn


def _data_url(png: bytes | None) -> str:
    return "" if png is None else "data:image/png;base64," + base64.b64encode(png).decode("ascii")
