#!/usr/bin/env python3
"""Every file in deploy/ that another program will read, checked by that program or its schema.

    tests/places/manifests.py            all of them
    tests/places/manifests.py --bite     breaks each of them in one place, and demands that it is noticed

Kubernetes objects against the API's schemas, Compose and Dockerfile by their own checkers, the bundle and app.yaml by
Databricks' models. Policy, chart and Kustomize component must add the same sidecar to several Pods; for that, `helm` and `kubectl`
must be on the PATH (kubernetes_tools.py brings them).
"""

import argparse
import contextlib
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import yaml

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import injection
from stage import ROOT

BINARIES = pathlib.Path(sys.executable).parent
# From the first Kubernetes with preStop.sleep to the newest whose schemas are at hand.
KUBERNETES = ("1.30", "1.37")
OPTIONAL = {"skipped": 0}


class Wrong(Exception):
    """The error of a checker."""


# A file may be so wrong that it is no YAML, or lacks what a check looks into.
NOTICED = (Wrong, yaml.YAMLError, KeyError, ValueError, TypeError)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bite", action="store_true")
    arguments = parser.parse_args()
    passed = 0
    failed = []
    for what, check in checks(ROOT / "deploy"):
        try:
            check()
        except NOTICED as wrong:
            failed.append(f"{what}: {wrong}")
        else:
            passed += 1
    for line in failed:
        print(line, file=sys.stderr)
    if arguments.bite and not failed:
        passed += bite()
    print(f"\nmanifests: {passed} passed, {len(failed)} failed" + (f", {OPTIONAL['skipped']} skipped" if OPTIONAL["skipped"] else ""))
    return 1 if failed else 0


def checks(deploy):
    """Name and check of each file."""
    kubernetes = deploy / "kubernetes"
    for file in sorted(kubernetes.rglob("*.yaml")):
        if file.name != "kustomization.yaml" and "chart" not in file.parts:
            yield file.relative_to(deploy), lambda file=file: kubernetes_objects(file)
    if missing := injection.missing():
        print(f"no {' and '.join(missing)}: nothing is rendered", file=sys.stderr)
        OPTIONAL["skipped"] += 4
    else:
        yield "kubernetes/component, rendered", lambda: rendered(kubernetes / "component")
        yield "kubernetes/policy.yaml on Pods", lambda: injection.policy_makes_the_same(kubernetes)
        yield "kubernetes/chart", lambda: chart(kubernetes)
        yield "kubernetes/chart in the chart of an app", lambda: injection.chart_of_an_app(kubernetes)
    yield "kubernetes/generate", lambda: injection.generated(kubernetes)
    yield "kubernetes: one sidecar in three files", lambda: same_sidecar(kubernetes)
    yield "kubernetes and the rest: one version", lambda: one_version(deploy)
    yield "docker/Dockerfile", lambda: dockerfile(deploy / "docker/Dockerfile")
    yield "docker/compose.yaml", lambda: compose(deploy / "docker/compose.yaml")
    apps = deploy / "databricks-app"
    for file in sorted(apps.glob("*/app.yaml")):
        for variant in ("value", "valueFrom"):
            yield f"{file.relative_to(deploy)} ({variant})", lambda file=file, variant=variant: app_yaml(file, variant)
    yield "databricks-app/databricks.yml", lambda: bundle(apps / "databricks.yml", apps)
    for file in sorted((deploy / "systemd").glob("*.*")):
        if file.suffix in (".service", ".socket"):
            yield file.relative_to(deploy), lambda file=file: unit(file)


# Kubernetes


def kubernetes_objects(file):
    for thing in documents(file):
        if file.parent.name == "component" and thing["kind"] == "Deployment":
            # A patch: it becomes whole by the Deployment it is laid onto.
            thing["spec"]["selector"] = {"matchLabels": {"lakebase-proxy": "sidecar"}}
            thing["spec"]["template"]["spec"]["containers"] = [{"name": "app", "image": "app:1"}]
        validate(thing)


