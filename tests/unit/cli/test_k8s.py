"""`gyrfalcon k8s`: manifests of every kind, filled in, valid, and refused where they could not work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gyrfalcon.cli.main import app
from gyrfalcon.deploy.plan import name_of
from gyrfalcon.errors import GyrfalconError
from gyrfalcon.presets import bundled_folder
from tests.deploy.schemas import validate


def k8s(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["k8s", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def objects_of(*arguments: str) -> dict[str, Any]:
    found = {each["kind"]: each for each in yaml.safe_load_all(k8s(*arguments))}
    for each in found.values():
        validate(each)
    return found


def server_of(found: dict[str, Any]) -> Any:
    return found["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def test_plain_manifests_go_to_standard_output() -> None:
    found = objects_of("falcon-7b-instruct")
    assert set(found) == {"ServiceAccount", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}
    server = server_of(found)
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert server["args"][:2] == ["serve", "falcon-7b-instruct"]
    (init,) = found["Deployment"]["spec"]["template"]["spec"]["initContainers"]
    assert init["args"][:2] == ["download", "falcon-7b-instruct"]


def test_options_reach_the_manifests() -> None:
    found = objects_of(
        "falcon-7b",
        *("--device", "cpu", "--quantize", "int8", "--context", "1024", "--concurrency", "4", "--cpus", "6"),
        *("--port", "5000", "--replicas", "2", "--max-replicas", "5", "--autoscale", "hpa", "--service-monitor"),
        *("--name", "seven", "--image", "registry.example/g:1", "--drain", "30"),
        *("--api-key-secret", "keys", "--hub-token-secret", "hub"),
    )
    server = server_of(found)
    arguments = server["args"]
    for flag, value in {
        "--quantize": "int8",
        "--max-total-tokens": "1024",
        "--max-batch-size": "4",
        "--max-batch-total-tokens": "4096",
        "--num-threads": "6",
        "--port": "5000",
        "--graceful-termination-timeout": "30",
    }.items():
        assert arguments[arguments.index(flag) + 1] == value
    assert server["image"] == "registry.example/g:1"
    assert server["resources"]["requests"]["cpu"] == "6"
    assert server["env"][-1]["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "API_KEY"}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["env"][-1]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "HF_TOKEN"}
    assert pod["terminationGracePeriodSeconds"] == 10 + 30 + 15
    assert "replicas" not in found["Deployment"]["spec"]
    scaling = found["HorizontalPodAutoscaler"]["spec"]
    assert (scaling["minReplicas"], scaling["maxReplicas"]) == (2, 5)
    assert found["ServiceMonitor"]["spec"]["endpoints"][0]["authorization"]["credentials"]["name"] == "keys"
    assert {each["metadata"]["name"] for each in found.values()} == {"seven"}


def test_keda_takes_the_place_of_the_autoscaler() -> None:
    found = objects_of("eyas", "--autoscale", "keda")
    (trigger,) = found["ScaledObject"]["spec"]["triggers"]
    assert "tgi_queue_size" in trigger["metadata"]["query"]
    assert "HorizontalPodAutoscaler" not in found


def test_memory_is_that_of_fit_with_some_room() -> None:
    def memory(*arguments: str) -> int:
        text = server_of(objects_of("falcon-7b", "--device", "cpu", *arguments))["resources"]["requests"]["memory"]
        return int(text[:-2]) * {"Mi": 1024**2, "Gi": 1024**3}[text[-2:]]

    whole = 13_843_441_408
    assert 1.05 * whole < memory() < 1.25 * whole
    assert memory("--quantize", "int8") < 0.65 * memory()


def test_weights_from_a_claim_are_mounted_and_not_fetched() -> None:
    pod = objects_of("falcon-7b", "--claim", "weights")["Deployment"]["spec"]["template"]["spec"]
    assert "initContainers" not in pod
    assert pod["volumes"][-1]["persistentVolumeClaim"] == {"claimName": "weights", "readOnly": True}
    assert pod["containers"][0]["volumeMounts"][-1] == {"name": "data", "mountPath": "/data", "readOnly": True}


def test_weights_in_the_image_need_no_volume() -> None:
    pod = objects_of("falcon-7b", "--weights", "image")["Deployment"]["spec"]["template"]["spec"]
    assert [volume["name"] for volume in pod["volumes"]] == ["tmp", "dshm"]
    assert "--huggingface-hub-cache" not in pod["containers"][0]["args"]


def test_a_folder_gets_one_file_for_each_object(tmp_path: Path) -> None:
    said = k8s("eyas", "--kind", "kustomize", "--output", str(tmp_path / "out")).splitlines()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {Path(line).name for line in said} == files
    listed = yaml.safe_load((tmp_path / "out" / "kustomization.yaml").read_text())["resources"]
    assert files == {"kustomization.yaml", *listed}


@pytest.mark.parametrize(("kind", "name"), [("kaito-workspace", "Workspace"), ("kaito-inferenceset", "InferenceSet")])
def test_kaitos_resources_listen_on_its_port_and_name_a_node_that_holds_the_model(kind: str, name: str) -> None:
    found = objects_of("falcon-40b-instruct", "--kind", kind)[name]
    place = found if name == "Workspace" else found["spec"]["template"]
    assert place["resource"]["instanceType"] == "Standard_NC40ads_H100_v5"
    (server,) = place["inference"]["template"]["spec"]["containers"]
    assert server["ports"] == [{"name": "http", "containerPort": 5000}]


def test_values_for_the_chart() -> None:
    values = yaml.safe_load(k8s("falcon-7b", "--kind", "helm-values", "--image", "registry.example:5000/g"))
    assert values["image"]["repository"] == "registry.example:5000/g"
    assert (values["image"]["tag"], values["model"]) == ("latest", "falcon-7b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("falcon-7b", "--kind", "terraform"), "--kind: `terraform` is not one of plain"),
        (("falcon-7b", "--autoscale", "yes"), "--autoscale: `yes` is not one of none, hpa, keda"),
        (("falcon-7b", "--name", "Falcon_7B"), "--name: `Falcon_7B` cannot name a Kubernetes object"),
        (("falcon-7b", "--weights", "claim"), "--claim: names the PersistentVolumeClaim"),
        (("falcon-7b", "--weights", "image", "--claim", "x"), "--claim: has no meaning with --weights image"),
        (("falcon-7b", "--replicas", "5", "--max-replicas", "2"), "--max-replicas: 2 is below --replicas 5"),
        ((str(bundled_folder()),), "--weights: .* is a folder of this machine"),
        (
            ("falcon-40b", "--kind", "kaito-workspace", "--concurrency", "9000"),
            "--concurrency: 9000 sequences of 2048 tokens take",
        ),
    ],
)
def test_what_could_not_work_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(GyrfalconError, match=message):
        k8s(*arguments)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("tiiuae/falcon-11B", "falcon-11b"),
        ("mistral-7b-instruct-v0.3", "mistral-7b-instruct-v0-3"),
        ("/a/7b/", "model-7b"),
    ],
)
def test_a_name_is_made_of_the_models(model: str, name: str) -> None:
    assert name_of(model) == name
