"""The device's operations. The door is `interface`; `reference` is the plain PyTorch every faster version is held to."""
