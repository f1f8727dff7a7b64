"""The device's operations. The door is `interface`; `reference` is plain PyTorch, the measure of every faster one."""