def validate(thing):
    if thing["apiVersion"].startswith("monitoring.coreos.com/"):
        pod_monitor(thing)
        return
    import kubernetes_validate

    # A policy must be right for each version of its API.
    is_policy = thing["apiVersion"].startswith("admissionregistration.k8s.io/")
    for api_version, served in (injection.POLICY_VERSIONS if is_policy else {thing["apiVersion"]: KUBERNETES}).items():
        for version in served:
            try:
                kubernetes_validate.validate({**thing, "apiVersion": api_version}, version, strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.utils.SchemaNotFoundError) as error:
                raise Wrong(f"Kubernetes {version}: {getattr(error, 'message', error)}") from None
    for spec in pod_specs(thing):
        sidecar(spec)


def pod_monitor(thing):
    """By the operator's own model, which knows every field and nothing else."""
    from cloudcoil.models.prometheus_operator import v1
    from pydantic import ValidationError

    try:
        model = v1.PodMonitor.model_validate(thing)
    except ValidationError as error:
        raise Wrong(str(error)) from None
    lost = differences(thing, model.model_dump(by_alias=True, exclude_none=True, mode="json"))
    if lost:
        raise Wrong(f"unknown: {lost}")


def pod_specs(thing):
    spec = thing.get("spec", {})
    if "template" in spec:
        yield spec["template"]["spec"]


