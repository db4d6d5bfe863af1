"""torch's MultiheadAttention: PEFT adapts both of its projections by one layer of its own."""

from collections.abc import Iterable

from jlora.io.torch.weight_location import Owners

_INNER = ".base_layer.out_proj"


def check_attention(adapted: Iterable[str], owners: Owners) -> None:
    """Raises if an adapter has a projection of torch's MultiheadAttention.

    PEFT names the projection of query, key and value by the attention itself, `attn`, and keeps the other one in it.
    Beside `attn` it does not apply an adapter that `attn.out_proj` has of its own.

    Arguments:
        adapted: the adapted modules.
        owners: of all modules.

    Raises:
        ValueError: with the attention, and what to do.
    """
    for name in adapted:
        attention = name.removesuffix(_INNER) if name.endswith(_INNER) else name.removesuffix(".out_proj")
        if name.endswith(_INNER) or (attention in owners and f"{attention}.out_proj" in owners):
            paths = sorted({part.location.path for part in (*owners.get(attention, ()), *owners.get(name, ()))})
            raise ValueError(
                f"{', '.join([*paths, name])}: {attention} is torch's MultiheadAttention. PEFT adapts both of its "
                "projections by one layer, whose files jlora does not read or write: merge this adapter, or leave the "
                "attention out."
            )
