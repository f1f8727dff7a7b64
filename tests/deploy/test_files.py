"""The files of deploy/: made from the code that `gyrfalcon k8s` uses, valid, and the same in every form."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from gyrfalcon.deploy import objects
from gyrfalcon.deploy.bundle import helm_values
from gyrfalcon.metrics import Metrics
from gyrfalcon.presets import catalogue
from tests.deploy.go_template import render_chart
from tests.deploy.kustomize import render
from tests.deploy.schemas import validate
from tools.deploy_files import CHART, NAME, all_files, base_plan, overlays, plan

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = all_files()
MANIFESTS = sorted(name for name in FILES if name.startswith(("kubernetes/", "kaito/", "kustomize/base/")))


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def by_kind(found: list[Any]) -> dict[str, Any]:
    assert len({each["kind"] for each in found}) == len(found)
    return {each["kind"]: each for each in found}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_made_file_is_what_the_tool_makes_now(name: str) -> None:
    assert (DEPLOY / name).read_text(encoding="utf-8") == FILES[name], "run: python tools/deploy_files.py"


def test_nothing_is_left_of_presets_that_are_gone() -> None:
    kept = {
        path.relative_to(DEPLOY).as_posix() for folder in ("kubernetes", "kaito") for path in DEPLOY.glob(f"{folder}/*")
    }
    assert kept == {name for name in FILES if name.startswith(("kubernetes/", "kaito/"))}


@pytest.mark.parametrize("name", [name for name in MANIFESTS if not name.endswith("kustomization.yaml")])
def test_a_manifest_keeps_to_its_schemas(name: str) -> None:
    for document in documents(DEPLOY / name):
        validate(document)


@pytest.mark.parametrize("preset", catalogue(), ids=lambda preset: preset.name)
def test_every_row_of_the_catalogue_has_its_files(preset: Any) -> None:
    root = DEPLOY.parent
    kinds = by_kind(documents(root / preset.manifest))
    assert preset.workload in kinds
    (workspace,) = documents(root / preset.workspace)
    assert (workspace["kind"], workspace["metadata"]["name"]) == (
        "Workspace",
        kinds[preset.workload]["metadata"]["name"],
    )


@pytest.mark.parametrize("name", sorted(overlays()))
def test_an_overlay_comes_to_the_objects_that_k8s_writes(name: str) -> None:
    rendered = by_kind(render(DEPLOY / "kustomize" / "overlays" / name))
    assert rendered == by_kind(list(objects.all_objects(overlays()[name]).values()))
    for document in rendered.values():
        validate(document)


@pytest.mark.parametrize("name", ["hpa", "keda", "service-monitor"])
def test_a_component_adds_its_object_and_leaves_the_replicas_to_it(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "overlay"
    folder.mkdir()
    base = DEPLOY / "kustomize"
    described = {"resources": [f"{base}/base"], "components": [f"{base}/components/{name}"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(described))
    kinds = by_kind(render(folder))
    for document in kinds.values():
        validate(document)
    assert len(kinds) == len(objects.all_objects(base_plan())) + 1
    assert ("replicas" in kinds["Deployment"]["spec"]) == (name == "service-monitor")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", ["base", *(f"overlays/{name}" for name in sorted(overlays()))])
def test_kubectl_renders_the_same(name: str) -> None:
    command = ["kubectl", "kustomize", str(DEPLOY / "kustomize" / name)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert by_kind(list(yaml.safe_load_all(text))) == by_kind(render(DEPLOY / "kustomize" / name))


SECRETS = {"api_key_secret": "keys", "hub_token_secret": "hub"}


@pytest.mark.parametrize(
    ("model", "device", "options"),
    [
        ("falcon-7b-instruct", None, {}),
        ("falcon-40b", None, {"replicas": 2, "autoscale": "hpa", "has_monitor": True, **SECRETS}),
        ("falcon-7b", "cpu", {"autoscale": "keda", "max_replicas": 9, "has_monitor": True}),
        ("eyas", None, {"name": NAME, "image": "registry.example/team/gyrfalcon:0.1.0", "port": 5000}),
    ],
)
def test_the_chart_renders_what_k8s_writes(model: str, device: Any, options: dict[str, Any]) -> None:
    deployed = plan(model, device, **options)
    rendered = render_chart(DEPLOY / CHART, helm_values(deployed))
    found = by_kind([document for each in rendered.values() for document in each])
    assert found == by_kind(list(objects.all_objects(deployed).values()))
    for document in found.values():
        validate(document)


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"podDisruptionBudget": {"enabled": False}}, "pod-disruption-budget.yaml", []),
        ({"networkPolicy": {"enabled": False}}, "network-policy.yaml", []),
    ],
)
def test_the_charts_switches_leave_objects_out(changes: dict[str, Any], place: str, expected: list[Any]) -> None:
    assert render_chart(DEPLOY / CHART, helm_values(plan("eyas")) | changes)[place] == expected


def test_the_charts_free_places_are_in_effect() -> None:
    values = helm_values(plan("falcon-7b-instruct")) | {
        "nodeSelector": {"pool": "gpu"},
        "affinity": {"nodeAffinity": {}},
        "podAnnotations": {"note": "x"},
        "extraEnv": [{"name": "GYRFALCON_LOG_LEVEL", "value": "debug"}],
        "extraArgs": ["--max-best-of", "2"],
    }
    values["image"]["pullSecrets"] = [{"name": "registry"}]
    values["weights"]["storageClassName"] = "fast"
    (document,) = render_chart(DEPLOY / CHART, values)["deployment.yaml"]
    validate(document)
    template = document["spec"]["template"]
    pod, (server,) = template["spec"], template["spec"]["containers"]
    assert template["metadata"]["annotations"] == {"note": "x"}
    assert (pod["nodeSelector"], pod["imagePullSecrets"]) == ({"pool": "gpu"}, [{"name": "registry"}])
    assert pod["affinity"] == {"nodeAffinity": {}}
    assert server["args"][-2:] == ["--max-best-of", "2"]
    assert server["env"][-1]["value"] == "debug"
    assert pod["volumes"][-1]["ephemeral"]["volumeClaimTemplate"]["spec"]["storageClassName"] == "fast"


def test_replicas_follow_a_metric_that_the_server_exports() -> None:
    metrics = Metrics()
    metrics.watch_engines(dict)
    assert f"\n{objects.QUEUE_METRIC} ".encode() in metrics.render()


def test_every_manifest_can_drain_within_its_grace_period_and_start_within_half_an_hour() -> None:
    for name in MANIFESTS:
        for document in documents(DEPLOY / name):
            if document.get("kind") not in ("Deployment", "Workspace"):
                continue
            pod = (document.get("spec") or document["inference"])["template"]["spec"]
            (server,) = pod["containers"]
            sleep = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
            drain = int(server["args"][server["args"].index("--graceful-termination-timeout") + 1])
            assert pod["terminationGracePeriodSeconds"] > sleep + drain
            probe = server["startupProbe"]
            assert probe["periodSeconds"] * probe["failureThreshold"] == 30 * 60


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_container_can_write_or_rise(name: str) -> None:
    for document in documents(DEPLOY / name):
        if document.get("kind") not in ("Deployment", "Workspace"):
            continue
        pod = (document.get("spec") or document["inference"])["template"]["spec"]
        security = pod["securityContext"]
        assert (security["runAsNonRoot"], security["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
        assert security["runAsUser"] >= 10000
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_the_validator_finds_what_is_wrong() -> None:
    good = objects.deployment(plan("eyas"))
    validate(good)
    bad = yaml.safe_load(yaml.safe_dump(good))
    bad["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["httpGet"]["paht"] = "/"
    with pytest.raises(Exception, match="paht"):
        validate(bad)
    (workspace,) = documents(DEPLOY / "kaito" / "falcon-7b.yaml")
    workspace["inference"]["preset"] = {"name": "falcon-7b"}
    with pytest.raises(Exception, match="preset"):
        validate(workspace)
