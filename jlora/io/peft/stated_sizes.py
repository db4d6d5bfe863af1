"""The sizes that a configuration states beside those of the tensors: a file in which the two differ is refused.

PEFT creates the arrays of a module by the configuration, and then refuses tensors of other shapes. Most sizes are part
of jlora's method, and so of the shapes that the tensors must have. Here are those that jlora takes from the tensors.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jlora.io.peft.config import Config
from jlora.io.peft.targets import by_pattern
from jlora.io.peft.tensors import Tensors


class Stated(NamedTuple):
    """A size of a module.

    Arguments:
        what: the size in words.
        fields: the fields of the configuration that give it.
        actual: the size of the tensors.
        expected: the sizes that the fields give; more than one if releases of PEFT differ.
    """

    what: str
    fields: str
    actual: int
    expected: set[Any]


_Reader = Callable[[Config, str, Tensors, Mapping[str, int]], Iterator[Stated]]


def check_stated_sizes(config: Config, name: str, path: str, tensors: Tensors, sizes: Mapping[str, int]) -> None:
    """Raises if the configuration gives a module another size than its tensors have.

    Arguments:
        config: the configuration.
        name: of the module.
        path: of the weight; the name again if there is no program.
        tensors: of the module, by suffix, as they are in the file.
        sizes: of the in axis, and of the out axis if it is known.

    Raises:
        ValueError: with both sizes.
    """
    read, place = _SIZES.get(config["peft_type"]), name if path == name else f"{path} ({name})"
    try:
        stated = [] if read is None else list(read(config, name, tensors, sizes))
    except KeyError:  # a tensor that is missing: it is refused by its name
        return
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{place}: a size in adapter_config.json is no number, or a tensor has other axes than PEFT's: "
            f"{error}. Save it again with PEFT."
        ) from error
    for what, fields, actual, expected in stated:
        if None not in expected and actual not in expected:
            raise ValueError(
                f"{place}: the {what} of its tensors is {actual}, and {fields} in adapter_config.json gives "
                f"{' or '.join(map(str, expected))}. The file is damaged, or of two adapters: save it again with PEFT. "
                f"If the tensors are those that were trained, write {actual} into the configuration."
            )


def _rank(suffix: str, axis: int) -> _Reader:
    """The rank of a type that has one for all modules, as an axis of a tensor."""

    def read(config: Config, name: str, tensors: Tensors, sizes: Mapping[str, int]) -> Iterator[Stated]:
        yield Stated("rank", "r", tensors[suffix].shape[axis], {config.get("r")})

    return read


def _hira(config: Config, name: str, tensors: Tensors, sizes: Mapping[str, int]) -> Iterator[Stated]:
    a = tensors["hira_A" if "hira_A" in tensors else "hira_embedding_A"]
    rank = config.get("r")  # PEFT 0.21.2 creates all modules with this one
    yield Stated("rank", "r or rank_pattern", len(a), {rank, by_pattern(config.get("rank_pattern"), name, rank)})


def _delora(config: Config, name: str, tensors: Tensors, sizes: Mapping[str, int]) -> Iterator[Stated]:
    rank = by_pattern(config.get("rank_pattern"), name, config.get("r"))
    yield Stated("rank", "r or rank_pattern", len(tensors["delora_A"]), {rank})


def _miss(config: Config, name: str, tensors: Tensors, sizes: Mapping[str, int]) -> Iterator[Stated]:
    rank, columns = tensors["miss_block"].shape
    yield Stated("rank", "r", rank, {config.get("r")})
    if config.get("init_weights") == "mini":
        yield Stated("number of columns", "mini_r", columns, {config.get("mini_r")})


def _deft(config: Config, name: str, tensors: Tensors, sizes: Mapping[str, int]) -> Iterator[Stated]:
    n_out, rank = tensors["deft_P"].shape
    yield Stated("rank", "r", rank, {min(config["r"], n_out)})  # PEFT cuts it off


def _osf(config: Config, name: str, tensors: Tensors, sizes: Mapping[str, int]) -> Iterator[Stated]:
    u, s, v = (tensors[f"osf_svd_params.{array}"] for array in ("U_low", "S_low", "V_low"))
    least, patterns = min(len(u), v.shape[-1]), config.get("rank_pattern") or {}
    given = next((r for key, r in patterns.items() if re.search(key, name)), config.get("effective_rank"))
    share = 0.5 if given is None else given
    kept = int(least * share) if isinstance(share, float) and 0 < share <= 1 else int(share)
    fields = "effective_rank or rank_pattern"
    yield Stated("number of singular values that are not trained", fields, least - s.size, {max(min(least, kept), 0)})


def _oft(config: Config, name: str, tensors: Tensors, sizes: Mapping[str, int]) -> Iterator[Stated]:
    entries = tensors["oft_R.weight"].shape[1]
    block = round((1 + (1 + 8 * entries) ** 0.5) / 2)
    if config["oft_block_size"]:
        yield Stated("block size", "oft_block_size", block, {_divisor(sizes["in"], config["oft_block_size"])})
    if config.get("r"):
        yield Stated("block size", "r", block, {sizes["in"] // _divisor(sizes["in"], config["r"])})


def _divisor(size: int, value: int) -> int:
    """The divisor of a size that PEFT's OFT takes for a value: the nearest one, of two the smaller."""
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    return min(divisors, key=lambda number: (abs(number - value), number))


def _boft(config: Config, name: str, tensors: Tensors, sizes: Mapping[str, int]) -> Iterator[Stated]:
    levels, _, block, _ = tensors["boft_R"].shape
    if config.get("boft_block_size"):
        yield Stated("block size", "boft_block_size", block, {config["boft_block_size"]})
    if config.get("boft_block_num"):
        yield Stated("block size", "boft_block_num", block, {sizes["in"] // config["boft_block_num"]})
    if "boft_n_butterfly_factor" in config:  # PEFT has one level on a machine without its extension for CUDA
        yield Stated("number of levels", "boft_n_butterfly_factor", levels, {config["boft_n_butterfly_factor"], 1})


def _c3a(config: Config, name: str, tensors: Tensors, sizes: Mapping[str, int]) -> Iterator[Stated]:
    block = _by_ending(config.get("block_size_pattern"), name, config.get("block_size"))
    yield Stated("block size", "block_size or block_size_pattern", tensors["c3a_kernel"].shape[2], {block})


def _coefficients(suffix: str) -> _Reader:
    """The number of coefficients of FourierFT and WaveFT."""

    def read(config: Config, name: str, tensors: Tensors, sizes: Mapping[str, int]) -> Iterator[Stated]:
        default, patterns = config.get("n_frequency"), config.get("n_frequency_pattern")
        if default is not None and not config.get("proportional_parameters"):
            counts = {_by_ending(patterns, name, default), by_pattern(patterns, name, default)}
            yield Stated("number of coefficients", "n_frequency or n_frequency_pattern", len(tensors[suffix]), counts)

    return read


def _by_ending(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of a module by the rule of C3A and FourierFT: a pattern after a dot, or else the name itself."""
    patterns = patterns or {}
    return patterns.get(next((key for key in patterns if re.match(rf".*\.{key}$", name)), name), default)


_SIZES: dict[str, _Reader] = {
    "HIRA": _hira,
    "DELORA": _delora,
    "MISS": _miss,
    "HRA": _rank("hra_u", 1),
    "DEFT": _deft,
    "OSF": _osf,
    "OFT": _oft,
    "BOFT": _boft,
    "C3A": _c3a,
    "FOURIERFT": _coefficients("fourierft_spectrum"),
    "WAVEFT": _coefficients("waveft_spectrum"),
}
