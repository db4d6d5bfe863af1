"""Differences between JAX releases, and the only place that reads what JAX does not document.

One file for each subject, so that each rename in JAX is one edit. The other packages import the names from here.
"""

from jlora._compat.calls import call_apart as call_apart
from jlora._compat.calls import reshape_apart as reshape_apart
from jlora._compat.defects import one_by_one as one_by_one
from jlora._compat.defects import row_major as row_major
from jlora._compat.defects import row_major_gradient as row_major_gradient
from jlora._compat.devices import has_auto_mesh as has_auto_mesh
from jlora._compat.devices import has_no_mesh as has_no_mesh
from jlora._compat.devices import has_one_device as has_one_device
from jlora._compat.devices import is_for_accelerator as is_for_accelerator
from jlora._compat.devices import is_for_cpu as is_for_cpu
from jlora._compat.devices import is_for_gpu as is_for_gpu
from jlora._compat.devices import is_single_device as is_single_device
from jlora._compat.devices import topology_devices as topology_devices
from jlora._compat.equation_params import CallParams as CallParams
from jlora._compat.equation_params import CheckpointParams as CheckpointParams
from jlora._compat.equation_params import CondParams as CondParams
from jlora._compat.equation_params import JitParams as JitParams
from jlora._compat.equation_params import ScanParams as ScanParams
from jlora._compat.equation_params import ShardMapParams as ShardMapParams
from jlora._compat.equation_params import WhileParams as WhileParams
from jlora._compat.equation_params import call_params as call_params
from jlora._compat.equation_params import checkpoint_params as checkpoint_params
from jlora._compat.equation_params import collective_axes as collective_axes
from jlora._compat.equation_params import cond_params as cond_params
from jlora._compat.equation_params import jit_params as jit_params
from jlora._compat.equation_params import scan_params as scan_params
from jlora._compat.equation_params import shard_map_params as shard_map_params
from jlora._compat.equation_params import while_params as while_params
from jlora._compat.evaluation import Equation as Equation
from jlora._compat.evaluation import bind as bind
from jlora._compat.evaluation import bind_once as bind_once
from jlora._compat.evaluation import equation_context as equation_context
from jlora._compat.evaluation import evaluate as evaluate
from jlora._compat.jaxprs import Body as Body
from jlora._compat.jaxprs import Eqn as Eqn
from jlora._compat.jaxprs import Jaxpr as Jaxpr
from jlora._compat.jaxprs import aval as aval
from jlora._compat.jaxprs import bodies as bodies
from jlora._compat.jaxprs import is_literal as is_literal
from jlora._compat.jaxprs import is_tracer as is_tracer
from jlora._compat.jaxprs import max_dim as max_dim
from jlora._compat.jaxprs import open_jaxpr as open_jaxpr
from jlora._compat.primitives import Primitive as Primitive
from jlora._compat.primitives import ad as ad
from jlora._compat.primitives import batching as batching
from jlora._compat.primitives import mlir as mlir
from jlora._compat.source_lines import source_line as source_line
