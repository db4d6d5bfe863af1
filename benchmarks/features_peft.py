"""Which of PEFT's methods jlora has: `peft.PeftType` of the installed release, and the table of the page on scope.

    python -m benchmarks.features_peft      # lists the types, in an environment with PEFT; then
    python -m benchmarks.pages              # writes the table

An environment with PEFT: `pip install -e ".[references]"`.
"""

import importlib
import json
import re
from typing import Any, NamedTuple

from benchmarks import _measure

RESULT = _measure.RESULTS / "peft_types.json"

_PROMPT = "trains an input: virtual tokens, or keys and values, not a weight. Make them an argument of the program"


class Feature(NamedTuple):
    """What jlora has for a type of PEFT.

    Arguments:
        calls: code that names what it takes; empty if the type is out of scope.
        note: what else is to be said, or why it is out of scope.
    """

    calls: str
    note: str = ""


FEATURES = {
    "ADALORA": Feature("jlora.AdaLoRA", "with `jlora.rank_budget`"),
    "ADAMSS": Feature("jlora.AdaMSS"),
    "ADAPTION_PROMPT": Feature("", _PROMPT),
    "BEFT": Feature("jlora.Full", "of the biases of the value projections: `{'.*value/bias': jlora.Full()}`"),
    "BOFT": Feature("jlora.BOFT"),
    "C3A": Feature("jlora.C3A"),
    "CARTRIDGE": Feature("", _PROMPT),
    "CPT": Feature("", _PROMPT),
    "DEFT": Feature("jlora.DEFT", "and `jlora.PaRa`"),
    "DELORA": Feature("jlora.DeLoRA"),
    "FOURIERFT": Feature("jlora.FourierFT"),
    "FROD": Feature("jlora.FRoD"),
    "GLORA": Feature("jlora.GLoRA"),
    "GRALORA": Feature("jlora.GraLoRA"),
    "HIRA": Feature("jlora.HiRA"),
    "HRA": Feature("jlora.HRA"),
    "IA3": Feature("jlora.IA3"),
    "LILY": Feature(
        "",
        "its weights are means over all tokens of a batch, those of other rows included, so no weight can be merged. "
        "Mixtures for each row: `jlora.bank.mix`",
    ),
    "LN_TUNING": Feature("jlora.Full", "of the norms: `{'.*norm.*': jlora.Full()}`"),
    "LOHA": Feature("jlora.LoHa"),
    "LOKR": Feature("jlora.LoKr"),
    "LORA": Feature("jlora.LoRA", "and `jlora.DoRA`, `jlora.GroupedLoRA`, and starts; aLoRA and Arrow on top of banks"),
    "MISS": Feature("jlora.MiSS"),
    "MULTITASK_PROMPT_TUNING": Feature("", _PROMPT),
    "OFT": Feature("jlora.OFT"),
    "OSF": Feature("jlora.OSF"),
    "PEANUT": Feature("jlora.PEANuT"),
    "POLY": Feature("jlora.bank.mix", "with weights for each task and layer"),
    "PREFIX_TUNING": Feature("", _PROMPT),
    "PROMPT_TUNING": Feature("", _PROMPT),
    "PSOFT": Feature("jlora.PSOFT"),
    "PVERA": Feature("jlora.PVeRA"),
    "P_TUNING": Feature("", _PROMPT),
    "RANDLORA": Feature("jlora.RandLoRA"),
    "ROAD": Feature("jlora.RoAd"),
    "SHADOW": Feature(
        "", "trains a second, smaller network whose states are added to the hidden states, not a change of a weight"
    ),
    "SHIRA": Feature("jlora.SHiRA"),
    "SUPERTUNING": Feature("jlora.SuperTuning"),
    "TINYLORA": Feature("jlora.TinyLoRA"),
    "TRAINABLE_TOKENS": Feature("jlora.Rows", "or `jlora.Full` of the embedding"),
    "UNILORA": Feature("jlora.UniLoRA"),
    "VBLORA": Feature("jlora.VBLoRA"),
    "VERA": Feature("jlora.VeRA"),
    "WAVEFT": Feature("jlora.WaveFT"),
    "XLORA": Feature("jlora.bank.mix", "with weights for each sequence and layer, not for each token"),
}


def status(feature: Feature | None) -> str:
    """ "has", "out of scope" or "missing"."""
    if feature is None:
        return "missing"
    if not feature.calls:
        return "out of scope"
    return "has" if all(map(_exists, re.findall(r"jlora(?:\.\w+)+", feature.calls))) else "missing"


def table() -> str:
    """One row for each type of the listed release."""
    rows = []
    for name in sorted(json.loads(RESULT.read_text())["types"]):
        feature, state = FEATURES.get(name), status(FEATURES.get(name))
        words = [] if feature is None or state == "missing" else [feature.calls and f"`{feature.calls}`", feature.note]
        rows.append([f"`{name}`", state, " ".join(filter(None, words))])
    lines = [["PEFT's type", "jlora", "by"], ["---"] * 3, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _exists(name: str) -> bool:
    import jlora

    value = jlora
    for part in name.split(".")[1:]:
        value = getattr(value, part, None)
    return value is not None


def main() -> None:
    """Lists the types of the installed PEFT."""
    peft: Any = importlib.import_module("peft")
    types = [kind.value for kind in peft.PeftType]
    _measure.save(RESULT, {"peft": peft.__version__, "types": types, "environment": _measure.environment()})
    print(f"PEFT {peft.__version__}: {len(types)} types")


if __name__ == "__main__":
    main()
