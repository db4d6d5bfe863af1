"""From PEFT's tensors to an adapter."""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._trace.sites import Sites
from jlora.io.peft import config as _peft_config
from jlora.io.peft import full_weights as _peft_whole
from jlora.io.peft import tensors as _peft_tensors
from jlora.io.peft import vera as _peft_vera
from jlora.io.peft.deltas import Base, biases, relative, scaled_bias
from jlora.io.peft.tensors import Tensors, sizes_of
from jlora.io.torch.factor_layout import TERMS, Piece, assemble, cut, kind, side_by_side
from jlora.io.torch.module_names import Index, Names, Owner, Owners, Place, Weight, misfit, owners_of, places
from jlora.methods import IA3, Full, LoKr, VeRA
from jlora.methods._base import Adapter, Update

_TOKENS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")


class File(NamedTuple):
    """What a file holds, by module or parameter.

    Arguments:
        adapters: the tensors of every adapted module, by what PEFT calls them.
        values: whole parameters: biases and `modules_to_save`.
        bases: base weights of adapted modules, which are kept beside them.
        tokens: trained rows of embeddings.
    """

    adapters: dict[str, Tensors]
    values: Tensors
    bases: Tensors
    tokens: Tensors


def adapter(config: _peft_config.Config, tensors: Tensors, sites: Sites, names: Names, params: Any) -> Adapter:
    """The adapter that a configuration and its tensors make."""
    base = Base(params)
    found = places(names, {path: Weight(site.shape, site.roles) for path, site in sites.items()})
    owners = owners_of(found)
    file = _grouped(tensors, owners, config)
    heads = _tied_heads(file.adapters, found, sites, config)
    lost = {n: owners for part in file for n in part if n not in owners and n not in heads}
    if lost:
        raise misfit("These in the file have no weight in the program:", lost, names, sites)
    _check_complete(config, file, owners, heads)
    pieces: dict[str, dict[Index, dict[int, Piece]]] = collections.defaultdict(lambda: collections.defaultdict(dict))

    def put(name: str, piece: Piece) -> None:
        own = owners[name]
        whole = own[0].place.module.part is None
        parts = [piece] if whole else cut(piece, [o.place.count("out") for o in own], name)
        for (place, index, k), one in zip(own, parts, strict=True):
            if k in pieces[place.path][index]:
                raise ValueError(f"The file trains {name} in two ways, and jlora one way a weight: train it in one.")
            pieces[place.path][index][k] = one

    for name, parts in file.adapters.items():
        if name not in heads:
            put(name, _adapted(config, name, parts, owners[name], tensors))
    for name, tensor in file.values.items():
        site = sites[owners[name][0].place.path]
        if site.is_lookup and site.is_product:
            raise ValueError(f"{site.path} is an embedding and the output head at once, and {name} in the file is one.")
        put(name, _peft_whole.read(name, tensor, owners[name]))
    for name, tensor in file.tokens.items():
        put(name, _peft_whole.read_rows(name, tensor, config, owners[name], base))
    for name, tensor in file.bases.items():
        if name not in heads:
            _peft_whole.check_base(name, tensor, owners[name], base)
    out: Adapter = {}
    templates: dict[Any, dict[str, Any]] = {}
    for path, by_index in pieces.items():
        place = found[path]
        rows = {k: side_by_side([row.get(p) for p in range(place.pieces)], place) for k, row in by_index.items()}
        out[path] = assemble(rows, place)
        _check_update(path, out[path], sites, templates)
        out[path] = relative(path, out[path], base)
    for path, bias in biases(out, sites, found).items():
        if bias in out:
            raise ValueError(f"The file trains the bias {bias} and scales it by IA3; jlora does one of the two.")
        out[bias] = scaled_bias(path, out[path], bias, base)
    placed = jax.device_put({path: out[path].factors for path in sites if path in out})
    return {path: dataclasses.replace(out[path], factors=factors) for path, factors in placed.items()}


def _grouped(tensors: Tensors, owners: Owners, config: _peft_config.Config) -> File:
    file = File(collections.defaultdict(dict), {}, {}, {})
    for key, tensor in tensors.items():
        if key in _peft_vera.PROJECTIONS:
            continue
        if not key.startswith(_peft_config.PREFIX):
            raise ValueError(f"The file has the tensor {key}, and all of PEFT's start with {_peft_config.PREFIX}")
        name = key.removeprefix(_peft_config.PREFIX)
        suffix = next((s for s in (*_peft_tensors.SUFFIXES, *_TOKENS) if name.endswith(f".{s}")), "")
        module = name.removesuffix(f".{suffix}")
        if suffix in _TOKENS:
            file.tokens[module] = tensor
        elif suffix:
            file.adapters[_unwrapped(module, owners, config)][suffix] = tensor
        elif name.endswith(".base_layer.weight"):
            file.bases[name.removesuffix(".base_layer.weight")] = tensor
        else:
            name = name.replace(".base_layer.", ".")
            file.values[name if name in owners else name.removesuffix(".weight")] = tensor
    return file


def _unwrapped(module: str, owners: Owners, config: _peft_config.Config) -> str:
    """The parameter that tensors are of, where PEFT adapts several of one module: it wraps the first one innermost."""
    if not config.get("target_parameters"):
        return module
    bare = re.sub(r"(\.base_layer)+$", "", module)
    inside = [n for n in owners if n.rpartition(".")[0] == bare and _peft_config.targets_parameter(config, n)]
    depth = module.removeprefix(bare).count(".base_layer")
    return inside[-1 - depth] if depth < len(inside) else module


