"""afd-server: large language models served with every decoder layer split between attention and FFN workers."""

from importlib.metadata import version

__version__ = version("afd-server")
