"""The version: said once, for the package, its metadata and the folders of runs."""

__version__ = "0.1.0.dev0"
