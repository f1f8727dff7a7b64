"""A deployment as Kubernetes objects: plain values, in the order in which people read them."""

from __future__ import annotations

from typing import Any

from gyrfalcon.deploy.plan import (
    DATA,
    GIB,
    KAITO_PORT,
    MIB,
    PRE_STOP_S,
    STARTUP_FAILURES,
    STARTUP_PERIOD_S,
    USER,
    DeployPlan,
    Instance,
)

Object = dict[str, Any]

QUEUE_METRIC = "tgi_queue_size"
QUEUE_TARGET = 4  # waiting requests for each replica, above which another is started
PROMETHEUS_URL = "http://prometheus-operated.monitoring.svc:9090"
MONITORING_NAMESPACE = "monitoring"


def labels(plan: DeployPlan) -> dict[str, str]:
    """What selects the plan's pods, and marks all its objects."""
    return {"app.kubernetes.io/name": "gyrfalcon", "app.kubernetes.io/instance": plan.name}


def all_objects(plan: DeployPlan) -> dict[str, Object]:
    """Every object by the name of its file."""
    objects = {
        "service-account": service_account(plan),
        "deployment": deployment(plan),
        "service": service(plan),
        "pod-disruption-budget": disruption_budget(plan),
        "network-policy": network_policy(plan),
    }
    if plan.autoscale == "hpa":
        objects["autoscaler"] = autoscaler(plan)
    elif plan.autoscale == "keda":
        objects["scaled-object"] = scaled_object(plan)
    if plan.has_monitor:
        objects["service-monitor"] = service_monitor(plan)
    return objects


def service_account(plan: DeployPlan) -> Object:
    """An identity without rights: nothing in the pod talks to the cluster."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _metadata(plan),
        "automountServiceAccountToken": False,
    }


def deployment(plan: DeployPlan) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(plan),
        "spec": {
            **({} if plan.autoscale != "none" else {"replicas": plan.replicas}),
            "revisionHistoryLimit": 3,
            # Beyond the time that a start may take.
            "progressDeadlineSeconds": STARTUP_PERIOD_S * STARTUP_FAILURES + 300,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": labels(plan)},
            "template": {
                "metadata": {"labels": labels(plan)},
                "spec": {"serviceAccountName": plan.name, **pod_spec(plan, plan.port)},
            },
        },
    }


def pod_spec(plan: DeployPlan, port: int) -> Object:
    """The pod: the same in a Deployment and in KAITO's Workspaces."""
    spec: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": plan.grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if plan.num_gpus:
        spec["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"},
        ]
    if plan.weights == "download":
        spec["initContainers"] = [_download_container(plan)]
    spec["containers"] = [_server_container(plan, port)]
    spec["volumes"] = _volumes(plan)
    return spec


def _download_container(plan: DeployPlan) -> Object:
    return {
        "name": "download",
        "image": plan.image,
        "imagePullPolicy": "IfNotPresent",
        "args": ["download", plan.planned.model, "--huggingface-hub-cache", DATA],
        "env": [{"name": "HOME", "value": "/tmp"}, *_hub_token(plan)],  # noqa: S108  (an emptyDir of the pod)
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "4Gi"}},
        "securityContext": _container_security(),
        "volumeMounts": [{"name": "data", "mountPath": DATA}, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
    }


def _server_container(plan: DeployPlan, port: int) -> Object:
    probe = {"httpGet": {"path": "/health/ready", "port": "http"}}
    return {
        "name": "server",
        "image": plan.image,
        "imagePullPolicy": "IfNotPresent",
        "args": server_arguments(plan, port),
        "env": _environment(plan),
        "ports": [{"name": "http", "containerPort": port}],
        "startupProbe": {**probe, "periodSeconds": STARTUP_PERIOD_S, "failureThreshold": STARTUP_FAILURES},
        "readinessProbe": {**probe, "periodSeconds": 5, "timeoutSeconds": 3, "failureThreshold": 2},
        "livenessProbe": {
            "httpGet": {"path": "/health/live", "port": "http"},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
        },
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP_S)]}}},
        "resources": resources(plan),
        "securityContext": _container_security(),
        "volumeMounts": _mounts(plan),
    }


