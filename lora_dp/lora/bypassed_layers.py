"""Linear layers that an adapter does not suit: another module reads their weight, or no example has rows in them.

An adapter on a layer whose weight is read is never called, and has no effect. One on a layer that runs on a table of
positions, once for all examples, finds no rows that belong to one of them (:func:`runs_once`).

Found by searching Transformers 5.24, timm 1.0.31, torchvision 0.29 and torch 2.14 for ``self.<linear>.weight``. What is
not listed here is noticed when the first private step finds no gradient
(:meth:`lora_dp.engine.recorder.Recorder.take`).
"""

from torch import nn

_PACKAGES = ("torch", "torchvision", "timm", "transformers")
_MIXERS = (
    "BambaMixer",
    "FalconH1Mixer",
    "GraniteMoeHybridMambaLayer",
    "Mamba2Mixer",
    "NemotronHMamba2Mixer",
    "Zamba2MambaMixer",
)

# By class, then by name of the child. Always: in every forward.
_ALWAYS: dict[str, tuple[str, ...]] = {
    "MambaMixer": ("dt_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "TDNNLayer": ("kernel",),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LongcatFlashTopkRouter": ("classifier",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "LinearCrossEntropyLoss": ("linear",),
    "ShiftedWindowAttention": ("qkv", "proj"),
    "ShiftedWindowAttention3d": ("qkv", "proj"),
}
# Sometimes: in fused kernels, with a cache, or under some settings.
_SOMETIMES: dict[str, tuple[str, ...]] = {
    "MambaMixer": ("x_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "out_proj"),
    **dict.fromkeys(_MIXERS, ("out_proj",)),
    "LSHSelfAttention": ("query_key", "value"),
    "Gemma3nTextAltUp": ("correction_coefs",),
    "Gemma4AssistantForCausalLM": ("lm_head",),
    "Gemma4UnifiedAssistantForCausalLM": ("lm_head",),
}
# On a table of relative positions, once for the batch: the child and all beneath it.
_ONCE: dict[str, tuple[str, ...]] = {
    "WindowAttention": ("cpb_mlp",),
    "ShiftedWindowAttentionV2": ("cpb_mlp",),
    "Swinv2SelfAttention": ("continuous_position_bias_mlp",),
    "Swin2SRSelfAttention": ("continuous_position_bias_mlp",),
    "WindowMultiHeadAttention": ("meta_mlp",),
    "RelPosMlp": ("mlp",),
    "DisentangledSelfAttention": ("pos_proj", "pos_q_proj", "pos_key_proj", "pos_query_proj"),
}


def always_bypassed(parent: nn.Module, child: str) -> bool:
    """Whether ``parent`` reads the weight of its ``child`` and never calls it."""
    if child == "qkv" and getattr(parent, "q_bias", None) is not None:
        # timm's BEiT, EVA and Swin V2 join biases of their own to it.
        return _is_of(parent, ("timm",)) and not getattr(parent, "qkv_bias_separate", False)
    return _listed(_ALWAYS, parent, child)


def sometimes_bypassed(parent: nn.Module, child: str) -> bool:
    """Whether ``parent`` may read the weight of its ``child`` instead of calling it."""
    return _listed(_SOMETIMES, parent, child)


def runs_once(parent: nn.Module, child: str) -> bool:
    """Whether ``parent`` runs its ``child`` on a table of positions, once for all examples of a batch."""
    if child in ("query_proj", "key_proj") and getattr(parent, "share_att_key", False):
        # DeBERTa's project tokens and, where they are shared, the table as well.
        return bool(getattr(parent, "relative_attention", False)) and _is_of(parent, _PACKAGES)
    return _listed(_ONCE, parent, child)


def _listed(table: dict[str, tuple[str, ...]], parent: nn.Module, child: str) -> bool:
    return _is_of(parent, _PACKAGES) and any(child in table.get(kind.__name__, ()) for kind in type(parent).__mro__)


def _is_of(module: nn.Module, packages: tuple[str, ...]) -> bool:
    return any(kind.__module__.partition(".")[0] in packages for kind in type(module).__mro__ if kind is not nn.Module)
