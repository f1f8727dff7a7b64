"""The composition root: names every concrete part, once. `serving` is the front process, `device` the engine's.

Two modules, because the front process needs no torch and the engine's needs no web framework.
"""
