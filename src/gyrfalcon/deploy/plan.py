"""What a deployment of one model is made of, before it is written as objects of one kind or another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from gyrfalcon.errors import SettingsError
from gyrfalcon.footprint import DEVICE_DEFAULTS, Planned, num_devices

GIB = 1024**3
MIB = 1024**2

Autoscale = Literal["none", "hpa", "keda"]
WeightsFrom = Literal["package", "download", "image", "claim"]

PORT = 8080
KAITO_PORT = 5000  # what KAITO's Services send their traffic to
USER = 10001
DATA = "/data"  # the volume of Text Generation Inference's image
IMAGE = "gyrfalcon"

# Time for the cluster to send no more requests to a pod that ends, before the server is told to.
PRE_STOP_S = 10
# From the server's answer to its process being gone: engine closed, traces sent.
SHUTDOWN_MARGIN_S = 15
STARTUP_PERIOD_S = 5
STARTUP_FAILURES = 360  # 30 minutes: pulling an image with weights is not in it, fetching weights is not either

# Memory asked for above what is worked out: allocators, page tables, requests in flight.
HEADROOM = 1.1
# A volume for weights holds them once as fetched, and once as packed for this processor; and some room.
STORAGE_FACTOR = 2.2


@dataclass(frozen=True, slots=True)
class Instance:
    """A kind of node that KAITO knows by name. memory_bytes: of one of its GPUs, as programs see it."""

    name: str
    num_gpus: int
    memory_bytes: int
    has_bfloat16: bool = True


# Ascending: the first that fits is taken. https://github.com/kaito-project/kaito lists what its controller accepts.
INSTANCES = (
    Instance("Standard_NC4as_T4_v3", 1, int(14.6 * GIB), has_bfloat16=False),
    Instance("Standard_NC24ads_A100_v4", 1, int(79.1 * GIB)),
    Instance("Standard_NC40ads_H100_v5", 1, int(93.1 * GIB)),
    Instance("Standard_ND96isr_H200_v5", 8, int(139.8 * GIB)),
)
# Nodes without a GPU, by memory; a node's own parts take about a tenth of it.
CPU_INSTANCES = tuple(
    Instance(f"Standard_D{cpus}s_v5", 0, int(4 * cpus * GIB * 0.9)) for cpus in (4, 8, 16, 32, 48, 64, 96)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployPlan:
    """A deployment. A plan that exists is complete and fits its device.

    name: of every object. cpus: requested, and on CPU the threads of the model. storage_bytes: of the volume that
    weights are downloaded to. claim: a PersistentVolumeClaim that holds the Hub's cache. *_secret: names of Secrets,
    with the keys API_KEY and HF_TOKEN.
    """

    name: str
    planned: Planned
    image: str
    port: int
    replicas: int
    max_replicas: int
    cpus: int
    memory_bytes: int
    storage_bytes: int
    weights: WeightsFrom
    claim: str | None
    api_key_secret: str | None
    hub_token_secret: str | None
    drain_s: int
    autoscale: Autoscale
    has_monitor: bool

    @property
    def grace_s(self) -> int:
        """Seconds until a pod that ends is killed: longer than all that it may do until then."""
        return PRE_STOP_S + self.drain_s + SHUTDOWN_MARGIN_S

    @property
    def num_gpus(self) -> int:
        return 1 if self.planned.device == "cuda" else 0

    @property
    def is_writable(self) -> bool:
        """Whether the folder of the weights can be written to."""
        return self.weights == "download"


def plan_deployment(
    planned: Planned,
    *,
    weights: WeightsFrom,
    name: str | None = None,
    image: str | None = None,
    port: int = PORT,
    replicas: int = 1,
    max_replicas: int | None = None,
    cpus: int | None = None,
    claim: str | None = None,
    api_key_secret: str | None = None,
    hub_token_secret: str | None = None,
    drain_s: int = 45,
    autoscale: Autoscale = "none",
    has_monitor: bool = False,
) -> DeployPlan:
    """The plan with everything worked out that is not given. Raises SettingsError naming the option."""
    if weights == "claim" and claim is None:
        raise SettingsError("--claim", "names the PersistentVolumeClaim that holds the weights, and is missing")
    chosen = name or name_of(planned.model)
    if re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", chosen) is None:
        raise SettingsError(
            "--name", f"`{chosen}` cannot name a Kubernetes object: small letters, digits and dashes, 63 at most"
        )
    whole = planned.footprint()
    defaults = DEVICE_DEFAULTS[planned.device]
    on_host = defaults.host_bytes + (whole.total if planned.device == "cpu" else 0)
    return DeployPlan(
        name=chosen,
        planned=planned,
        image=image or f"{IMAGE}:{planned.device}",
        port=port,
        replicas=replicas,
        max_replicas=max_replicas or max(replicas, 4),
        cpus=cpus or _cpus(planned, whole.weights),
        memory_bytes=_round_up(int(on_host * HEADROOM), 256 * MIB),
        storage_bytes=_round_up(int(whole.weights * STORAGE_FACTOR), GIB),
        weights=weights,
        claim=claim,
        api_key_secret=api_key_secret,
        hub_token_secret=hub_token_secret,
        drain_s=drain_s,
        autoscale=autoscale,
        has_monitor=has_monitor,
    )


def name_of(model: str) -> str:
    """A name for Kubernetes objects, from a preset, a Hub id or a folder."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    name = re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:63].strip("-")
    return name if name[:1].isalpha() else f"model-{name}".strip("-")


def choose_instance(planned: Planned) -> Instance:
    """The smallest kind of node that holds the plan on one of its devices. Raises SettingsError with remedies."""
    needed = planned.footprint().total
    if planned.device == "cpu":
        needed += DEVICE_DEFAULTS["cpu"].host_bytes
    for instance in CPU_INSTANCES if planned.device == "cpu" else INSTANCES:
        if needed <= instance.memory_bytes and (instance.has_bfloat16 or planned.dtype != "bfloat16"):
            return instance
    largest = (CPU_INSTANCES if planned.device == "cpu" else INSTANCES)[-1]
    how = {"dtype": planned.dtype, "quantize": planned.quantize, "device": planned.device}
    world = num_devices(largest.memory_bytes, planned.spec, planned.load, **how)  # type: ignore[arg-type]
    split = "" if world is None else f" ({world} would hold it, but a model runs on one device in this version)"
    raise SettingsError(
        "--concurrency",
        f"{planned.load.concurrency} sequences of {planned.load.context} tokens take {needed} bytes, and the largest "
        f"known device has {largest.memory_bytes}{split}; ask for fewer, for less --context, or for a smaller --dtype",
    )


def _cpus(planned: Planned, weights: int) -> int:
    """Processors: on CPU as many as a model of this size can use, on a GPU what feeding it takes."""
    if planned.device == "cuda":
        return 4
    return next(cpus for bound, cpus in ((GIB, 2), (4 * GIB, 4), (16 * GIB, 8), (1 << 62, 16)) if weights < bound)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
