"""From an adapter to PEFT's tensors and configuration."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora._adapter.to_lora import to_lora
from jlora.io.peft import config as _peft_config
from jlora.io.peft import full_weights as _peft_whole
from jlora.io.peft import vera as _peft_vera
from jlora.io.peft.deltas import Base, whole, without_scaled_biases
from jlora.io.peft.tensors import Tensors, written
from jlora.io.torch.factor_layout import Part, Piece, common, divide, join, kind, widened
from jlora.io.torch.module_names import Names, Owner, Place, Weight, misfit, owners_of, places
from jlora.methods import IA3, DoRA, Full, LoKr, LoRA, VeRA
from jlora.methods._base import Adapter, Update

_TARGETS = (None, "vllm")


def files(
    adapter: Adapter, names: Names, params: Any, target: str | None
) -> tuple[_peft_config.Config, Tensors, tuple[str, ...]]:
    """PEFT's configuration and tensors for an adapter, and what of it was changed."""
    if target not in _TARGETS:
        raise ValueError(f"target is one of {_TARGETS}, not {target!r}.")
    if not adapter:
        raise ValueError("The adapter is empty: there is nothing to save.")
    base = Base(params)
    weights = {path: Weight(tuple(leaf.shape), ()) for path, leaf in (base.leaves or {}).items()}
    found = places(names, weights | {path: Weight(update.shape, update.roles) for path, update in adapter.items()})
    lost = {path: names for path in adapter if path not in found}
    if lost:
        raise misfit("The names have no module for these:", lost, names, adapter)
    adapter, said = _unified(without_scaled_biases(adapter, base, found), params, target)
    adapter = _completed(adapter, found)
    parts = _parts({path: whole(path, update, base) for path, update in adapter.items()}, found)
    trained = {name: part for name, part in parts.items() if isinstance(part.piece.method, Full)}
    adapted = {name: part for name, part in parts.items() if name not in trained}
    if target == "vllm":
        _check_vllm(adapted, trained)
        adapted = _uniform(adapted, "vLLM reads one rank and one scale", said)
    experts = {name: part for name, part in adapted.items() if part.place.module.kind == "parameter"}
    if experts:
        adapted |= _uniform(experts, "PEFT warns of patterns for parameters", said)
    tokens = {name: part for name, part in trained.items() if part.place.module.kind == "embedding"}
    if not adapted and len(tokens) != len(trained):
        raise ValueError(f"PEFT has no file of trained weights alone, {sorted(trained)}: adapt a weight by LoRA too.")
    config, tensors = _adapters(adapted) if adapted else _peft_whole.tokens_alone(tokens, base)
    if adapted:
        _peft_whole.add_tokens(config, tensors, tokens, base)
        _peft_whole.add_trained(config, tensors, {n: p for n, p in trained.items() if n not in tokens}, adapted)
    return config, tensors, tuple(said)


def _unified(adapter: Adapter, params: Any, target: str | None) -> tuple[Adapter, list[str]]:
    """The adapter with one method that PEFT has, LoRA where there are several."""
    low = {path: u for path, u in adapter.items() if not isinstance(u.method, Full)}
    natural = {(kind(u.method).removesuffix(" in") if _is_native(u) else "LoRA") for u in low.values()}
    if target == "vllm" or len(natural) > 1:
        natural = {"LoRA"}
    said, out = [], dict(adapter)
    for path, update in low.items():
        if _is_native(update) and type(update.method).__name__ in natural:
            continue
        new, errors = to_lora({path: update}, params)
        out |= new
        how = "by its factors" if errors[path] == 0 else f"by SVD with an error of {errors[path]:.1e}"
        said.append(
            f"{path}: {type(update.method).__name__} became a LoRA of rank "
            f"{_peft_config.rank(new[path].method)}, {how}."
        )
    return out, said


def _is_native(update: Update) -> bool:
    return type(update.method).__name__ in _peft_config.TYPES and not update.method.offset


def _completed(adapter: Adapter, found: Mapping[str, Place]) -> Adapter:
    """The adapter with the weights that are parts of modules trained whole, as they are in the base."""
    out = dict(adapter)
    holders = {name: u for path, u in adapter.items() if isinstance(u.method, Full) for name in _first(found[path])}
    for path, place in found.items():
        beside = next((holders[name] for name in _first(place) if name in holders), None)
        if beside is not None and path not in adapter:
            zeros = np.zeros(place.weight.shape, np.float32)
            out[path] = Update({"d": zeros}, Full(), beside.roles, place.weight.shape)
    return out


