"""Linear layers whose weight another module reads: an adapter on one is never called, and has no effect.

Found by searching Transformers 5.24, timm 1.0.31, torchvision 0.29 and torch 2.14 for ``self.<linear>.weight``. What is
not listed here is noticed when the first private step finds no gradient (:meth:`lora_dp.recording.Recorder.take`).
"""

from torch import nn

_PACKAGES = ("torch", "torchvision", "timm", "transformers")
_MIXERS = ("BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "Mamba2Mixer", "NemotronHMamba2Mixer",
           "Zamba2MambaMixer")

# By class, then by name of the child. Always: in every forward.
_ALWAYS: dict[str, tuple[str, ...]] = {
    "MambaMixer": ("dt_proj",), "FalconMambaMixer": ("dt_proj",), "JambaMambaMixer": ("dt_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"), "TDNNLayer": ("kernel",),
    "DetrMHAttentionMap": ("k_proj",), "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",), "DabDetrMHAttentionMap": ("k_linear",),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LongcatFlashTopkRouter": ("classifier",), "MobileBertLMPredictionHead": ("dense", "decoder"),
    "NeoMMEForMaskedLM": ("unembedding_projection",), "LinearCrossEntropyLoss": ("linear",),
    "ShiftedWindowAttention": ("qkv", "proj"), "ShiftedWindowAttention3d": ("qkv", "proj"),
}
# Sometimes: in fused kernels, with a cache, or under some settings.
_SOMETIMES: dict[str, tuple[str, ...]] = {
    "MambaMixer": ("x_proj", "out_proj"), "FalconMambaMixer": ("x_proj", "out_proj"),
    **dict.fromkeys(_MIXERS, ("out_proj",)), "LSHSelfAttention": ("query_key", "value"),
    "Gemma3nTextAltUp": ("correction_coefs",), "Gemma4AssistantForCausalLM": ("lm_head",),
    "Gemma4UnifiedAssistantForCausalLM": ("lm_head",),
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


def _listed(table: dict[str, tuple[str, ...]], parent: nn.Module, child: str) -> bool:
    return _is_of(parent, _PACKAGES) and any(child in table.get(kind.__name__, ()) for kind in type(parent).__mro__)


def _is_of(module: nn.Module, packages: tuple[str, ...]) -> bool:
    return any(kind.__module__.partition(".")[0] in packages for kind in type(module).__mro__ if kind is not nn.Module)
