"""Finds which tensors of a checkpoint a program's parameters are made of, from their values."""

import collections
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from jlora._tree.paths import Tree, is_array
from jlora.io.file_paths import absolute
from jlora.io.peft.infer.entries import Checkpoint
from jlora.io.peft.infer.near import near_misses
from jlora.io.peft.infer.result import InferredNames
from jlora.io.peft.infer.solution import Leaf, Solution, floating_leaves
from jlora.io.peft.infer.solve import Solver
from jlora.io.peft.infer.table import TensorTable
from jlora.io.torch.module_names import bind, compile_pattern, fill, index_names
from jlora.io.torch.tensor_files import TensorFiles, open_tensors


def infer_names(
    params: Tree,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    prefix: str = "",
    rename: Mapping[str, str] | None = None,
    known: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
) -> InferredNames:
    """Finds the names that `jlora.peft` needs, by comparing parameters with the checkpoint that they were loaded from.

        params = load_my_model("Qwen3-0.6B")                     # any tree of arrays
        names = jlora.peft.infer_names(params, "Qwen3-0.6B")     # the folder of the checkpoint
        print(names)                                             # the map, and what was not found
        jlora.peft.save("adapter", adapter, names)

    Each parameter must equal a tensor of the checkpoint, a part of one, or a stack or a join of several, up to a
    transposition, a reshape, and a cast to 16 bits. Parameters that were trained since they were loaded equal nothing.
    Tensors with equal values (new norms, biases of zeros, tied weights) are told apart by the parameters around them;
    if that does not decide, the parameter is in `ambiguous`, and using it raises. Nothing is guessed.

    Tensors are read one at a time: memory stays at the size of the params and of the largest tensor.

    Arguments:
        params: the parameters as they were loaded, floating-point, not quantised.
        checkpoint: a safetensors file; a folder with one, or with shards and their index; or arrays by name.
        prefix: looks at tensors only whose names start so, `"ema."`.
        rename: regular expressions and replacements for the names, if the adapter's model calls its modules otherwise
            than the checkpoint does: `{"^": "bert."}` for a model that has this one inside.
        known: tensors of parameters that values and neighbours cannot tell apart, by pattern:
            `{"layers/{i}/norm_1/scale": "model.layers.{i}.input_layernorm.weight"}`.
        tied: by path of an embedding the module of the output head that uses the same weight and has no tensor. In the
            folder of a causal language model without such a tensor it is `lm_head` by itself.

    Returns:
        a map from patterns of paths to torch modules, which also holds the exact layout of each parameter.

    Raises:
        FileNotFoundError: if the checkpoint is missing.
        TypeError: if the checkpoint is neither a path nor arrays by name.
        ValueError: if the params are those of another model, abstract or quantised, or if `known` does not fit. The
            message lists the nearest tensors.
    """
    if isinstance(checkpoint, Mapping) and not all(is_array(tensor) for tensor in checkpoint.values()):
        raise TypeError(
            "checkpoint is a path, or a dict from names of tensors to arrays; the parameters come before it."
        )
    checkpoint = checkpoint if isinstance(checkpoint, Mapping) else absolute(checkpoint)
    leaves, files = floating_leaves(params), open_tensors(checkpoint)
    tensors = [name for name in files.floating() if name.startswith(prefix)]
    if not leaves or not tensors:
        raise ValueError(
            f"There is nothing to compare: {len(leaves)} floating-point parameters, and {len(tensors)} floating-point "
            f"tensors with the prefix {prefix!r}."
        )
    table = TensorTable(files, tensors)
    told = _told(known or {}, leaves, tensors)
    solution = Solver(leaves, table, told).solve()
    _check_known(told, solution)
    _describe_unmatched(solution, leaves, table)
    _check_model(solution, leaves)
    heads = _tied_heads(checkpoint, tensors, solution) | dict(tied or {})
    return _result(solution, leaves, files, table, rename or {}, heads)


def _told(known: Mapping[str, str], leaves: Mapping[str, Leaf], tensors: list[str]) -> dict[str, str]:
    """For every path that `known` names its tensor; an index of a stack stays open."""
    told = {}
    for pattern, template in known.items():
        expression = compile_pattern(pattern)
        paths = {path: match.groupdict() for path in leaves if (match := expression.fullmatch(path))}
        if not paths:
            raise ValueError(f"known has {pattern!r}, which matches no path of the params.")
        for path, values in paths.items():
            told[path] = bind(template, values)
            first = fill(told[path], dict.fromkeys(index_names(told[path]), "0"))
            if first not in tensors and f"{first}.weight" not in tensors:
                raise ValueError(f"known gives {path} the tensor {first!r}, and the checkpoint has no such tensor.")
    return told


