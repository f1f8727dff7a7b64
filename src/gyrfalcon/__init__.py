"""Gyrfalcon: a text-generation inference server for teams that run open models themselves."""

__version__ = "0.1.0"
