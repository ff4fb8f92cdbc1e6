"""Finds, runs and proves the optimisation strategy of a PyTorch model.

>>> import downslope as ds
"""

__version__ = "0.1.0.dev0"
