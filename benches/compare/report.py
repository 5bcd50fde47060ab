"""A table, a picture and JSON of what was measured."""

import json
import statistics

# What a line of the table is: workload, field, title, unit, digits, and whether less is better.
LINES = [
    ("connect", "p50_ms", "connect + SELECT 1 + close, p50", "ms", 2, True),
    ("connect", "p99_ms", "connect + SELECT 1 + close, p99", "ms", 2, True),
    ("connect", "cpu_us", "  the hop's processor time", "µs", 0, True),
    ("many connects", "per_second", "1,000 connects by 8 clients", "/s", 0, False),
    ("SELECT 1", "p50_us", "SELECT 1, p50", "µs", 1, True),
    ("SELECT 1", "p99_us", "SELECT 1, p99", "µs", 1, True),
    ("SELECT 1", "cpu_us", "  the hop's processor time", "µs", 1, True),
    ("exact", "calls", "  system calls", "", 2, True),
    ("exact", "instructions", "  instructions in user space", "", 0, True),
    *[
        line
        for mode in ("simple", "extended", "prepared")
        for clients in (1, 8, 32, 64, *([1000] if mode == "simple" else []))
        for line in (
            (f"-S {mode} {clients}", "tps", f"pgbench -S {mode}, {clients} clients", "tps", 0, False),
            (f"-S {mode} {clients}", "p50_us", "  p50", "µs", 0, True),
            (f"-S {mode} {clients}", "p99_us", "  p99", "µs", 0, True),
            (f"-S {mode} {clients}", "cpu_us", "  the hop's processor time", "µs", 1, True),
        )
    ],
    *[
        line
        for way in ("out", "in")
        for row in (65536, 1024)
        for line in (
            (f"COPY {way} {row}", "mb_s", f"COPY {way}, rows of {row // 1024} KB", "MB/s", 0, False),
            (f"COPY {way} {row}", "cpu_us_mb", "  the hop's processor time", "µs/MB", 0, True),
        )
    ],
    ("idle", "kb", "memory per idle session", "KB", 2, True),
    ("idle", "cpu_ms_minute", "  processor time of them all in a minute", "ms", 1, True),
    ("idle 8000", "kb", "memory per idle session, of 8,000", "KB", 2, True),
    ("crowd", "per_second", "10,000 clients on 20 connections", "/s", 0, False),
    ("crowd", "cpu_us", "  the hop's processor time", "µs", 0, True),
    ("crowd", "kb", "  memory per waiting client", "KB", 2, True),
    ("start", "ms", "start to listening", "ms", 1, True),
    ("start", "resident_mb", "resident memory, no client", "MB", 1, True),
]

# The lines that are promised: the figure, of whom the reference is, and at most (or, for rates, at least) how much of it.
PROMISES = [
    # As benches/exact: tokio runtimes instead of an executor of our own (10,641), and overwriting freed memory (450).
    ("exact", "instructions", None, 11_500, 6_000),
    ("exact", "calls", None, 6.1, 6.1),
    ("idle", "kb", None, 12, 6),
    ("idle 8000", "kb", None, 12, 6),
    ("SELECT 1", "cpu_us", "PgBouncer", 0.75, 0.5),
    ("SELECT 1", "p50_us", "PgBouncer", 1.0, 0.85),
    ("COPY out 65536", "cpu_us_mb", "PgBouncer", 0.45, 0.28),
    ("COPY in 65536", "cpu_us_mb", "PgBouncer", 0.3, 0.2),
    ("connect", "p50_ms", "direct TLS", 0.95, 0.8),
    ("-S simple 64", "tps", "PgBouncer", 0.95, 1.1),
    ("idle", "cpu_ms_minute", None, 10, 10),
    ("start", "resident_mb", None, 10, 6),
    ("start", "ms", None, 50, 10),
]
# The same of the pool.
POOL_PROMISES = [
    ("connect", "p50_ms", "PgBouncer", 1.0, 0.8),
    ("connect", "p50_ms", "direct TLS", 0.03, 0.02),
    ("SELECT 1", "cpu_us", "lakebase-proxy", 1.05, 1.0),
    ("COPY out 65536", "cpu_us_mb", "lakebase-proxy", 1.05, 1.0),
    ("COPY in 65536", "cpu_us_mb", "lakebase-proxy", 1.05, 1.0),
    ("crowd", "per_second", "PgBouncer", 1.0, 1.2),
    *[(f"-S {mode} {clients}", "cpu_us", "lakebase-proxy", 1.05, 1.0) for mode in ("simple", "extended", "prepared") for clients in (1, 8)],
]
# The same of connections that pass from client to client by the transaction.
SHARING_PROMISES = [
    ("-S simple 1000", "cpu_us", "PgBouncer, transaction", 0.7, 0.6),
    ("-S simple 1000", "tps", "PgBouncer, transaction", 1.0, 1.2),
    *[(f"-S {mode} {clients}", field, "PgBouncer, transaction", 1.0, 0.85)
      for mode in ("simple", "extended") for clients in (1, 32) for field in ("p50_us", "p99_us", "cpu_us")],
    ("idle", "kb", None, 3, 1.5),
]
RATES = {"tps", "mb_s", "per_second"}
# Where a hop is no peer: PgBouncer connects by keeping connections.
NO_PEERS = {("connect", "PgBouncer"), ("connect", "lakebase-proxy, auto")}


def median(samples, field):
    """Of the undisturbed rounds where there are any: median, least and most."""
    clean = [sample for sample in samples if not sample["disturbed"]] or samples
    values = [sample[field] for sample in clean if sample.get(field) is not None]
    return (statistics.median(values), min(values), max(values)) if values else None


