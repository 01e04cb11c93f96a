"""See the package docstring."""

from cpu_standin import missing_functions

__getattr__ = missing_functions(__name__)
