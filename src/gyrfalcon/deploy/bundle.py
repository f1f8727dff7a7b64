"""A deployment as files: plain manifests, a Kustomize folder, values of the Helm chart, a KAITO Workspace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import yaml

from gyrfalcon.deploy import objects
from gyrfalcon.deploy.plan import PRE_STOP_S, STARTUP_FAILURES, STARTUP_PERIOD_S, DeployPlan, choose_instance

Kind = Literal["plain", "kustomize", "helm-values", "kaito-workspace", "kaito-inferenceset"]
KINDS: tuple[Kind, ...] = ("plain", "kustomize", "helm-values", "kaito-workspace", "kaito-inferenceset")

_WIDTH = 120


class _Dumper(yaml.SafeDumper):
    """YAML as people write it: lists indented, no references between equal parts."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Lines as lines."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def to_yaml(value: Any) -> str:
    """One document, members in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=_WIDTH, allow_unicode=True)


def stream(documents: Iterable[Any], heading: str = "") -> str:
    """Several documents in one text; the heading becomes comment lines at its top."""
    comment = "".join(f"# {line}\n" if line else "#\n" for line in heading.splitlines())
    return comment + "---\n".join(to_yaml(document) for document in documents)


def files(plan: DeployPlan, kind: Kind) -> dict[str, str]:
    """The bundle's texts by file name. Raises SettingsError where KAITO has no node for the plan."""
    if kind == "helm-values":
        return {"values.yaml": to_yaml(helm_values(plan))}
    if kind == "kaito-workspace":
        return {"workspace.yaml": to_yaml(objects.workspace(plan, choose_instance(plan.planned)))}
    if kind == "kaito-inferenceset":
        return {"inferenceset.yaml": to_yaml(objects.inference_set(plan, choose_instance(plan.planned)))}
    texts = {f"{name}.yaml": to_yaml(each) for name, each in objects.all_objects(plan).items()}
    if kind == "kustomize":
        listed = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": sorted(texts)}
        texts["kustomization.yaml"] = to_yaml(listed)
    return texts


def helm_values(plan: DeployPlan) -> dict[str, Any]:
    """Values of the chart in deploy/helm/gyrfalcon that make it render the same objects."""
    repository, _, tag = plan.image.rpartition(":")
    if not repository or "/" in tag:  # no tag: what looked like one was a registry's port
        repository, tag = plan.image, "latest"
    pod = objects.pod_spec(plan, plan.port)
    return {
        "nameOverride": plan.name,
        "image": {"repository": repository, "tag": tag, "pullPolicy": "IfNotPresent", "pullSecrets": []},
        "model": plan.planned.model,
        "args": objects.server_arguments(plan, plan.port),
        "extraArgs": [],
        "port": plan.port,
        "replicas": plan.replicas,
        "resources": objects.resources(plan),
        "weights": {
            "source": plan.weights,
            "claim": plan.claim or "",
            "storage": objects.quantity(plan.storage_bytes),
            "storageClassName": "",
        },
        "sharedMemory": "2Gi" if plan.num_gpus else "64Mi",
        "tolerations": pod.get("tolerations", []),
        "nodeSelector": {},
        "affinity": {},
        "podAnnotations": {},
        "extraEnv": [],
        "apiKeySecret": plan.api_key_secret or "",
        "hubTokenSecret": plan.hub_token_secret or "",
        "startupProbe": {"periodSeconds": STARTUP_PERIOD_S, "failureThreshold": STARTUP_FAILURES},
        "preStopSeconds": PRE_STOP_S,
        "terminationGracePeriodSeconds": plan.grace_s,
        "podDisruptionBudget": {"enabled": True, "maxUnavailable": 1},
        "networkPolicy": {"enabled": True, "monitoringNamespace": objects.MONITORING_NAMESPACE},
        "autoscaling": {
            "kind": plan.autoscale,
            "minReplicas": plan.replicas,
            "maxReplicas": plan.max_replicas,
            "queueTarget": objects.QUEUE_TARGET,
            "prometheus": objects.PROMETHEUS_URL,
        },
        "serviceMonitor": {"enabled": plan.has_monitor, "interval": "15s"},
    }
