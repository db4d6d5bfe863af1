"""Tables, limits and the picture of `benchmarks.plan`, from the results of its rows."""

import math
from pathlib import Path
from typing import Any

from benchmarks import _llama, _measure
from benchmarks._measure import Bar
from benchmarks._plan_rows import CARDS, FORMS, ROWS, SMALLEST, SMALLEST_GPUS, WEAK, Row, slice_name

# form -> plan of one row; and the same for every row by its name
Plans = dict[str, dict[str, Any]]
Results = dict[str, Plans]


def bars(results: Results) -> list[Bar]:
    """The limits that jlora has to keep, of the rows that have results."""
    out = []
    for name, plans in results.items():
        if all_fit(plans, "jlora", "by hand"):
            ratio = plans["jlora"]["temporary_bytes"] / plans["by hand"]["temporary_bytes"]
            out.append(Bar(f"{name}: temporary bytes / by hand", ratio, 1.02))
        if all_fit(plans, "jlora", "base"):
            adapted, base = (count_weight_gathers(ROWS[name], plans[form]) for form in ("jlora", "base"))
            out.append(Bar(f"{name}: gathers of weights / base's", adapted / base, 1.0))
    largest = results.get("70B v5e:16x16", {})
    if all_fit(largest, "jlora"):
        out.append(Bar("70B v5e:16x16: bytes a chip / 9 GB", largest["jlora"]["needed"] / 9e9, 1.0))
    quantized = results.get("70B nf4 v5e:4x4", {})
    if "jlora" in quantized:
        ratio = quantized["jlora"]["needed"] / quantized["jlora"]["hbm"]
        out.append(Bar("70B nf4 v5e:4x4: bytes a chip / its memory", ratio, 1.0))
    return out + weak_scaling_bars(results) + gpu_bars(results)


def gpu_bars(results: Results) -> list[Bar]:
    """Programs for GPUs move no more than those by hand, and fewer cards do not hold what the smallest number does."""
    out = text_bars(results)
    for name, plans in results.items():
        if all_fit(plans, "jlora", "by hand") and plans["jlora"].get("kernels"):
            ours, by_hand = (plans[form]["kernels"] for form in ("jlora", "by hand"))
            for figure, limit in (
                ("count", 1.05),
                ("bytes_moved", 1.0),
                ("float32_bytes", 1.01),
                ("largest_bytes", 1.0),
            ):
                label = f"{name}: {figure.replace('_', ' ').replace('count', 'kernels')} / by hand"
                out.append(Bar(label, ours[figure] / by_hand[figure], limit))
    for (model, base), cards in SMALLEST_GPUS.items():
        for card, (too_small, smallest) in cards.items():
            plan = results.get(slice_name(model, base, f"{card}:{smallest}"), {}).get("jlora")
            if plan is None:
                continue
            name = f"{model.split()[-1]} {base} {card}"
            out.append(Bar(f"{name}: {smallest} cards, bytes / memory", plan["needed"] / plan["hbm"], 1.0))
            fewer = results.get(slice_name(model, base, f"{card}:{too_small}"), {}).get("jlora")
            # On half as many cards the arguments take twice as much, and the temporaries no less.
            needed = fewer["needed"] if fewer else 2 * plan["argument_bytes"] + plan["temporary_bytes"]
            if plan["devices"] > 1:
                out.append(Bar(f"{name}: memory / bytes on half as many cards", plan["hbm"] / needed, 1.0))
    return out


def text_bars(results: Results) -> list[Bar]:
    """What the text of a program for GPUs must not contain: float32 copies, and more than one dequantised layer."""
    out = []
    for name, plans in results.items():
        ours, by_hand = plans.get("jlora", {}), plans.get("by hand", {})
        if "wide" in (ours.get("kernels") or {}) and by_hand.get("kernels"):
            out.append(Bar(f"{name}: float32 arrays that by hand does not have", more_wide(ours, by_hand), 0))
        if (ours.get("dequantised") or {}).get("count"):
            out.append(Bar(f"{name}: dequantised arrays that outlive their layer", ours["dequantised"]["kept"], 0))
            share = ours["dequantised"]["bytes"] / layer_bytes(ROWS[name])
            out.append(Bar(f"{name}: dequantised at one time / a layer", share, 1.0))
    return out


def more_wide(ours: dict[str, Any], by_hand: dict[str, Any]) -> int:
    """How many float32 arrays in the shape of a 16-bit array one program writes that the other does not."""
    there = by_hand["kernels"]["wide"]
    return sum(max(0, times - there.get(shape, 0)) for shape, times in ours["kernels"]["wide"].items())


