"""What `export` writes, and whether `verify` judged that: the checkpoint's own routed experts in its own dtype."""

from __future__ import annotations

from gtqlora.config import VerifyConfig
from gtqlora.experts.loading import BF16
from gtqlora.experts.settings import NATIVE
from gtqlora.families import load_config, packed, quantization


def shipped_experts(model: str) -> str:
    """Return the `expert_format` that `export` writes: the checkpoint's own."""
    return BF16 if quantization(model) in (None, packed.FP8) else NATIVE


def unshipped(config: VerifyConfig) -> str | None:
    """Return what about these settings is not as `export` writes it, and how to mend that; None if nothing is."""
    if config.generate_with is not None:
        return "verified by the answers of a server, which certify nothing; run `gtqlora verify RUN` first"
    shipped = shipped_experts(config.model)
    if config.expert_format != shipped:
        return (
            f"verified with {config.expert_format} experts, but the written weights have the checkpoint's own "
            f"({shipped}); run `gtqlora verify RUN --expert-format {shipped}` first"
        )
    own = str(load_config(config.model)[1].dtype).removeprefix("torch.")
    if config.dtype not in ("auto", own):
        return (
            f"verified in {config.dtype}, but the checkpoint is {own}; run `gtqlora verify RUN --set dtype=auto` first"
        )
    return None