def server_arguments(plan: DeployPlan, port: int) -> list[str]:
    """The command line of the server, without the program."""
    planned, load = plan.planned, plan.planned.load
    tokens = load.concurrency * -(-load.context // load.block_size) * load.block_size
    arguments = ["serve", planned.model, "--host", "0.0.0.0", "--port", str(port)]  # noqa: S104
    arguments += ["--device", planned.device, "--dtype", planned.dtype]
    arguments += ["--quantize", planned.quantize] if planned.quantize else []
    arguments += ["--max-total-tokens", str(load.context), "--max-batch-size", str(load.concurrency)]
    arguments += ["--max-batch-total-tokens", str(tokens)]
    arguments += ["--num-threads", str(plan.cpus)] if planned.device == "cpu" else []
    if plan.weights in ("download", "claim"):
        arguments += ["--huggingface-hub-cache", DATA]
    arguments += ["--offline", "--graceful-termination-timeout", str(plan.drain_s), "--json-output"]
    return arguments


def _environment(plan: DeployPlan) -> list[Object]:
    variables: list[Object] = [{"name": "HOME", "value": "/tmp"}]  # noqa: S108  (an emptyDir of the pod)
    if not plan.is_writable:
        # Weights packed for this processor are kept beside the weights, or not at all.
        variables.append({"name": "GYRFALCON_PACKED_CACHE", "value": "off"})
    if plan.api_key_secret is not None:
        reference = {"name": plan.api_key_secret, "key": "API_KEY"}
        variables.append({"name": "API_KEY", "valueFrom": {"secretKeyRef": reference}})
    return variables


def _hub_token(plan: DeployPlan) -> list[Object]:
    if plan.hub_token_secret is None:
        return []
    reference = {"name": plan.hub_token_secret, "key": "HF_TOKEN"}
    return [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}}]


def resources(plan: DeployPlan) -> Object:
    """Requests and limits; processors have no limit, which would only make them idle."""
    gpus: dict[str, object] = {"nvidia.com/gpu": plan.num_gpus} if plan.num_gpus else {}
    memory = quantity(plan.memory_bytes)
    return {
        "requests": {"cpu": str(plan.cpus), "memory": memory, **gpus},
        "limits": {"memory": memory, **gpus},
    }


def _container_security() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _mounts(plan: DeployPlan) -> list[Object]:
    mounts: list[Object] = [
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        {"name": "dshm", "mountPath": "/dev/shm"},  # noqa: S108
    ]
    if plan.weights in ("download", "claim"):
        data: Object = {"name": "data", "mountPath": DATA}
        mounts.append({**data, "readOnly": True} if plan.weights == "claim" else data)
    return mounts


def _volumes(plan: DeployPlan) -> list[Object]:
    shared = "2Gi" if plan.num_gpus else "64Mi"
    volumes: list[Object] = [
        {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
        {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": shared}},
    ]
    if plan.weights == "claim":
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": plan.claim, "readOnly": True}})
    elif plan.weights == "download":
        claim = {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": quantity(plan.storage_bytes)}},
        }
        volumes.append({"name": "data", "ephemeral": {"volumeClaimTemplate": {"spec": claim}}})
    return volumes


def service(plan: DeployPlan) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(plan),
        "spec": {
            "selector": labels(plan),
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }


def disruption_budget(plan: DeployPlan) -> Object:
    """Nodes are emptied one pod at a time."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(plan),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": labels(plan)}},
    }


def network_policy(plan: DeployPlan) -> Object:
    """In: this namespace and the one that collects metrics. Out: names, and HTTPS where weights are fetched."""
    out: list[Object] = []
    if plan.weights == "download":
        out = [
            {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
            {"ports": [{"port": 443, "protocol": "TCP"}]},
        ]
    monitoring = {"matchLabels": {"kubernetes.io/metadata.name": MONITORING_NAMESPACE}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(plan),
        "spec": {
            "podSelector": {"matchLabels": labels(plan)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {
                    "from": [{"podSelector": {}}, {"namespaceSelector": monitoring}],
                    "ports": [{"port": "http", "protocol": "TCP"}],
                }
            ],
            "egress": out,
        },
    }


def autoscaler(plan: DeployPlan) -> Object:
    """Replicas by the length of their queues. The metric comes from an adapter of Prometheus' metrics."""
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _metadata(plan),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": plan.name},
            "minReplicas": plan.replicas,
            "maxReplicas": plan.max_replicas,
            "metrics": [
                {
                    "type": "Pods",
                    "pods": {
                        "metric": {"name": QUEUE_METRIC},
                        "target": {"type": "AverageValue", "averageValue": str(QUEUE_TARGET)},
                    },
                }
            ],
            "behavior": _behavior(),
        },
    }


