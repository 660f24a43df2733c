"""The library's version, as its package states it."""

from importlib.metadata import version

__version__ = version("kvzip")
