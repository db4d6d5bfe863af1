"""The libraries that are compared, and an environment for each: pinned packages in a virtual environment of its own."""

import dataclasses
import os
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks import _measure

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "build" / "peers"  # which git ignores
JAX = "jax==0.10.2"
FLAX = ("flax==0.12.8", "optax==0.2.8")


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library.

    Arguments:
        name: as the tables write it.
        module: of `benchmarks._peers`, which tries it.
        packages: to install with what they need.
        alone: to install without what they need.
    """

    name: str
    module: str
    packages: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()


JLORA = Peer("jlora", "with_jlora")  # in the environment that runs the benchmark
PEERS = (
    Peer("qwix", "with_qwix", (JAX, "qwix==0.1.8", *FLAX)),
    Peer("flax.nnx", "with_nnx", (JAX, *FLAX)),
    Peer("Keras", "with_keras", (JAX, "keras==3.15.1", "optax==0.2.8")),
    Peer("gemma", "with_gemma", (JAX, *FLAX, "einops==0.8.2", "jaxtyping==0.3.11"), alone=("gemma==3.3.0",)),
    Peer("quax", "with_quax", (JAX, "quax==0.4.6", "equinox==0.13.8", "optax==0.2.8")),
    Peer("mlorax", "with_mlorax", (JAX, "mlorax==0.9.5", *FLAX)),
    # With the releases of its time: on those that pip chooses, most programs fail.
    Peer(
        "lorax",
        "with_lorax",
        ("jax==0.4.25", "jaxlib==0.4.25", "numpy<2", "scipy<1.13", "plum-dispatch==2.2.2", "jax-lorax==0.3.1"),
    ),
)
# Not a library for JAX: it has a row among the steps alone. JAX is there to check its loss.
REFERENCES = ("torch==2.13.0", "peft==0.21.2", "transformers==5.23.0")
TORCH = Peer("PEFT, torch", "with_torch", (JAX, "optax==0.2.8", *REFERENCES))


class NotInstalledError(RuntimeError):
    """pip's message about a library that cannot be installed."""


def python(peer: Peer) -> str:
    """The interpreter of a library's environment, which is made at the first call.

    Raises:
        NotInstalledError: with pip's message, if its packages cannot be installed.
    """
    if not peer.packages:
        return sys.executable
    folder = ENVIRONMENTS / peer.module
    interpreter, mark = folder / "bin" / "python", folder / "packages"
    wanted = " ".join((*peer.packages, *peer.alone))
    if not mark.exists() or mark.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        for command in ([*pip, *peer.packages], [*pip, "--no-deps", *peer.alone] if peer.alone else []):
            done = subprocess.run(command, capture_output=True, text=True) if command else None
            if done and done.returncode:
                errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                raise NotInstalledError("\n".join(errors[:2]))
        mark.write_text(wanted)
    return str(interpreter)


def variables() -> dict[str, str]:
    """The environment variables of a library's process: this checkout, and eight simulated devices on the CPU."""
    flags = "--xla_force_host_platform_device_count=8"
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def machine() -> dict[str, object]:
    """What the figures depend on besides the libraries."""
    return _measure.environment()
