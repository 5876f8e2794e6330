"""What is said of a config.json whose architecture gtqlora does not know: which facts it gives, and which it lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

# Every name under which a released MoE model's config.json gives the fact; the last entry says how layers are chosen.
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_moe_experts")
_FACTS: dict[str, tuple[str, ...]] = {
    "the number of routed experts": _EXPERTS,
    "experts per token": ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"),
    "an expert's inner size": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
    "which layers have a router": (
        *("first_k_dense_replace", "decoder_sparse_step", "mlp_layer_types", "num_dense_layers", "moe_layers"),
        *("layers_block_type", "expert_layer_period", "moe_layer_start_index"),
    ),
}


# A part of a name of its own, so that "smoe" or "moebius" is none; "n_experts" and "moe_topk" are.
_MOE = re.compile(r"expert|(?<![a-z])moe(?![a-z])", re.IGNORECASE)


def refusal(config: Mapping[str, object], known: Sequence[str]) -> str:
    """Return why a model is refused: it is dense, or of a MoE family that has no entry yet; one line.

    Args:
        known: `model_type`s of the families that there are.
    """
    model_type, families = config.get("model_type"), ", ".join(known)
    # Multimodal models nest the language model's config, so a dense-looking top level proves nothing.
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    router = _router_class(sections)
    if router is None and not _found(sections, _EXPERTS):
        if hints := _hints(sections):
            return (
                f"unknown model_type {model_type!r}, and no number of experts under any known key "
                f"({', '.join(_EXPERTS)}), although {', '.join(hints)} looks like a Mixture-of-Experts model. Known "
                f"families: {families}"
            )
        if model_type is None:
            return f"no model_type, which says what the model is. Known families: {families}"
        return (
            f"model_type {model_type!r} is a dense model: it has no routers, so only Level 1 (the residual stream) "
            "applies to it, and there is nothing for gtqlora to tell apart or to train (no key for the number of "
            f"experts: {', '.join(_EXPERTS)}). It works on Mixture-of-Experts models of these families: {families}"
        )
    given, lacking = _split(sections)
    lacking += [] if router else ["a router class in transformers (a causal LM of this type that records its logits)"]
    given += [f"the router is {router}"] if router else []
    return (
        f"unknown MoE family {model_type!r}; known: {families}. Add an entry to gtqlora/families/facts.py. Of the "
        f"facts for it, config.json gives {'; '.join(given) or 'none'}, and lacks {'; '.join(lacking) or 'none'}"
    )


def _hints(sections: Sequence[Mapping[str, object]]) -> list[str]:
    """Return what looks like experts although nothing known is there: a model_type, or keys that hold a value."""
    types = [value for section in sections if isinstance(value := section.get("model_type"), str)]
    keys = [key for section in sections for key, value in section.items() if value]
    named = [f"model_type {name!r}" for name in types if _MOE.search(name)]
    return list(dict.fromkeys([*named, *(f"the key {key}" for key in keys if _MOE.search(key))]))


def _found(sections: Sequence[Mapping[str, object]], keys: Sequence[str]) -> str | None:
    return next((key for section in sections for key in keys if section.get(key)), None)


def _split(sections: Sequence[Mapping[str, object]]) -> tuple[list[str], list[str]]:
    """Return the facts that the config gives, with their keys, and those it lacks, with the keys looked for."""
    given, lacking = [], []
    for fact, keys in _FACTS.items():
        key = _found(sections, keys)
        (lacking if key is None else given).append(f"{fact} ({key or 'none of ' + ', '.join(keys)})")
    return given, lacking


def _router_class(sections: Sequence[Mapping[str, object]]) -> str | None:
    """Return the class whose logits transformers records for a model of one of these types, None if there is none."""
    # Here and not above: the classes are looked up only for a model that is refused.
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def classes() -> Iterator[str]:
        for section in sections:
            model_type = section.get("model_type")
            name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) if isinstance(model_type, str) else None
            yield from (name,) if isinstance(name, str) else ()

    for name in classes():
        recorded = (getattr(transformers, name)._can_record_outputs or {}).get("router_logits")
        target = getattr(recorded, "target_class", recorded)
        if target is not None:
            return getattr(target, "__name__", str(target))
    return None
