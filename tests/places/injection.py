"""The sidecar added by policy, by chart and by Kustomize: three ways that must make the same Pod.

The policy's CEL runs in Google's evaluator, with the types of the API's schema: stricter than admission, which checks types when
it decodes the patched Pod.
"""

import copy
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import yaml

TOOLS = ("helm", "kubectl")
# The first with the policy's API as it is, and the newest; the first two have the same as a beta.
POLICY_VERSIONS = {"admissionregistration.k8s.io/v1": ("1.36", "1.37"), "admissionregistration.k8s.io/v1beta1": ("1.34", "1.35")}
LABEL = {"lakebase-proxy": "sidecar"}

# Pod specs: bare; with init containers and volumes of its own; with two containers and without a label.
PODS = {
    "bare": {"containers": [{"name": "web", "image": "web:1"}]},
    "full": {
        "initContainers": [{"name": "migrate", "image": "web:1", "command": ["migrate"]}],
        "containers": [{
            "name": "web",
            "image": "web:1",
            "env": [{"name": "PGHOST", "value": "localhost"}],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        }],
        "volumes": [{"name": "data", "emptyDir": {}}],
    },
    "pair": {
        "securityContext": {"runAsNonRoot": True},
        "containers": [{"name": "web", "image": "web:1"}, {"name": "queue", "image": "queue:1"}],
    },
}


class Drift(ValueError):
    """Two ways make different Pods, or a tool reports an error."""


def missing():
    return [tool for tool in TOOLS if not shutil.which(tool)]


def generated(kubernetes):
    run(sys.executable, kubernetes / "generate", "--check")


def deployment(name, spec):
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": spec}},
    }


# Kustomize