def layer_bytes(row: Row) -> int:
    """Bytes of the kernels of one layer on a device, in 16 bits, gathered over `data`."""
    return sum(2 * math.prod(shape[1:]) // row.mesh[2] for shape, _ in _llama.kernels(row.sizes).values())


def weak_scaling_bars(results: Results) -> list[Bar]:
    """FLOPs and temporary bytes of a chip must not grow with the number of chips."""
    rows = [results.get(f"weak {shape}", {}) for shape in WEAK]
    plans = [row["jlora"] for row in rows if all_fit(row, "jlora")]
    if len(plans) < 2:
        return []
    chips = f"{plans[0]['devices']} to {plans[-1]['devices']} chips"
    out = []
    for key in ("flops", "temporary_bytes"):
        figures = [plan[key] for plan in plans]
        out.append(Bar(f"weak scaling, {chips}: {key}, largest / smallest", max(figures) / min(figures), 1.03))
    return out


def all_fit(plans: Plans, *forms: str) -> bool:
    """Whether all these steps were compiled and fit into a chip's memory."""
    return all(form in plans and plans[form]["fits"] for form in forms)


def count_weight_gathers(row: Row, plan: dict[str, Any]) -> int:
    """How often a step gathers a kernel of a layer over the devices along `data`."""
    sizes = {2 * math.prod(shape[1:]) // row.mesh[2] for shape, _ in _llama.kernels(row.sizes).values()}
    return sum(c["count"] for c in plan["collectives"] if c["kind"] == "all-gather" and c["bytes"] in sizes)


def collective_bytes(plan: dict[str, Any]) -> int:
    """Bytes of all collectives of a step on one chip."""
    return sum(c["bytes"] * c["count"] for c in plan["collectives"])


def gib(size: int, digits: int = 2) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.{digits}f}"


def show(results: Results) -> None:
    """Prints the tables: steps, smallest slices, collectives and bars."""
    print(f"\n### GiB and TFLOPs a chip\n\n{step_table(results)}")
    print(f"\n### the smallest slices, GiB a chip\n\n{slice_table(results)}")
    print(f"\n### the smallest numbers of GPUs, GiB a card\n\n{gpu_table(results)}")
    print(f"\n### programs for GPUs, jlora / by hand\n\n{kernel_table(results)}")
    for name, plans in results.items():
        forms = [form for form in FORMS if all_fit(plans, form)]
        if "base" in forms:
            print(f"\n### collectives of {name}, counts\n\n{collective_table({form: plans[form] for form in forms})}")
    print(f"\n{_measure.verdicts(bars(results))}")


def step_table(results: Results) -> str:
    """Every compiled step."""
    header = ["row", "step", "trained", "arguments", "temporaries", "all", "of GiB", "TFLOPs", "collectives GiB"]
    body = []
    for name, plans in results.items():
        for form, plan in plans.items():
            needed, memory = gib(plan["needed"]), gib(plan["hbm"])
            if plan["fits"]:
                figures = [gib(plan["argument_bytes"]), gib(plan["temporary_bytes"]), needed, memory]
                figures += [f"{plan['flops'] / 1e12:.1f}", gib(collective_bytes(plan), 1)]
            else:
                figures = ["", "", needed, f"{memory}: does not fit", "", ""]
            body.append([name, form, f"{plan['trained']:.3g}", *figures])
    return _measure.table(header, body)


def slice_table(results: Results) -> str:
    """For every model, base and generation the smallest slice that holds the step, beside the next smaller one."""
    body = []
    for (model, base), generations in SMALLEST.items():
        for generation, (too_small, smallest) in generations.items():
            plans = results.get(slice_name(model, base, f"{generation}:{smallest}"), {})
            if not all_fit(plans, "jlora", "by hand"):
                continue
            smaller = results.get(slice_name(model, base, f"{generation}:{too_small}"), {})
            adapted, by_hand = plans["jlora"], plans["by hand"]
            keys = ("argument_bytes", "temporary_bytes", "needed", "hbm")
            optional = (plans.get("merged"), smaller.get("jlora"))
            body.append(
                [
                    *(model, base, f"{generation}:{smallest}", adapted["devices"]),
                    *(gib(adapted[key]) for key in keys),
                    f"{adapted['temporary_bytes'] / by_hand['temporary_bytes']:.3f}",
                    *(gib(plan["needed"]) if plan else "" for plan in optional),
                    *(gib(collective_bytes(plan), 1) for plan in (adapted, by_hand)),
                ]
            )
    header = ["model", "base", "slice", "chips", "arguments", "temporaries", "all", "of", "temporaries / by hand"]
    return _measure.table([*header, "merged: all", "next smaller: all", "sent", "by hand: sent"], body)


def gpu_table(results: Results) -> str:
    """For every card the smallest number that holds each model: arguments + temporaries, GiB a card.

    Cards with a number above one that is not compiled yet are left out.
    """
    body = []
    for card in CARDS:
        shapes = {key: cards[card][1] for key, cards in SMALLEST_GPUS.items()}
        plans = {key: results.get(slice_name(*key, f"{card}:{n}"), {}).get("jlora") for key, n in shapes.items()}
        compiled = [plan for plan in plans.values() if plan]
        if not compiled or any(plan is None and shapes[key] != "1" for key, plan in plans.items()):
            continue
        cells = [_sizes(plans[key], shape) for key, shape in shapes.items()]
        body.append([card, gib(compiled[0]["hbm"], 1), *cells])
    header = [f"{model.removeprefix('Llama 3 ')}, {base}" for model, base in SMALLEST_GPUS]
    return _measure.table(["card", "75%, GiB", *header], body)


def _sizes(plan: dict[str, Any] | None, shape: str) -> str:
    return f"{shape}: {gib(plan['argument_bytes'])} + {gib(plan['temporary_bytes'])}" if plan else shape


def kernel_table(results: Results) -> str:
    """The step's program for GPUs, jlora / by hand."""
    body = []
    for name, plans in results.items():
        if not (all_fit(plans, "jlora", "by hand") and plans["jlora"].get("kernels")):
            continue
        ours, by_hand = plans["jlora"], plans["by hand"]
        kernels = ours["kernels"], by_hand["kernels"]
        pairs = [(k["count"], k["products"], k["fused_products"]) for k in kernels]
        merged = plans.get("merged")
        body.append(
            [
                name,
                *(f"{a:,} / {b:,}" for a, b in zip(*pairs, strict=True)),
                " / ".join(f"{k['bytes_moved'] / 1e12:.3f}" for k in kernels),
                " / ".join(f"{k['float32_bytes'] / 1e12:.3f}" for k in kernels),
                more_wide(ours, by_hand) if "wide" in kernels[0] else "",
                _dequantised(ours, ROWS[name]),
                " / ".join(gib(plan["temporary_bytes"]) for plan in (ours, by_hand)),
                gib(merged["temporary_bytes"]) if merged else "",
            ]
        )
    header = ["row", "kernels", "products", "with more in the kernel", "TB moved", "TB of float32 written"]
    text = ["float32 copies beyond by hand", "dequantised at one time / a layer"]
    return _measure.table([*header, *text, "temporaries, GiB", "merged"], body)


def _dequantised(plan: dict[str, Any], row: Row) -> str:
    arrays = plan.get("dequantised") or {}
    return f"{arrays['bytes'] / layer_bytes(row):.2f}" if arrays.get("count") else ""


def collective_table(plans: Plans, smallest: float = 1e6) -> str:
    """Every kind and shape of collective of at least `smallest` bytes in a step, and how often each step runs it."""
    by_form = {form: {(c["kind"], c["shape"]): c for c in plan["collectives"]} for form, plan in plans.items()}
    sizes = {
        key: c["bytes"]
        for collectives in by_form.values()
        for key, c in collectives.items()
        if c["bytes"] * c["count"] >= smallest
    }
    body = []
    for key, size in sorted(sizes.items(), key=lambda item: -item[1]):
        counts = [collectives[key]["count"] if key in collectives else "" for collectives in by_form.values()]
        body.append([" ".join(key), f"{size:,}", *counts])
    return _measure.table(["collective", "bytes", *by_form], body)


def draw(results: Results, file: Path) -> None:
    """Draws what fills the memory of the smallest slices' chips with jlora, and how far the merged step goes."""
    rows = {}
    for (model, base), generations in SMALLEST.items():
        for generation, (_, shape) in generations.items():
            plans = results.get(slice_name(model, base, f"{generation}:{shape}"), {})
            if all_fit(plans, "jlora"):
                label = f"{model.removeprefix('Llama 3 ')} {base}, {generation}:{shape} ({plans['jlora']['devices']})"
                rows[label] = plans
    if not rows:
        return
    import matplotlib  # here, because the tests of plans run without it

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 0.6 + 0.27 * len(rows)), layout="constrained")
    for position, plans in enumerate(rows.values()):
        adapted, merged = plans["jlora"], plans.get("merged")
        percent = 100 / adapted["hbm"]
        arguments = percent * adapted["argument_bytes"]
        temporaries = percent * adapted["needed"] - arguments
        axis.barh(position, arguments, color="#4c72b0", label="parameters, adapter, Adam")
        axis.barh(position, temporaries, left=arguments, color="#dd8452", label="temporaries")
        end = percent * merged["needed"] if merged else None
        if end is not None and end < 150:
            mark = [position - 0.4, position + 0.4]
            axis.plot([end] * 2, mark, color="black", linewidth=2, label="merged in the step")
        elif end is not None:
            axis.text(158, position, f"{end:.0f}% >", va="center", ha="right", fontsize=8)
    axis.axvline(100, color="grey", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 160)
    axis.set_xlabel("% of a chip's memory")
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), fontsize=8, loc="outside upper center", ncols=3)
    figure.savefig(file, dpi=150)
