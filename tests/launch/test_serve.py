"""The manifest of the server: fields that Kubernetes knows, and values that fit the program."""

import argparse

import pytest

from chatpose_jax.cli import serve

from .test_launch import LAUNCH, NUMBER, TEXT, check

yaml = pytest.importorskip("yaml")

LABELS = {"*": TEXT}
PROBE = {
    "httpGet": {"path": TEXT, "port": NUMBER}, "periodSeconds": NUMBER, "timeoutSeconds?": NUMBER, "failureThreshold?": NUMBER,
}  # fmt: skip
CONTAINER = {
    "name": TEXT, "image": TEXT, "args": [TEXT], "env": [{"name": TEXT, "value": TEXT}], "ports": [{"containerPort": NUMBER}],
    "startupProbe": PROBE, "readinessProbe": PROBE, "livenessProbe": PROBE, "resources": {"limits": {"*": NUMBER}},
    "securityContext": {"allowPrivilegeEscalation": bool, "readOnlyRootFilesystem": bool},
    "volumeMounts": [{"name": TEXT, "mountPath": TEXT, "readOnly?": bool}],
}  # fmt: skip
DEPLOYMENT = {
    "apiVersion": TEXT, "kind": TEXT, "metadata": {"name": TEXT},
    "spec": {
        "replicas": NUMBER, "selector": {"matchLabels": LABELS},
        "template": {
            "metadata": {"labels": LABELS},
            "spec": {
                "terminationGracePeriodSeconds": NUMBER, "containers": [CONTAINER],
                "securityContext": {"runAsNonRoot": bool, "runAsUser": NUMBER, "fsGroup": NUMBER},
                "volumes": [{"name": TEXT, "secret?": {"secretName": TEXT}, "emptyDir?": {}}],
            },
        },
    },
}  # fmt: skip
SERVICE = {
    "apiVersion": TEXT, "kind": TEXT, "metadata": {"name": TEXT},
    "spec": {"selector": LABELS, "sessionAffinity": TEXT, "ports": [{"port": NUMBER, "targetPort": NUMBER}]},
}  # fmt: skip


def test_the_server_of_the_manifest_starts_and_ends_as_kubernetes_expects():
    deployment, service = yaml.safe_load_all((LAUNCH / "serve.yaml").read_text())
    check(deployment, DEPLOYMENT)
    check(service, SERVICE)
    assert (deployment["apiVersion"], deployment["kind"], service["kind"]) == ("apps/v1", "Deployment", "Service")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    pod = template["spec"]
    [container] = pod["containers"]
    command, *arguments = container["args"]
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(arguments)
    assert command == "serve" and args.host == "0.0.0.0" and args.grace < pod["terminationGracePeriodSeconds"]
    ports = [probe["httpGet"]["port"] for name, probe in container.items() if name.endswith("Probe")]
    assert {*ports, container["ports"][0]["containerPort"], service["spec"]["ports"][0]["targetPort"]} == {args.port}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert str(args.key_file).rpartition("/")[0] in mounts and "secret" in volumes[mounts["/key"]]
    assert "emptyDir" in volumes[mounts["/tmp"]], "the root is read only, and poses' files are made there"
    assert container["env"][0]["value"] in mounts


def test_probes_ask_what_needs_no_key():
    pytest.importorskip("starlette")
    pytest.importorskip("prometheus_client")
    from chatpose_jax.serve.app import OPEN

    deployment, _ = yaml.safe_load_all((LAUNCH / "serve.yaml").read_text())
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    probes = [probe for name, probe in container.items() if name.endswith("Probe")]
    assert len(probes) == 3 and all(OPEN.fullmatch(probe["httpGet"]["path"]) for probe in probes)
