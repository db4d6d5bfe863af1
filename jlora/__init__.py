"""Low-rank adaptation (LoRA) of any JAX program, as a function transformation."""

from jlora._dropout import with_dropout as with_dropout
from jlora._merge import merge as merge
from jlora._merge import scale as scale
from jlora._merge import unmerge as unmerge
from jlora._method import Method as Method
from jlora._method import Update as Update
from jlora._optim import labels as labels
from jlora._optim import mask as mask
from jlora._site import Site as Site
from jlora._trace import Explanation as Explanation
from jlora._trace import Sites as Sites
from jlora._trace import explain as explain
from jlora._trace import trace as trace
from jlora._transform import DenseError as DenseError
from jlora._transform import DenseWarning as DenseWarning
from jlora._transform import adapt as adapt
from jlora._transform import init as init
from jlora.io.orbax import CheckpointError as CheckpointError
from jlora.io.orbax import load as load
from jlora.io.orbax import save as save
from jlora.methods import Full as Full
from jlora.methods import LoRA as LoRA