def _first(place: Place) -> tuple[str, ...]:
    return next(iter(place.modules.values()))


def _parts(adapter: Adapter, found: Mapping[str, Place]) -> dict[str, Part]:
    """Every module with its piece; weights that are parts of one module joined."""
    pieces = {path: divide(update, found[path]) for path, update in adapter.items()}
    out = {}
    for name, own in owners_of(found).items():
        ready = [pieces[o.place.path][o.at][o.piece] if o.place.path in pieces else None for o in own]
        first = next((o.place for o, piece in zip(own, ready, strict=True) if piece is not None), None)
        if first is None:
            continue
        piece = ready[0] if first.module.part is None else join(ready, _widths(name, own, first), name)
        assert piece is not None
        out[name] = Part(first, piece)
    return out


def _widths(name: str, own: list[Owner], adapted: Place) -> list[int]:
    """The out sizes of the weights that are parts of one module, all of which have to be known."""
    if [o.place.module.part for o in own] != list(range(len(own))):
        raise ValueError(f"{name} is made of several weights, and not all are in the adapter: pass params=.")
    stack = math.prod(adapted.sizes("stack"))
    return [math.prod(o.place.weight.shape) // stack // max(adapted.count("in"), 1) for o in own]


def _adapters(adapted: Mapping[str, Part]) -> tuple[_peft_config.Config, Tensors]:
    """Configuration and tensors of the adapted modules."""
    modules = {name: part for name, part in adapted.items() if part.place.module.kind != "parameter"}
    parameters = {name: part for name, part in adapted.items() if name not in modules}
    homes = {name: _wrapped(name, parameters) if name in parameters else name for name in adapted}
    tensors: Tensors = {}
    for name, part in adapted.items():
        tensors |= {f"{_peft_config.PREFIX}{homes[name]}.{suffix}": a for suffix, a in written(name, part).items()}
    first = next(iter(adapted.values())).piece.method
    config: _peft_config.Config = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "peft_type": _peft_config.TYPES[type(first).__name__],
        "revision": None,
        "target_modules": sorted(modules),
        "task_type": None,
    }
    match first:
        case IA3():
            config |= _ia3(modules)
        case VeRA():
            config |= _peft_vera.write(modules, tensors)
        case _:
            config |= _ranks(adapted)
    if isinstance(first, (LoRA, DoRA)):
        config["target_parameters"] = sorted(parameters) or None
        config |= _tied(modules, tensors)
    return config, tensors


def _wrapped(name: str, parameters: Mapping[str, Part]) -> str:
    """Where PEFT keeps the tensors of a parameter: it wraps a module once for each, the first innermost."""
    module = name.rpartition(".")[0]
    inside = [n for n in parameters if n.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(inside) - 1 - inside.index(name))


def _ranks(adapted: Mapping[str, Part]) -> _peft_config.Config:
    """Ranks and alphas, those that most modules have as the default."""
    methods = {name: part.piece.method for name, part in adapted.items()}
    root = all(getattr(m, "rank_stabilized", False) for m in methods.values())
    ranks = {name: _rank(part) for name, part in adapted.items()}
    alphas = {name: _peft_config.number(_alpha(part, ranks[name], root)) for name, part in adapted.items()}
    experts = [name for name, part in adapted.items() if part.place.module.kind == "parameter"] or list(adapted)
    r, alpha = (_peft_config.commonest(values[name] for name in experts) for values in (ranks, alphas))
    first = next(iter(methods.values()))
    config = {
        "r": r,
        "rank_pattern": _peft_config.patterns(ranks, r),
        "alpha_pattern": _peft_config.patterns(alphas, alpha),
        "modules_to_save": None,
    }
    if isinstance(first, (LoRA, DoRA)):
        flipped = [part.place.module.kind == "conv1d" for part in adapted.values()]
        return config | {
            "bias": "none",
            "fan_in_fan_out": any(flipped),
            "init_lora_weights": True,
            "lora_alpha": alpha,
            "lora_dropout": common(adapted, "dropout"),
            "use_dora": isinstance(first, DoRA),
            "use_rslora": root,
        }
    config |= {"alpha": alpha, "init_weights": True, "module_dropout": 0.0, "rank_dropout": 0.0}
    if isinstance(first, LoKr):
        both, factor = common(adapted, "decompose_both"), common(adapted, "factor")
        return config | {"decompose_both": both, "decompose_factor": factor, "use_effective_conv2d": False}
    return config | {"use_effective_conv2d": False}


