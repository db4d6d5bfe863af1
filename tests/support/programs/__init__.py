"""Kinds of program: what stands between a parameter and its use.

A program takes `use(params, inputs) -> y` and returns another function of parameters and inputs. `around` is applied
to the law's two sides instead: it takes `side(params, adapter, inputs)` and returns a function of the same arguments.
The modules here fill `PROGRAMS`.
"""

from tests.support.programs import control_flow, devices, transformations
from tests.support.programs.program import PROGRAMS, Program
from tests.support.programs.trees import floats, total

__all__ = ["PROGRAMS", "Program", "control_flow", "devices", "floats", "total", "transformations"]
