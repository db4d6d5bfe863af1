"""What each JAX primitive does to an adapted weight: one file for each subject, one function for each rule.

Importing this package registers jlora's rules. `registry.py` states what a rule is.
"""

from jlora._interpreter.rules import (
    arithmetic as arithmetic,
)
from jlora._interpreter.rules import (
    control_flow as control_flow,
)
from jlora._interpreter.rules import (
    conv as conv,
)
from jlora._interpreter.rules import (
    dot_general as dot_general,
)
from jlora._interpreter.rules import (
    dynamic_slice as dynamic_slice,
)
from jlora._interpreter.rules import (
    gather as gather,
)
from jlora._interpreter.rules import (
    joining as joining,
)
from jlora._interpreter.rules import (
    layout as layout,
)
from jlora._interpreter.rules import (
    loops as loops,
)
from jlora._interpreter.rules import (
    ragged_dot as ragged_dot,
)
from jlora._interpreter.rules import (
    shard_map as shard_map,
)
from jlora._interpreter.rules import (
    slicing as slicing,
)
from jlora._interpreter.rules.registry import RULES as RULES
from jlora._interpreter.rules.registry import register_rule as register_rule