def _check_known(told: Mapping[str, str], solution: Solution) -> None:
    wrong = [path for path in told if path not in solution.pieces and path not in solution.ambiguous]
    if wrong:
        raise ValueError(f"known gives {wrong[0]} the tensor {told[wrong[0]]}, and it has other values.")


def _describe_unmatched(solution: Solution, leaves: Mapping[str, Leaf], table: TensorTable) -> None:
    """Adds the nearest tensors to the reasons."""
    for path, nearest in near_misses(solution.unmatched, leaves, table).items():
        solution.unmatched[path] += f"; {nearest}"


def _check_model(solution: Solution, leaves: Mapping[str, Leaf]) -> None:
    """Raises if most parameters that are not constant have no tensor: these are the parameters of another model."""
    matched = [path for path in solution.pieces if path not in solution.constant_paths]
    missing = list(solution.unmatched)
    if len(matched) >= max(len(missing), 1) or (not missing and matched) or not (missing or matched):
        return
    lines = "\n  ".join(f"{path}: {solution.unmatched[path]}" for path in missing[:8])
    more = f"\n  and {len(missing) - 8} more" if len(missing) > 8 else ""
    raise ValueError(
        f"The checkpoint is that of another model: of {len(matched) + len(missing)} parameters whose elements differ, "
        f"{len(matched)} have a tensor. Pass the checkpoint that the params were loaded from, all its shards, and the "
        f"params before any training step.\n  {lines}{more}"
    )


def _tied_heads(checkpoint: Any, tensors: list[str], solution: Solution) -> dict[str, str]:
    """The embedding whose output head has no tensor of its own, if the checkpoint is a causal language model."""
    if isinstance(checkpoint, Mapping) or not os.path.isfile(os.path.join(checkpoint, "config.json")):
        return {}
    with open(os.path.join(checkpoint, "config.json"), encoding="utf-8") as file:
        architectures = json.load(file).get("architectures") or [""]
    is_decoder = re.search("ForCausalLM$|LMHeadModel$", architectures[0])
    if not is_decoder or any(name.endswith("lm_head.weight") for name in tensors):
        return {}
    ends = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
    used = {path: {piece.tensor for piece in pieces} for path, pieces in solution.pieces.items()}
    return {path: "lm_head" for path, names in used.items() if any(name.endswith(ends) for name in names)}


def _result(
    solution: Solution,
    leaves: Mapping[str, Leaf],
    files: TensorFiles,
    table: TensorTable,
    rename: Mapping[str, str],
    tied: Mapping[str, str],
) -> InferredNames:
    used = collections.defaultdict(list)
    for path, pieces in solution.pieces.items():
        for piece in pieces:
            used[piece.tensor, piece.source].append(path)
    shared = {}
    for paths in used.values():
        first = paths[0]
        shared |= {path: first for path in paths[1:] if path != first}
    names = {piece.tensor for pieces in solution.pieces.values() for piece in pieces}
    copies = {tensor: original for tensor, original in solution.copies.items() if tensor not in names}
    heads = {original: tensor for tensor, original in copies.items()}
    shapes = {name: files.shape(name) for name in table.names}
    checkpoint = Checkpoint(shapes, solution.pieces, solution.shapes, heads, tied, _renaming(rename))
    return InferredNames(
        leaves=solution.pieces,
        shapes=solution.shapes,
        dtypes={path: leaf.array().dtype for path, leaf in leaves.items()},
        copies=copies,
        shared=shared,
        constant=solution.without_source,
        ambiguous=solution.ambiguous,
        unmatched=solution.unmatched,
        unused=tuple(name for name in table.names if name not in names and name not in copies),
        checkpoint=checkpoint,
    )


def _renaming(rename: Mapping[str, str]) -> Callable[[str], str]:
    def renamed(name: str) -> str:
        for pattern, replacement in rename.items():
            name = re.sub(pattern, replacement, name)
        return name

    return renamed