def sidecar(spec):
    """Not covered by a schema: that names fit together, and that the program takes these flags."""
    (proxy,) = [container for container in spec["initContainers"] if container["name"] == "lakebase-proxy"]
    volumes = {volume["name"] for volume in spec.get("volumes", ())}
    for mount in proxy["volumeMounts"]:
        if mount["name"] not in volumes:
            raise Wrong(f"no volume {mount['name']}")
    ports = {port["name"] for port in proxy["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe in proxy and proxy[probe]["httpGet"]["port"] not in ports:
            raise Wrong(f"{probe}: no port {proxy[probe]['httpGet']['port']}")
        if probe in proxy and proxy[probe]["httpGet"]["path"] not in ("/startup", "/readiness", "/liveness"):
            raise Wrong(f"{probe}: no path {proxy[probe]['httpGet']['path']}")
    if proxy["restartPolicy"] != "Always":
        raise Wrong("not a native sidecar")
    flags(proxy["args"])


def flags(args):
    known = set(re.findall(r"^# ?([a-z_]+) = |^([a-z_]+) = ", (ROOT / "config/lakebase-proxy.toml").read_text(), re.MULTILINE))
    known = {name for pair in known for name in pair if name}
    for flag in args:
        if flag.startswith("--") and flag.lstrip("-").split("=")[0].replace("-", "_") not in known:
            raise Wrong(f"no such flag: {flag}")


def same_sidecar(kubernetes):
    """The Deployment, the Job and the component must not drift apart in what keeps the container in bounds."""
    found = []
    for file in ("app.yaml", "job.yaml", "component/sidecar.yaml"):
        for thing in documents(kubernetes / file):
            for spec in pod_specs(thing):
                (proxy,) = [container for container in spec["initContainers"] if container["name"] == "lakebase-proxy"]
                # The complete manifests have these two for the whole Pod.
                security = {key: value for key, value in proxy["securityContext"].items() if key not in ("runAsNonRoot", "seccompProfile")}
                found.append((proxy["image"], proxy["resources"], security, proxy["volumeMounts"]))
    if any(other != found[0] for other in found):
        raise Wrong("they differ in image, resources, securityContext or volumeMounts")


def one_version(deploy):
    """Cargo.toml's, wherever an example names one."""
    version = version_of_the_program()
    for file in deploy.rglob("*"):
        if file.suffix in (".yaml", ".md", ".json", ".txt") and "node_modules" not in file.parts:
            for named in re.findall(r"lakebase[-_]proxy(?:-linux-x64)?[-:](?:\": \")?(\d+\.\d+\.\d+)", file.read_text()):
                if named not in (version, "0.0.0"):
                    raise Wrong(f"{file.name} names version {named}, Cargo.toml {version}")


def version_of_the_program():
    return re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE).group(1)


def rendered(component):
    things = injection.kustomized(component)
    if things.pop(("Service", "web")).get("spec", {}).get("template"):
        raise Wrong("the Service was changed")
    if {name for _, name in things} != set(injection.PODS):
        raise Wrong(f"rendered {set(things)}")
    for (_, name), thing in things.items():
        validate(thing)
        spec, before = thing["spec"]["template"]["spec"], injection.PODS[name]
        if thing["spec"]["template"]["metadata"]["labels"] != {"app": name, **injection.LABEL}:
            raise Wrong(f"{name}: labels")
        if spec["containers"] != before["containers"]:
            raise Wrong(f"{name}: its containers were changed")
        others = [container for container in spec["initContainers"] if container["name"] != "lakebase-proxy"]
        if others != before.get("initContainers", []) or spec["initContainers"][0]["name"] != "lakebase-proxy":
            raise Wrong(f"{name}: init containers, of which the sidecar must be the first")
        if not all(volume in spec["volumes"] for volume in before.get("volumes", ())):
            raise Wrong(f"{name}: volumes")


def chart(kubernetes):
    about = yaml.safe_load((kubernetes / "chart/Chart.yaml").read_text())
    if {about["version"], about["appVersion"]} != {version_of_the_program()}:
        raise Wrong("Chart.yaml has another version than Cargo.toml")
    injection.chart_lints(kubernetes / "chart")
    injection.chart_renders_the_manifests(kubernetes)


# Containers


def dockerfile(file):
    printed = run(BINARIES / "hadolint", "--strict-labels", "--require-label", "org.opencontainers.image.title:text", "--require-label", "org.opencontainers.image.description:text", "--require-label", "org.opencontainers.image.licenses:text", file)
    if printed.strip():
        raise Wrong(printed)
    text = file.read_text()
    last = text[text.rindex("\nFROM ") :]
    if "FROM scratch" not in last or not re.search(r"^USER \d+:\d+$", last, re.MULTILINE) or "RUN " in last:
        raise Wrong("the image is not from scratch, with a numeric user")
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            if not (ROOT / name).exists():
                raise Wrong(f"COPY {name}: there is no such file")
            if name not in (file.parent / "Dockerfile.dockerignore").read_text():
                raise Wrong(f"COPY {name}: .dockerignore keeps it away")


def compose(file):
    printed = run(BINARIES / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)
    if "ok" not in printed:
        raise Wrong(printed)
    services = yaml.safe_load(file.read_text())["services"]
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith(".") and not (file.parent / source).exists():
                raise Wrong(f"{name}: there is no {source}")
        if "build" in service and not (file.parent / service["build"]["context"] / service["build"]["dockerfile"]).exists():
            raise Wrong(f"{name}: nothing to build")
        if service.get("network_mode", "service:app") != "service:app":
            raise Wrong(f"{name}: not in the app's network")


# Databricks


def app_yaml(file, variant):
    from databricks.bundles.apps import AppConfig

    text = file.read_text()
    if variant == "valueFrom":
        text = text[: text.index("\nenv:")] + re.sub("^# ", "", text[text.index("\n# env:") :], flags=re.MULTILINE)
    config = yaml.safe_load(text)
    # The file's name for it is camel case, the bundle's is not.
    config["env"] = [{"value_from" if key == "valueFrom" else key: value for key, value in entry.items()} for entry in config["env"]]
    model(AppConfig, config)
    for entry in config["env"]:
        if not all(isinstance(value, str) for value in entry.values()):
            raise Wrong(f"{entry['name']}: every value is a string")
    # Nothing expands a variable in a command but this one.
    if any("$" in part.replace("$DATABRICKS_APP_PORT", "") for part in config["command"]):
        raise Wrong("a variable in the command")


def bundle(file, apps):
    from databricks.bundles.apps import App

    whole = yaml.safe_load(file.read_text())
    known = {"bundle", "variables", "resources", "targets", "include", "workspace", "permissions", "sync", "artifacts"}
    if set(whole) - known or set(whole["bundle"]) - {"name", "databricks_cli_version", "uuid"}:
        raise Wrong(f"unknown: {set(whole) - known}")
    for target in whole["targets"].values():
        if target["mode"] not in ("development", "production"):
            raise Wrong(f"mode {target['mode']}")
    for app in whole["resources"]["apps"].values():
        model(App, app)
        for resource in app["resources"]:
            branch, database = resource["postgres"]["branch"], resource["postgres"]["database"]
            if not re.fullmatch(r"projects/[^/]+/branches/[^/]+", branch) or not re.fullmatch(r"projects/[^/]+/branches/[^/]+/databases/[a-z0-9-]+", database):
                raise Wrong("branch and database are full resource names")
        for each in ("flask", "node", "notes"):
            if not (apps / app["source_code_path"].replace("${var.app}", each) / "app.yaml").exists():
                raise Wrong(f"no app in {app['source_code_path']}")
            wanted = yaml.safe_load(re.sub("^# ", "", (apps / each / "app.yaml").read_text().split("\n# env:")[1], flags=re.MULTILINE))
            if {entry["valueFrom"] for entry in wanted} - {resource["name"] for resource in app["resources"]}:
                raise Wrong(f"{each}: valueFrom names no resource of the bundle")


def model(kind, value):
    """Databricks' own model of it: unknown fields, types and words are refused."""
    try:
        made = kind.from_dict(value)
    except (TypeError, ValueError, KeyError) as error:
        raise Wrong(str(error)) from None
    lost = differences(value, made.as_dict())
    if lost:
        raise Wrong(f"unknown or of another type: {lost}")


def differences(given, kept, at=""):
    """What of `given` is not in `kept`."""
    if isinstance(given, dict):
        if not isinstance(kept, dict):
            return at
        return next((found for key in given if (found := f"{at}/{key}" if key not in kept else differences(given[key], kept[key], f"{at}/{key}"))), None)
    if isinstance(given, list):
        if not isinstance(kept, list) or len(given) != len(kept):
            return at
        return next((found for i, (a, b) in enumerate(zip(given, kept)) if (found := differences(a, b, f"{at}/{i}"))), None)
    return None if str(given) == str(kept) else at


# Machines


def unit(file):
    if not shutil.which("systemd-analyze"):
        OPTIONAL["skipped"] += 1
        return
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        # The program need not be installed for its unit to be right.
        for other in file.parent.glob("*.*"):
            (scratch / other.name).write_text(re.sub(r"^(Exec\w+=[-+!@:]*)/\S+", r"\1/bin/true", other.read_text(), flags=re.MULTILINE))
        printed = run("systemd-analyze", "verify", "--man=no", scratch / file.name)
    if ours := [line for line in printed.splitlines() if file.stem.split("@")[0] in line]:
        raise Wrong("\n".join(ours))


# Whether the checks can fail at all

BITES = (
    ("kubernetes/app.yaml", "periodSeconds: 1\n", "periodSecond: 1\n"),
    ("kubernetes/app.yaml", "replicas: 2", 'replicas: "2"'),
    ("kubernetes/app.yaml", "runAsNonRoot: true", "runAsNonRoot: True!"),
    ("kubernetes/app.yaml", "--exit-zero-on-sigterm", "--exit-zero-on-sigtermx"),
    ("kubernetes/job.yaml", "backoffLimit: 2", "backofflimit: 2"),
    ("kubernetes/job.yaml", "memory: 48Mi", "memory: 49Mi"),
    ("kubernetes/job.yaml", "lakebase-proxy:0.1.0", "lakebase-proxy:0.1.1"),
    ("systemd/lakebase-proxy.service", "\nType=notify\n", "\nTyp=notify\n"),
    ("systemd/lakebase-proxy.socket", "ListenStream=127", "ListenStreem=127"),
    ("kubernetes/network-policy.yaml", "policyTypes", "policytypes"),
    ("kubernetes/pod-monitor.yaml", "interval", "intervall"),
    ("kubernetes/component/sidecar.yaml", "containerPort", "containersPort"),
    ("kubernetes/component/sidecar.yaml", "- name: databricks-token\n              mountPath", "- name: databricks-tokem\n              mountPath"),
    ("kubernetes/component/kustomization.yaml", "kind: Deployment", "kind: Deploymemt"),
    # What is generated is also compared as text; of these, another check reports the error first.
    ("kubernetes/policy.yaml", "/spec/initContainers/0", "/spec/initContainers/-"),
    ("kubernetes/policy.yaml", "periodSeconds: 10", "periodSeconds: 20"),
    ("kubernetes/policy.yaml", "reinvocationPolicy", "reinvokationPolicy"),
    ("kubernetes/policy.yaml", "failurePolicy: Fail", "failurePolicy: Ignore"),
    ("kubernetes/chart/templates/policy.yaml", "containerPort: 9090", "containerPort: 9091"),
    ("kubernetes/chart/templates/_sidecar.tpl", "mountPath: /var/run/secrets/databricks", "mountPath: /var/run/secrets/databrick"),
    ("kubernetes/chart/templates/_sidecar.tpl", "| toJson }}", "| toYaml }}"),
    ("kubernetes/chart/templates/config-map.yaml", "$value | toString | toJson", "$value | toString | upper"),
    ("kubernetes/chart/templates/network-policy.yaml", "port: 5432", "port: 5433"),
    ("kubernetes/chart/templates/pod-monitor.yaml", "path: /metrics", "path: /metric"),
    ("kubernetes/chart/values.yaml", "memory: 192Mi", "memory: 192M"),
    ("kubernetes/chart/values.yaml", "image: registry", "images: registry"),
    ("kubernetes/chart/Chart.yaml", "appVersion: 0.1.0", "appVersion: 0.1.1"),
    ("kubernetes/component/sidecar.yaml", "value: file-oidc", "value: file_oidc"),
    ("docker/Dockerfile", "USER 65532:65532\nEXPOSE", "USER lakebase\nEXPOSE"),
    ("docker/Dockerfile", "HEALTHCHECK --interval", "HEALTHCHEK --interval"),
    ("docker/compose.yaml", "read_only: true", "readonly: true"),
    ("databricks-app/flask/app.yaml", "    value: require", "    valeu: require"),
    ("databricks-app/node/app.yaml", 'value: "5432"', "value: 5432"),
    ("databricks-app/databricks.yml", "CAN_CONNECT_AND_CREATE", "CAN_CONNECT_AND_CREATF"),
    ("databricks-app/databricks.yml", "source_code_path", "source_code_pat"),
    ("databricks-app/databricks.yml", "- name: postgres", "- name: postgre"),
)


# Mistakes of the generator, with all that it then writes: only the Pods can show these.
GENERATOR_BITES = (
    ("policyName: lakebase-proxy", "policyName: lakebase"),
    ("operations: [CREATE]", "operations: [UPDATE]"),
    ("/spec/initContainers/0", "/spec/initContainers/-"),
    ("(has(object.spec.volumes) ? [] :", "(true ? [] :"),
    ("(has(object.spec.initContainers) ? [] : [", "(false ? [] : ["),
    ("volume.name == {volume_name})", 'volume.name == "data")'),
    ("!(has(object.spec.initContainers)", "(has(object.spec.initContainers)"),
    ("!object.spec.containers.exists", "object.spec.containers.exists"),
    ("matchLabels: {{ lakebase-proxy: sidecar }}", "matchLabels: {{ lakebase-proxy: sidecars }}"),
    ('("resources", "limits"), ', ""),
    ('("args",), ', ""),
    ('kind + "{", entries', 'kind.title() + "{", entries'),
    ("return json.dumps(value)", "return json.dumps(str(value))"),
)


def bite():
    """A small mistake in a copy must be reported."""
    for path, right, wrong in (*BITES, *(("kubernetes/generate", right, wrong) for right, wrong in GENERATOR_BITES)):
        with tempfile.TemporaryDirectory() as scratch:
            deploy = pathlib.Path(scratch) / "a/deploy"
            shutil.copytree(ROOT / "deploy", deploy)
            shutil.copytree(ROOT / "config", deploy.parent / "config")
            text = (deploy / path).read_text()
            if right not in text:
                raise SystemExit(f"{path} has no {right!r}")
            (deploy / path).write_text(text.replace(right, wrong, 1))
            if path == "kubernetes/generate":
                run(sys.executable, deploy / path)
            folder = path.split("/")[0]
            result = None
            for what, check in checks(deploy):
                if not str(what).startswith(folder):
                    continue
                try:
                    check()
                except NOTICED as error:
                    result = result or f"{what}: {(str(error).splitlines() or [''])[0][:110]}"
            if result is None:
                raise SystemExit(f"{path}: {right!r} as {wrong!r} is not noticed")
            print(f"noticed: {right.strip()!r} as {wrong.strip()!r}\n         {result}")
    return len(BITES) + len(GENERATOR_BITES)


def documents(file):
    return [thing for thing in yaml.safe_load_all(file.read_text()) if thing]


def run(*command):
    done = subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise Wrong(done.stdout.strip())
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
