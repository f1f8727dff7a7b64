"""Kubernetes manifests, filled in for a model: sized by `gyrfalcon.footprint`."""