def _tied_heads(
    modules: Mapping[str, Tensors], found: Mapping[str, Place], sites: Sites, config: _peft_config.Config
) -> set[str]:
    """The output heads that are adapted together with the embedding that they are tied to.

    Raises:
        ValueError: where the names or the file say otherwise than the program does: jlora adapts every use of a weight.
    """
    heads = set()
    for path, place in found.items():
        head, embedding = place.module.tied, place.modules[next(iter(place.modules))][0]
        is_tied = sites[path].is_lookup and sites[path].is_product
        if head is not None and not is_tied:
            raise ValueError(f"The names tie {path} to {head}, and in the program it is no output head.")
        one, two = modules.get(embedding, {}), modules.get(head or "", {})
        if not is_tied or not (one or two):
            continue
        pairs = (("lora_embedding_A", "lora_B.weight"), ("lora_embedding_B", "lora_A.weight"))
        same = all(e in one and h in two and np.array_equal(one[e], two[h].T) for e, h in pairs)
        if head is None or not same or _peft_config.method(config, embedding) != _peft_config.method(config, head):
            raise ValueError(
                f"{path} is an embedding and the output head at once, and jlora adapts both uses alike; the file does "
                "not. Train with ensure_weight_tying=True and name the head, Module(..., 'embedding', tied='lm_head'), "
                "or untie them in the program."
            )
        heads.add(head)
    return heads


def _check_complete(config: _peft_config.Config, file: File, owners: Owners, heads: set[str]) -> None:
    """Raises where the configuration names other modules than have tensors."""
    parameters = {name for name, (own, *_) in owners.items() if own.place.module.kind == "parameter"}
    wanted = {name for name in owners if name not in parameters and _peft_config.targets(config, name)}
    wanted |= {name for name in parameters if _peft_config.targets_parameter(config, name)}
    saved = {name for name in owners if _peft_config.is_saved(config, name)}
    if config["peft_type"] == "TRAINABLE_TOKENS":
        wanted = set()
    missing = sorted((wanted - set(file.adapters)) | (saved - set(file.values)))
    if missing or bool(_peft_config.token_rows(config)) != bool(file.tokens):
        raise ValueError(f"The configuration names these, and the file lacks them: {missing or 'trained tokens'}.")
    biases = {name for name in file.values if name.endswith(".bias") and config.get("bias", "none") != "none"}
    surplus = sorted((set(file.values) - saved - biases) | (set(file.adapters) - wanted - heads))
    if surplus and config["target_modules"] != "all-linear":
        raise ValueError(f"The file has tensors for {surplus}, which the configuration does not name.")


def _adapted(config: _peft_config.Config, name: str, parts: Tensors, own: list[Owner], tensors: Tensors) -> Piece:
    """What the tensors of one module say."""
    place = own[0].place
    method, scale = _peft_config.method(config, name), 1.0
    if not place.is_matrix:
        raise ValueError(f"The file adapts {name}, and {place.path} is no matrix of the program.")
    form = _peft_tensors.form(kind(method), place.module.kind, name)
    known = {suffix: (factor, spelled) for factor, (suffix, spelled) in form.items()}
    have = {known[suffix][0] for suffix in parts if suffix in known}
    strange = [suffix for suffix in parts if suffix not in known]
    either = {"ca": "c", "cb": "c", "c": "ca", "a": "d", "b": "d", "d": "a"} if isinstance(method, LoKr) else {}
    lacking = [suffix for suffix, (f, _) in known.items() if f not in have and either.get(f) not in have]
    if strange or lacking:
        raise ValueError(
            f"{name}, {type(method).__name__} of {place.module.kind}: missing {lacking}, left over {strange}."
        )
    sizes = sizes_of(own)
    if not isinstance(method, (LoKr, IA3)):
        sizes = dataclasses.replace(sizes, letters={**sizes.letters, "r": _peft_config.rank(method) or 0})
    stack = "e" if place.experts else ""
    flat = {}
    for suffix, tensor in parts.items():
        factor, spelled = known[suffix]
        term = stack + TERMS[kind(method)][factor]
        flat[factor] = _peft_tensors.read(tensor, term, spelled, sizes, f"{name}.{suffix}")
    if isinstance(method, VeRA):
        return _peft_vera.read(method, name, flat, sizes, tensors)
    if isinstance(method, LoKr) and not {"a", "ca"} & set(flat):  # there PEFT scales, and jlora's method does not
        scale = (method.alpha or 0) / (method.rank or 1)
    return Piece(method, scale, flat)


def _check_update(path: str, update: Update, sites: Sites, templates: dict[Any, dict[str, Any]]) -> None:
    """Raises unless the factors are those that the method has for the site.

    Arguments:
        templates: those that sites of the same kind had, to which this one is added.
    """
    site, method = sites[path], update.method
    if not isinstance(method, Full) and site.unsupported_reason:
        raise ValueError(f"{type(method).__name__} cannot adapt {path} {site.shape}: {site.unsupported_reason}.")
    alike = (method, site.shape, site.roles)
    if alike not in templates:
        templates[alike] = jax.eval_shape(lambda: method.init(jax.random.key(0), site, jnp.float32, None))
    template = templates[alike]
    want = {name: a.shape for name, a in template.items()}
    have = {name: a.shape for name, a in update.factors.items()}
    if want != have:
        raise ValueError(f"{method} at {path} has factors of shapes {want}, and the file's are {have}.")