def _is_whole(piece: Piece) -> bool:
    return isinstance(piece.method, LoKr) and not {"a", "ca"} & set(piece.flat)


def _rank(part: Part) -> int:
    method = part.piece.method
    if isinstance(method, LoKr) and method.rank is None:  # PEFT keeps both factors whole from half their size on
        return max(part.piece.flat["d"].shape)
    return _peft_config.rank(method) or 0


def _alpha(part: Part, rank: int, root: bool) -> float:
    """The numerator of PEFT's scale, which always has one."""
    method, scale = part.piece.method, part.piece.scale
    alpha, own = method.alpha, getattr(method, "rank_stabilized", False)  # pyright: ignore[reportAttributeAccessIssue]
    if _is_whole(part.piece):
        return scale * rank
    if alpha is None:
        return scale * (math.sqrt(rank) if root else rank)
    return alpha * scale * (math.sqrt(rank) if own and not root else 1)


def _tied(modules: Mapping[str, Part], tensors: Tensors) -> _peft_config.Config:
    """Adds the tensors of the output heads that are tied to embeddings."""
    heads = {part.place.module.tied: name for name, part in modules.items() if part.place.module.tied}
    for head, name in heads.items():
        if isinstance(modules[name].piece.method, DoRA):
            raise ValueError(f"{name} is tied to {head}, and DoRA's magnitudes differ between the two in PEFT.")
        a, b = (tensors[f"{_peft_config.PREFIX}{name}.lora_embedding_{x}"] for x in "AB")
        tensors[f"{_peft_config.PREFIX}{head}.lora_A.weight"] = np.ascontiguousarray(b.T)
        tensors[f"{_peft_config.PREFIX}{head}.lora_B.weight"] = np.ascontiguousarray(a.T)
    return {"ensure_weight_tying": bool(heads)}


def _ia3(modules: Mapping[str, Part]) -> _peft_config.Config:
    inside = [name for name, part in modules.items() if kind(part.piece.method) == "IA3 in"]
    clash = any(name.endswith(end) for end in inside for name in modules if name not in inside)
    exact = "|".join(name.replace(".", r"\.") for name in sorted(inside))
    return {
        "fan_in_fan_out": any(part.place.module.kind == "conv1d" for part in modules.values()),
        "feedforward_modules": exact if clash else sorted(inside),
        "init_ia3_weights": True,
        "modules_to_save": None,
    }


def _check_vllm(adapted: Mapping[str, Part], trained: Mapping[str, Part]) -> None:
    """Raises for what that engine does not take, by name."""
    if trained:
        raise ValueError(f"vLLM takes LoRA alone, and no bias, modules_to_save or trained tokens: {sorted(trained)}.")
    strange = sorted(name for name, part in adapted.items() if part.place.module.kind in ("conv", "parameter"))
    if strange:
        raise ValueError(f"vLLM takes LoRA of linear layers and embeddings, and not of {strange}.")


def _uniform(parts: Mapping[str, Part], why: str, said: list[str]) -> dict[str, Part]:
    """LoRAs of one rank, with zeros where one was lower, and of one scale, the rest of it in B."""
    loras = {name: part.piece.method for name, part in parts.items() if isinstance(part.piece.method, LoRA)}
    scales = {name: method.scale * parts[name].piece.scale for name, method in loras.items()}
    rank, scale = max(method.rank for method in loras.values()), max(scales.values())
    if len(set(scales.values())) == len({method.rank for method in loras.values()}) == 1:
        return dict(parts)
    out = {}
    for name, (place, piece) in parts.items():
        more, ratio = rank - loras[name].rank, scales[name] / scale
        out[name] = Part(place, widened(piece, rank, scale))
        changes = [f"rank {loras[name].rank} padded to {rank}"] * bool(more) + [f"B times {ratio:g}"] * (ratio != 1)
        if changes:
            said.append(f"{name}: {', '.join(changes)}, since {why}.")
    return out