def scaled_object(plan: DeployPlan) -> Object:
    """The same with KEDA, which asks Prometheus itself."""
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": _metadata(plan),
        "spec": {
            "scaleTargetRef": {"name": plan.name},
            "minReplicaCount": plan.replicas,
            "maxReplicaCount": plan.max_replicas,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior()}},
            "triggers": [
                {
                    "type": "prometheus",
                    "metricType": "AverageValue",
                    "metadata": {
                        "serverAddress": PROMETHEUS_URL,
                        "query": f'sum({QUEUE_METRIC}{{service="{plan.name}"}})',
                        "threshold": str(QUEUE_TARGET),
                    },
                }
            ],
        },
    }


def _behavior() -> Object:
    """Up at once, since a start takes minutes; down slowly, one at a time."""
    return {
        "scaleUp": {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]},
        "scaleDown": {
            "stabilizationWindowSeconds": 600,
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 120}],
        },
    }


def service_monitor(plan: DeployPlan) -> Object:
    """Tells the Prometheus operator where metrics are; with a key where the server asks for one."""
    endpoint: Object = {"port": "http", "path": "/metrics", "interval": "15s"}
    if plan.api_key_secret is not None:
        credentials = {"name": plan.api_key_secret, "key": "API_KEY"}
        endpoint["authorization"] = {"type": "Bearer", "credentials": credentials}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": _metadata(plan),
        "spec": {"selector": {"matchLabels": labels(plan)}, "endpoints": [endpoint]},
    }


def workspace(plan: DeployPlan, instance: Instance) -> Object:
    """KAITO's Workspace: the pod as `inference.template`, on the port that KAITO's Service sends to."""
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": plan.name},
        "resource": {
            "instanceType": instance.name,
            "labelSelector": {"matchLabels": {"apps": plan.name}},
        },
        "inference": {"template": _template(plan)},
    }


def inference_set(plan: DeployPlan, instance: Instance) -> Object:
    """KAITO's InferenceSet: several such Workspaces."""
    return {
        "apiVersion": "kaito.sh/v1alpha1",
        "kind": "InferenceSet",
        "metadata": {"name": plan.name},
        "spec": {
            "replicas": plan.replicas,
            "nodeCountLimit": plan.max_replicas,
            "labelSelector": {"matchLabels": {"apps": plan.name}},
            "template": {
                "resource": {"instanceType": instance.name},
                "inference": {"template": _template(plan)},
            },
        },
    }


def _template(plan: DeployPlan) -> Object:
    return {"metadata": {"labels": labels(plan)}, "spec": pod_spec(plan, KAITO_PORT)}


def _metadata(plan: DeployPlan) -> Object:
    return {"name": plan.name, "labels": labels(plan)}


def quantity(num_bytes: int) -> str:
    """Bytes as Kubernetes writes them, exact: a multiple of a MiB."""
    return f"{num_bytes // GIB}Gi" if num_bytes % GIB == 0 else f"{-(-num_bytes // MIB)}Mi"
