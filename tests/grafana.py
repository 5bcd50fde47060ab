#!/usr/bin/env python3
"""The dashboard is what Grafana reads: nothing unknown in it, no panel over another.

    pip install -r .ci/requirements.txt && tests/grafana.py

What its queries answer is checked by tests/prometheus.py.
"""

import json
import pathlib
import re
import sys

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

DASHBOARD = pathlib.Path(__file__).resolve().parent.parent / "deploy/grafana/lakebase-proxy.json"
WIDTH = 24  # columns of Grafana's grid


def main():
    dashboard = json.loads(DASHBOARD.read_text())
    # Grafana's own types keep what they know, so a misspelt field does not come back.
    kept = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    wrong = list(differences(dashboard, kept)) + list(misplaced(dashboard["panels"]))
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        if panel["type"] != "row" and not panel.get("description"):
            wrong.append(f"panel `{panel['title']}` has no description")
        for target in panel.get("targets", []):
            used = {name for name in re.findall(r"\$(\w+)", target["expr"]) if not name.startswith("__")}
            if unknown := used - variables:
                wrong.append(f"panel `{panel['title']}` uses variables that there are not: {', '.join(sorted(unknown))}")
            if target["datasource"] != {"type": "prometheus", "uid": "${datasource}"}:
                wrong.append(f"panel `{panel['title']}` does not use the chosen data source")
    if wrong:
        raise SystemExit("\n".join(f"{DASHBOARD.name}: {line}" for line in wrong))
    print(f"{len(dashboard['panels'])} panels, all of them as Grafana knows them")


def differences(given, kept, path=""):
    """Where `kept` lacks or changes what was given."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from differences(value, kept[key], f"{path}.{key}")
            else:
                yield f"{path}.{key} is nothing that Grafana knows"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, (one, other) in enumerate(zip(given, kept)):
            yield from differences(one, other, f"{path}[{index}]")
    elif given != kept:
        yield f"{path} is {given!r}, which Grafana takes for {kept!r}"


def misplaced(panels):
    """Panels that overlap, reach over the edge, or share an id."""
    taken, ids = {}, set()
    for panel in panels:
        place = panel["gridPos"]
        if panel["id"] in ids:
            yield f"panel `{panel['title']}` has the id of another"
        ids.add(panel["id"])
        if place["x"] + place["w"] > WIDTH:
            yield f"panel `{panel['title']}` reaches over the edge"
        for cell in ((x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])):
            if cell in taken:
                yield f"panels `{taken[cell]}` and `{panel['title']}` overlap"
                break
            taken[cell] = panel["title"]


if __name__ == "__main__":
    sys.exit(main())
