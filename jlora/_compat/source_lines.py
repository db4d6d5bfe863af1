"""The line of the user's program that an equation comes from."""

import os
import sysconfig

from jax._src import source_info_util

from jlora._compat.jaxprs import Eqn


def source_line(eqn: Eqn, *, of_library: bool = False) -> str:
    """The user's line that an equation comes from, `file:line (function)`; with `of_library` that of a library too."""
    for frame in source_info_util.user_frames(eqn.source_info.traceback):
        if frame.file_name.startswith(_TRACED_FROM):
            return ""
        if of_library or not frame.file_name.startswith(_LIBRARIES):
            return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"
    return ""


_JLORA = os.path.dirname(os.path.dirname(__file__)) + os.sep
_LIBRARIES = (_JLORA, sysconfig.get_path("purelib") + os.sep)
_TRACED_FROM = _JLORA + "_trace"  # what is called from there is the program
