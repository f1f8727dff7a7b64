"""What manifests must keep to: the schemas of the Kubernetes API, and of the resources that others define.

The others' schemas are written down in schemas/ from their published definitions, as far as the manifests here use
them, and closed: a field that is not there is an error.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

OLDEST, NEWEST = "1.25", "1.37"
FOREIGN = Path(__file__).parent / "schemas"
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def validate(document: dict[str, Any]) -> None:
    """Raise where an object breaks its schema, in the oldest or the newest version of the API."""
    group, _, version = document["apiVersion"].rpartition("/")
    foreign = FOREIGN / f"{group}_{version}_{document['kind']}.json"
    if foreign.exists():
        jsonschema.validate(document, _read(foreign))
        if group == "kaito.sh":
            _check_kaito(document)
        return
    for api in (OLDEST, NEWEST):
        kubernetes_validate.validate(document, api, strict=True)


@cache
def _read(path: Path) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


def _check_kaito(document: dict[str, Any]) -> None:
    """What KAITO's admission checks beyond the schema, and what its controller relies on with a template."""
    assert DNS_LABEL.fullmatch(document["metadata"]["name"])
    body = document if document["kind"] == "Workspace" else document["spec"]["template"]
    selector = body["resource"] if document["kind"] == "Workspace" else document["spec"]
    assert selector["labelSelector"]["matchLabels"]
    instance = body["resource"].get("instanceType", "")
    assert instance.startswith(("Standard_N", "Standard_D")), f"{instance} is no N or D series of Azure"
    assert set(body["inference"]) == {"template"}
    template = body["inference"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "template"}, "spec": template["spec"]}
    validate(pod)
    assert "affinity" not in template["spec"], "the controller replaces it"
    (container,) = template["spec"]["containers"]
    assert [port["containerPort"] for port in container["ports"]] == [5000], "its Services send to 5000"
    limits = container["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) == instance.startswith("Standard_N")
