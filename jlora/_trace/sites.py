"""The sites of a program, and how they are shown."""

import collections
import dataclasses
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

from jlora._interpreter.site import Site
from jlora._tree.patterns import select_by_pattern
from jlora._tree.repeated_layers import fold_layers
from jlora._tree.short_forms import short_count, short_share
from jlora._tree.tables import Table, Tabular

Roles = Mapping[str, Sequence[str]]  # from patterns for paths to one role for each axis


@dataclasses.dataclass(frozen=True, repr=False)
class Sites(Tabular, Mapping[str, Site]):
    """Every parameter of a traced program, by path.

    `print` and notebooks show a table. Layers that differ in their number alone are one row,
    `layer_{0..11}/attention/query/kernel`.

    Arguments:
        sites: the sites by path.
        flops: FLOPs of one forward pass of the program, in products and convolutions; an expression of symbolic sizes
            if the arguments have such.
    """

    sites: dict[str, Site]
    flops: float

    def __getitem__(self, path: str) -> Site:
        return self.sites[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def adaptable(self) -> "Sites":
        """The sites that a low-rank method can adapt."""
        return Sites({path: site for path, site in self.sites.items() if not site.unsupported_reason}, self.flops)

    def with_roles(self, roles: Roles) -> "Sites":
        """The sites with roles that the user states.

        Arguments:
            roles: from patterns for paths (`re.fullmatch`; the first match decides) to one role for each axis. An axis
                has the role that the program gives it, or is a "stack", along which each layer or expert has an update
                of its own.

        Raises:
            ValueError: if a pattern matches no path or is shadowed, or if roles contradict the program.

        Example:
            sites = sites.with_roles({".*/experts/up": ("stack", "in", "out")})
        """
        stated = select_by_pattern(self.sites, roles)
        sites = {p: site.with_roles(tuple(stated[p])) if p in stated else site for p, site in self.sites.items()}
        return Sites(sites, self.flops)

    def _table(self) -> Table:
        sites = list(self.sites.values())
        rows = []
        for path, positions in fold_layers([(site.path, _appearance(site)) for site in sites]):
            site, flops = sites[positions[0]], sum(sites[k].flops for k in positions)
            share = short_share(flops, self.flops, 1) if self.flops != 0 and flops != 0 else ""
            rows.append((path, str(len(positions)), *_cells(site), share, _verdict(site)))
        head = ("path", "count", "shape", "dtype", "axes", "consumed by", "FLOPs", "adaptable")
        numbers = sum(math.prod(site.shape) for site in sites)
        foot = (
            f"{len(sites)} parameters, {numbers:,} numbers; {len(self.adaptable)} can be adapted with low rank; "
            f"a forward pass takes {short_count(self.flops)} FLOPs in products"
        )
        return Table(head, rows, right=(1, 6), foot=foot)


def _appearance(site: Site) -> Hashable:
    """What layers of one row have in common."""
    uses = tuple((use.primitive, use.roles, use.factored, use.dense_in, use.flops) for use in site.uses)
    return site.shape, str(site.dtype), site.roles, uses, site.unsupported_reason


def _cells(site: Site) -> tuple[str, str, str, str]:
    """Shape, dtype, axes and consuming primitives."""
    counts = collections.Counter(use.primitive for use in site.uses)
    primitives = ", ".join(name if n == 1 else f"{name} x{n}" for name, n in counts.items())
    axes = ", ".join(f"{role} {n}" for role, n in zip(site.roles, site.shape, strict=True)) if site.roles else ""
    return "x".join(map(str, site.shape)) or "scalar", str(site.dtype), axes, primitives


def _verdict(site: Site) -> str:
    """Whether a low-rank method can adapt the site, and which primitives take its weight dense."""
    if site.unsupported_reason:
        return f"no: {site.unsupported_reason}"
    dense = ", ".join(dict.fromkeys(use.dense_in for use in site.uses if not use.factored))
    return f"yes, dense in {dense}" if dense else "yes"


def check_sites(sites: object) -> None:
    """Raises if an argument is not what `jlora.trace` returns.

    Raises:
        TypeError: with the type.
    """
    if not isinstance(sites, Sites):
        raise TypeError(f"`sites` must come from jlora.trace, not {type(sites).__name__}.")