def ratio(ours, theirs, field):
    """Of what was measured one right after the other, so that a busy minute is in both; undisturbed where there is such."""
    theirs = {sample["lap"]: sample for sample in theirs if sample.get(field)}
    pairs = [(sample, theirs[sample["lap"]]) for sample in ours if sample.get(field) is not None and sample["lap"] in theirs]
    clean = [pair for pair in pairs if not any(sample["disturbed"] for sample in pair)] or pairs
    values = [our[field] / their[field] for our, their in clean]
    return (statistics.median(values), min(values), max(values)) if values else None


def table(results, ways):
    width = 25
    lines = ["".join([f"{'':<42}", *[f"{way:>{width}}" for way in ways]])]
    for workload, field, title, unit, digits, _ in LINES:
        cells = []
        for way in ways:
            samples = results.get(workload, {}).get(way)
            found = median(samples, field) if samples else None
            if not found:
                cells.append(f"{'-':>{width}}")
                continue
            value, least, most = found
            spread = f" [{least:.{digits}f}..{most:.{digits}f}]" if len(samples) > 1 else ""
            mark = "*" if all(sample["disturbed"] for sample in samples) else ""
            cells.append(f"{value:.{digits}f}{mark}{spread}".rjust(width))
        if any(cell.strip() != "-" for cell in cells):
            lines.append(f"{title + (', ' + unit if unit else ''):<42}" + "".join(cells))
    return "\n".join(lines)


def promises(results, ours, declared=None):
    """Each promise with its figure, whether it is kept, and which hops are better at it."""
    lines = []
    for workload, field, reference, must, aim in declared or PROMISES:
        ways = results.get(workload, {})
        samples = ways.get(ours, [])
        found = ratio(samples, ways.get(reference, []), field) if reference else median(samples, field)
        title = next(title.strip() for w, f, title, *_ in LINES if (w, f) == (workload, field))
        name = f"{workload}: {title}" + (f" / {reference}" if reference else "")
        if not found:
            lines.append(f"{name:<66} {'not measured':>12}")
            continue
        value, least, most = found
        spread = f"[{least:.2f}..{most:.2f}]" if len(samples) > 1 else ""
        better = (lambda limit: value >= limit) if field in RATES else (lambda limit: value <= limit)
        verdict = "aim met" if better(aim) else "met" if better(must) else "MISSED"
        ahead = _ahead(workload, field, ways, ours)
        behind = f"; behind {', '.join(ahead)}" if ahead else ""
        lines.append(f"{name:<66} {value:>12.2f} {spread:<16} must {must:g}, aim {aim:g}: {verdict}{behind}")
    return "\n".join(lines)


def _ahead(workload, field, ways, ours):
    """The hops that did better than ours."""
    found = {way: ratio(ways[ours], samples, field) for way, samples in ways.items()
             if way != "direct TLS" and not way.startswith("lakebase-proxy") and (workload, way) not in NO_PEERS}
    better = (lambda share: share < 1) if field in RATES else (lambda share: share > 1)
    return [f"{way} ({share[0]:.2f} of it)" for way, share in found.items() if share and better(share[0])]


PICTURE = [
    ("SELECT 1", "p50_us"), ("SELECT 1", "cpu_us"), ("connect", "p50_ms"), ("-S simple 64", "tps"),
    ("COPY out 65536", "cpu_us_mb"), ("COPY in 65536", "cpu_us_mb"), ("idle", "kb"), ("exact", "instructions"),
]
COLORS = {"lakebase-proxy": "#1f6f6b", "lakebase-proxy, auto": "#37a39c", "PgBouncer": "#b3561f", "stunnel": "#8a6fae", "Go relay": "#4f83b8", "direct TLS": "#7d8590"}


def picture(results, ways):
    """Bars, one group a figure; within a group the longest fills the width."""
    bar, gap, left, width = 18, 26, 130, 420
    parts, y = [], 20
    for workload, field in PICTURE:
        title, unit, digits = next((t, u, d) for w, f, t, u, d, _ in LINES if (w, f) == (workload, field))
        if field == "cpu_us_mb" or (workload, field) == ("SELECT 1", "cpu_us"):
            title = f"{workload.replace(' 65536', '')}, processor time of the hop"
        bars = []
        for way in ways:
            samples = results.get(workload, {}).get(way)
            found = median(samples, field) if samples else None
            if found:
                bars.append((way, found[0]))
        if not bars:
            continue
        better = "more is better" if field in RATES else "less is better"
        parts.append(f'<text x="10" y="{y}" font-weight="600">{title.strip()}, {unit or "count"} <tspan fill="#7d8590" font-weight="400">({better})</tspan></text>')
        y += 10
        longest = max(value for _, value in bars) or 1
        for way, value in bars:
            length = max(1, value / longest * width)
            parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{way}</text>'
                         f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 4}" rx="2" fill="{COLORS.get(way, "#444")}"/>'
                         f'<text x="{left + length + 6:.1f}" y="{y + 12}">{value:,.{digits}f}</text>')
            y += bar
        y += gap
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y}" viewBox="0 0 640 {y}" font-family="system-ui, sans-serif" '
            f'font-size="12" fill="#24292f"><rect width="640" height="{y}" fill="#ffffff"/>{"".join(parts)}</svg>\n')


def as_json(machine, results):
    return json.dumps({"machine": machine, "results": results}, indent=1) + "\n"