def kustomized(component):
    """The Deployments of PODS, and a Service, with the component."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        shutil.copytree(component, scratch / "component")
        base = scratch / "base"
        base.mkdir()
        things = [deployment(name, spec) for name, spec in PODS.items()]
        things.append({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": {"selector": {"app": "bare"}, "ports": [{"port": 80}]}})
        (base / "all.yaml").write_text(yaml.safe_dump_all(things))
        (base / "kustomization.yaml").write_text(yaml.safe_dump({"resources": ["all.yaml"], "components": ["../component"]}))
        return by_name(run("kubectl", "kustomize", base))


# The policy


def policy_makes_the_same(kubernetes):
    rendered = kustomized(kubernetes / "component")
    thing, binding = yaml.safe_load_all((kubernetes / "policy.yaml").read_text())
    same("policy of the binding", binding["spec"], {"policyName": thing["metadata"]["name"]})
    policy = Policy(thing)
    for name, spec in PODS.items():
        wanted = rendered["Deployment", name]["spec"]["template"]
        made = policy.admit(pod(spec, LABEL))
        same(f"policy and component, {name}", made["spec"], wanted["spec"])
        if not LABEL.items() <= wanted["metadata"]["labels"].items():
            raise Drift(f"{name}: the component sets another label than the policy's")
        # What is created from the component's Deployment in a cluster with the policy.
        same(f"twice, {name}", policy.admit(copy.deepcopy(made)), made)
        same(f"no label, {name}", policy.admit(pod(spec, {})), pod(spec, {}))
        same(f"another label, {name}", policy.admit(pod(spec, {"lakebase-proxy": "no"})), pod(spec, {"lakebase-proxy": "no"}))
    own = {"name": "databricks-token", "emptyDir": {}}
    made = policy.admit(pod({**PODS["bare"], "volumes": [own]}, LABEL))
    same("volume of the Pod", made["spec"]["volumes"], [own])
    same("container with a volume of the Pod", made["spec"]["initContainers"], rendered["Deployment", "bare"]["spec"]["template"]["spec"]["initContainers"])
    ordinary = {"containers": [*PODS["bare"]["containers"], {"name": "lakebase-proxy", "image": "of-its-own:1"}]}
    same("ordinary container", policy.admit(pod(ordinary, LABEL)), pod(ordinary, LABEL))


def pod(spec, labels):
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "labels": labels}, "spec": copy.deepcopy(spec)}


class Policy:
    """What admission does with a policy whose only mutation is a JSON patch."""

    def __init__(self, thing):
        spec = thing["spec"]
        created = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
        same("what the policy is for", spec["matchConstraints"]["resourceRules"], [created])
        self.labels = spec["matchConstraints"]["objectSelector"]["matchLabels"]
        conditions = [condition["expression"] for condition in spec["matchConditions"]]
        (mutation,) = spec["mutations"]
        if mutation["patchType"] != "JSONPatch":
            raise Drift(mutation["patchType"])
        self.types = Types(mutation["jsonPatch"]["expression"])
        self.conditions = [self.types.compile(condition) for condition in conditions]
        self.mutation = self.types.compile(mutation["jsonPatch"]["expression"])

    def admit(self, thing):
        variables = {"object": thing}
        if not self.labels.items() <= thing["metadata"].get("labels", {}).items():
            return thing
        if not all(condition.eval(data=variables).value() is True for condition in self.conditions):
            return thing
        thing = copy.deepcopy(thing)
        for index in range(self.types.size(self.mutation, variables)):
            operation, path, value = self.types.operation(self.mutation, variables, index)
            if operation != "add":
                raise Drift(f"operation {operation}")
            *parents, last = path.split("/")[1:]
            parent = thing
            for key in parents:
                parent = parent[key]
            if isinstance(parent, list):
                parent.insert(len(parent) if last == "-" else int(last), value)
            else:
                parent[last] = value
        return thing


class Types:
    """The types `JSONPatch` and `Object.…` of an expression, as messages made from the schema of a Pod.

    A message cannot have the name of its parent's field, which is how Kubernetes names its types: dots become underscores.
    """

    SCALARS = {"string": "TYPE_STRING", "boolean": "TYPE_BOOL", "integer": "TYPE_INT32", "number": "TYPE_DOUBLE"}

    def __init__(self, expression):
        from cel_expr_python import cel
        from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, struct_pb2

        self.field = descriptor_pb2.FieldDescriptorProto
        self.file = descriptor_pb2.FileDescriptorProto(name="pod.proto", syntax="proto3")
        self.file.dependency.extend([any_pb2.DESCRIPTOR.name, struct_pb2.DESCRIPTOR.name])
        patch = self.file.message_type.add(name="JSONPatch")
        for name in ("op", "path", "from"):
            self.add(patch, name, "TYPE_STRING")
        self.add(patch, "value", ".google.protobuf.Any")
        schema = Schema(POLICY_VERSIONS["admissionregistration.k8s.io/v1"][-1])
        self.named = set(re.findall(r"\bObject(?:\.\w+)*(?=\{)", expression))
        for name in sorted(self.named):
            self.message(name, schema)
        self.pool = descriptor_pool.DescriptorPool()
        for module in (any_pb2, struct_pb2):
            self.pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        self.pool.AddSerializedFile(self.file.SerializeToString())
        self.env = cel.NewEnv(self.pool, variables={"object": cel.Type.DYN})

    def message(self, name, schema):
        node = schema.at(name.split(".")[1:])
        message = self.file.message_type.add(name=name.replace(".", "_"))
        for field, kind in node.get("properties", {}).items():
            kind = schema.resolve(kind)
            repeated = kind.get("type") == "array" or "array" in kind.get("type", ())
            kind = schema.resolve(kind["items"]) if repeated else kind
            if f"{name}.{field}" in self.named:
                self.add(message, field, f".{name}.{field}".replace(".", "_").replace("_Object", ".Object", 1), repeated)
            elif "additionalProperties" in kind and isinstance(kind["additionalProperties"], dict):
                entry = message.nested_type.add(name=f"{field.capitalize()}Entry")
                entry.options.map_entry = True
                self.add(entry, "key", "TYPE_STRING", optional=False)
                self.add(entry, "value", "TYPE_STRING", optional=False)
                self.add(message, field, f".{message.name}.{entry.name}", repeated=True)
            elif scalar := self.scalar(kind):
                self.add(message, field, scalar, repeated)

    def scalar(self, kind):
        if "oneOf" in kind:
            return ".google.protobuf.Value"  # a number or a name
        types = [kind.get("type")] if isinstance(kind.get("type"), str) else kind.get("type", [])
        return next((self.SCALARS[each] for each in types if each in self.SCALARS), None)

    def add(self, message, name, kind, repeated=False, optional=True):
        field = message.field.add(name=name, number=len(message.field) + 1)
        field.label = self.field.LABEL_REPEATED if repeated else self.field.LABEL_OPTIONAL
        if kind.startswith("."):
            field.type, field.type_name = self.field.TYPE_MESSAGE, kind
            return
        field.type = self.field.Type.Value(kind)
        if optional and not repeated:
            # Without this, `false` and 0 would be as if absent.
            field.proto3_optional, field.oneof_index = True, len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{name}")

    def compile(self, expression):
        expression = re.sub(r"\bObject(?:\.\w+)*(?=\{)", lambda name: name[0].replace(".", "_"), expression)
        try:
            return Expression(self.env, expression)
        except RuntimeError as error:
            raise Drift(str(error)) from None

    def size(self, expression, variables):
        return expression.part("size(%s)").eval(data=variables).value()

    def operation(self, expression, variables, index):
        from google.protobuf import json_format, message_factory

        patch = expression.part(f"(%s)[{index}]").eval(data=variables).value()
        value = message_factory.GetMessageClass(self.pool.FindMessageTypeByName(patch.value.TypeName()))()
        patch.value.Unpack(value)
        return patch.op, patch.path, json_format.MessageToDict(value, preserving_proto_field_name=True, descriptor_pool=self.pool)


class Expression:
    def __init__(self, env, text):
        self.env, self.text, self.parts = env, text, {}
        self.eval = env.compile(text).eval

    def part(self, wrapped):
        if wrapped not in self.parts:
            self.parts[wrapped] = self.env.compile(wrapped % self.text)
        return self.parts[wrapped]


class Schema:
    """The schema of a Pod, as kubernetes-validate brings it."""

    def __init__(self, version):
        import kubernetes_validate

        folder = pathlib.Path(kubernetes_validate.__file__).parent / f"kubernetes-json-schema/v{version}.0-local-strict"
        self.pod = json.loads((folder / "pod-v1.json").read_text())
        self.definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]

    def resolve(self, node):
        while "$ref" in node:
            node = self.definitions[node["$ref"].rsplit("/", 1)[1]]
        return node

    def at(self, path):
        node = self.pod
        for field in path:
            node = self.resolve(node["properties"][field])
            if "items" in node:
                node = self.resolve(node["items"])
        return node


# The chart


def chart_lints(chart):
    run("helm", "lint", "--strict", "--quiet", chart)


def chart_renders_the_manifests(kubernetes):
    """With the values as they are: what Kustomize makes of the same manifests."""
    with tempfile.TemporaryDirectory() as scratch:
        files = ("policy.yaml", "network-policy.yaml", "pod-monitor.yaml", "component/config-map.example.yaml")
        for file in files:
            shutil.copy(kubernetes / file, scratch)
        (pathlib.Path(scratch) / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [pathlib.Path(file).name for file in files]}))
        wanted = by_name(run("kubectl", "kustomize", scratch))
    same("chart and manifests", template(kubernetes / "chart", "podMonitor.enabled=true"), wanted)
    by_default = {key: thing for key, thing in wanted.items() if key[0] != "PodMonitor"}
    same("chart by default", template(kubernetes / "chart"), by_default)
    none = ("policy.enabled=false", "networkPolicy.enabled=false", "configMap.enabled=false")
    same("chart, all off", template(kubernetes / "chart", *none), {})


def chart_of_an_app(kubernetes):
    """A chart that takes container and volume from ours: the Deployments of the component."""
    rendered = {key: thing for key, thing in kustomized(kubernetes / "component").items() if key[0] == "Deployment"}
    same("named templates and component", app(kubernetes / "chart", {}), rendered)
    # Values reach the policy and the templates alike.
    values = {
        "image": 'registry.example.com/"other":2',
        "args": ["serve", "--pool-mode=transaction"],
        "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "1Gi", "cpu": "2"}},
        "audience": "https://<&>'\\",
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        things = by_name(run("helm", "template", "any", kubernetes / "chart", "--values", file.name))
    policy = Policy(things["MutatingAdmissionPolicy", "lakebase-proxy"])
    changed = app(kubernetes / "chart", values)
    for name, spec in PODS.items():
        wanted = changed["Deployment", name]["spec"]["template"]["spec"]
        same(f"policy and templates with values, {name}", policy.admit(pod(spec, LABEL))["spec"], wanted)
        container, volume = wanted["initContainers"][0], wanted["volumes"][0]
        audience = volume["projected"]["sources"][0]["serviceAccountToken"]["audience"]
        got = {key: container[key] for key in ("image", "args", "resources")} | {"audience": audience}
        for part in ("requests", "limits"):
            values["resources"][part] = {**default_resources(kubernetes)[part], **values["resources"][part]}
        same(f"values, {name}", got, values)


def default_resources(kubernetes):
    return yaml.safe_load((kubernetes / "chart/values.yaml").read_text())["resources"]


def app(chart, values):
    """PODS as the Deployments of a chart that depends on ours."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        (scratch / "templates").mkdir()
        shutil.copytree(chart, scratch / "charts/lakebase-proxy")
        (scratch / "Chart.yaml").write_text("apiVersion: v2\nname: app\nversion: 1.0.0\n")
        off = {"policy": {"enabled": False}, "networkPolicy": {"enabled": False}, "configMap": {"enabled": False}}
        (scratch / "values.yaml").write_text(yaml.safe_dump({"lakebase-proxy": {**off, **values}}))
        for name, spec in PODS.items():
            thing = deployment(name, {"initContainers": [], "volumes": [], **copy.deepcopy(spec)})
            template = thing["spec"]["template"]
            template["metadata"]["labels"] = {**template["metadata"]["labels"], **LABEL}
            for field, part in (("initContainers", "container"), ("volumes", "volume")):
                template["spec"][field] = [f"HERE {part}", *template["spec"][field]]
            text = yaml.safe_dump(thing)
            text = re.sub(r"^( *)- HERE (\w+)$", r'{{ include "lakebase-proxy.\2" (index .Subcharts "lakebase-proxy") | indent 6 }}', text, flags=re.MULTILINE)
            (scratch / f"templates/{name}.yaml").write_text(text)
        return by_name(run("helm", "template", "any", scratch))


def template(chart, *settings):
    return by_name(run("helm", "template", "any", chart, *(f"--set={setting}" for setting in settings)))


# All


def by_name(text):
    return {(thing["kind"], thing["metadata"]["name"]): thing for thing in yaml.safe_load_all(text) if thing}


def same(what, made, wanted):
    if made != wanted:
        raise Drift(f"{what}: {difference(made, wanted)}")


def difference(made, wanted, at=""):
    if isinstance(made, dict) and isinstance(wanted, dict):
        for key in made.keys() | wanted.keys():
            if key not in made or key not in wanted:
                return f"{at}/{key} is {'missing' if key not in made else 'too much'}"
            if made[key] != wanted[key]:
                return difference(made[key], wanted[key], f"{at}/{key}")
    if isinstance(made, list) and isinstance(wanted, list) and len(made) == len(wanted):
        index = next(index for index, pair in enumerate(zip(made, wanted)) if pair[0] != pair[1])
        return difference(made[index], wanted[index], f"{at}/{index}")
    return f"{at}: {made!r} instead of {wanted!r}"[:300]


def run(*command):
    done = subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise Drift((done.stdout + done.stderr).strip())
    return done.stdout
