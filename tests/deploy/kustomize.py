"""Renders a Kustomize folder that keeps to resources, components, images and inline JSON patches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

_KNOWN = {"apiVersion", "kind", "resources", "components", "images", "patches"}


def render(folder: Path) -> list[Any]:
    """The objects that a folder with a kustomization.yaml comes to."""
    return _apply(folder, [])


def _apply(folder: Path, objects: list[Any]) -> list[Any]:
    described = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(described) <= _KNOWN, f"{folder}: {set(described) - _KNOWN} is not checked here"
    for name in described.get("resources", []):
        path = folder / name
        objects = objects + (render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text())))
    for name in described.get("components", []):
        objects = _apply(folder / name, objects)
    objects = copy.deepcopy(objects)
    for entry in described.get("patches", []):
        target = entry["target"]
        chosen = [
            each for each in objects if each["kind"] == target["kind"] and each["metadata"]["name"] == target["name"]
        ]
        assert chosen, f"{folder}: a patch has no object {target}"
        for each in chosen:
            for operation in yaml.safe_load(entry["patch"]):
                patch(each, operation)
    for image in described.get("images", []):
        for each in objects:
            _set_image(each, image)
    return objects


def patch(document: Any, operation: dict[str, Any]) -> None:
    """One operation of RFC 6902."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place = document
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    key = int(last) if isinstance(place, list) else last
    if operation["op"] == "remove":
        del place[key]
        return
    if operation["op"] == "replace":
        assert key in place or isinstance(place, list), f"nothing at {operation['path']}"
    place[key] = operation["value"]


def _set_image(value: Any, image: dict[str, str]) -> None:
    if isinstance(value, dict):
        if isinstance(value.get("image"), str) and value["image"].rpartition(":")[0] == image["name"]:
            value["image"] = f"{image['name']}:{image['newTag']}"
        for inner in value.values():
            _set_image(inner, image)
    elif isinstance(value, list):
        for inner in value:
            _set_image(inner, image)
