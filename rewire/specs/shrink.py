"""Making a transformers configuration tiny, by what its fields are called.

Configurations of hundreds of architectures call the same things by some dozen names. The table below says what
each is set to; fields that are derived from others (their default is None) are left to be derived again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """What a tiny model measures. Several are tried, as some architectures tie one to another.

    Attributes:
        hidden: width of the residual stream.
        heads: of attention.
        head: width of one head.
        layers: how many.
        image: side of an image, in pixels.
    """

    hidden: int = 32
    heads: int = 4
    head: int = 8
    layers: int = 2
    image: int = 64


# Ids of special tokens come from the end of it.
_VOCAB = 160
_POSITIONS = 64


def _power(value: int, most: int) -> int:
    """The largest power of two up to both: head counts of all stages divide the width."""
    return 1 << (min(value, most).bit_length() - 1) if value > 0 else value


Shrink = Callable[[int, Sizes], int]
_LESS: dict[int, Shrink] = {n: (lambda v, s, n=n: min(v, n)) for n in (1, 2, 4, 8, 16, 32, _POSITIONS)}  # type: ignore[misc]

# The first pattern that fits the whole field name counts.
_TABLE: tuple[tuple[str, Shrink], ...] = (
    (r".*vocab(ulary)?_size|.*num_embeddings", lambda v, s: min(v, _VOCAB)),
    (r"type_vocab_size|.*token_type.*", lambda v, s: v),
    (r"num_channels|in_channels|out_channels|in_chans|num_labels", lambda v, s: v),
    (r"n_group|topk_group|num_expert_group.*", _LESS[1]),
    (r".*head_dim|.*head_dims?|d_kv|kv_channels|.*head_size|key_dim|rotary_dim", lambda v, s: min(v, s.head)),
    (r".*(lora|low)_rank.*|.*_rank", _LESS[8]),
    (r".*(key_value|kv)_heads", lambda v, s: _power(v, s.heads // 2) if v > 1 else v),
    (r".*heads?|.*attention_heads|n_head|n_heads", lambda v, s: _power(v, s.heads)),
    (r".*(experts?_per_tok(en)?|top_?k|topk.*|.*_topk|num_selected.*)", _LESS[2]),
    (r".*shared_experts?", _LESS[1]),
    (r".*(num|n)_.*experts?|.*experts", _LESS[4]),
    (r".*(layer_period|layer_freq|layer_interval|layer_pattern|every_n.*|_period)", _LESS[2]),
    (r".*_offset", _LESS[1]),
    (r".*moe_.*(intermediate|ffn).*|.*expert.*(size|dim)", _LESS[32]),
    (
        r".*(intermediate|inner|ffn|ff|feedforward|feed_forward|mlp|fc)_?(hidden_)?(size|dim|embed_dim)?",
        lambda v, s: 2 * s.hidden,
    ),
    (
        r"d_ff|ffn_dim|.*dim_feedforward|d_inner|n_inner|.*ffn_hidden_size|.*intermediate.*size",
        lambda v, s: 2 * s.hidden,
    ),
    (r".*n_groups", _LESS[2]),
    (r".*state_size|.*d_state|ssm_state.*|.*num_groups", _LESS[8]),
    (r"window_sizes?", _LESS[2]),  # of Swin and its kin: divides every stage
    (r".*chunk_size|.*chunk_len(gth)?|.*window(_size)?|.*block_size|.*span", _LESS[8]),
    (
        r"max_source_positions|max_target_positions|.*max_pos.*|n_positions|n_ctx|.*max_seq.*|.*max_length|.*max_len|max_2d.*|.*rel_pos.*|.*pos_bins",
        _LESS[_POSITIONS],
    ),
    (r".*(image|img|input)_(size|resolution)|.*(image|img)_size", lambda v, s: min(v, s.image)),
    (r".*patch(_size)?", lambda v, s: 16 if v >= 12 else v),
    (r"depths?|.*_depths|.*layers_per_(stage|block)|num_blocks|.*stage_repeats", _LESS[2]),
    (r".*(num|n)_.*_?layers?|.*n_layers?|.*layers|.*num_blocks|.*hidden_layers", lambda v, s: min(v, s.layers)),
    (r".*(queries|latents|num_codevectors.*|num_codevector_groups)", _LESS[8]),
    (r"codevector_dim|proj_codevector_dim", _LESS[32]),
    (r".*num_mel_bins|.*mel.*", _LESS[32]),
    (r"conv_dim|tdnn_dim|.*conv_channels|xvector_output_dim", _LESS[32]),
    (
        r".*(hidden_size|hidden_sizes|hidden_dim|d_model|n_embd|embed_dim|embed_dims|embedding_size|embedding_dim|proj_dim|"
        r"projection_dim|projection_size|d_latents|channels|neck_hidden_sizes|stem_width|width|dim|proj_size)",
        lambda v, s: min(v, s.hidden),
    ),
)
_FLOATS = {"width_coefficient": 0.25, "depth_coefficient": 0.25, "depth_multiplier": 0.5}
_FIXED: dict[str, Any] = {
    "use_cache": False,  # a cache is not an output to compute a loss from
    "mask_time_prob": 0.0,  # masks longer than a tiny input
    "mask_feature_prob": 0.0,
    "use_pretrained_backbone": False,
    "output_attentions": False,
}


def tiny(config: Any, sizes: Sizes) -> dict[str, Any]:
    """Arguments for ``type(config)`` that make a tiny model.

    Args:
        config: a default configuration, as ``type(config)()`` gives.
    """
    defaults = _defaults(config)
    changed: dict[str, Any] = {}
    before, after = 0, 0
    for name, default in defaults.items():
        value = getattr(config, name, default)
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            changed[name] = {"model_type": value.model_type, **_on_purpose(value), **tiny(value, sizes)}
        elif name in _FIXED:
            changed[name] = _FIXED[name]
        elif name in _FLOATS:
            changed[name] = min(_FLOATS[name], default)
        elif name == "vocab_size" and default is None:
            changed[name] = _VOCAB
        elif default is not None and not name.endswith(("_token_id", "_token_index", "_ids", "_id")):
            new = _shrunk(name, default, sizes)
            if new != default:
                changed[name] = new
                if re.fullmatch(r"num_hidden_layers|n_layers?|num_layers", name):
                    before, after = default, new
    for name, default in defaults.items():  # one entry a layer
        if isinstance(default, (list, tuple)) and name not in changed and before and len(default) == before:
            changed[name] = list(default)[:after]
    if defaults.get("num_key_value_heads") == defaults.get("num_attention_heads") and "num_attention_heads" in changed:
        changed["num_key_value_heads"] = changed["num_attention_heads"]
    vocabulary = changed.get("vocab_size", defaults.get("vocab_size"))
    if isinstance(vocabulary, int):
        changed.update(_tokens(config, defaults, vocabulary))
    return changed


def _on_purpose(config: Any) -> dict[str, Any]:
    """What a part of a configuration has unlike its own default: it was set for this architecture."""
    fresh = type(config)()
    names = [field.name for field in dataclasses.fields(config)]
    values = {name: getattr(config, name, None) for name in names}
    return {n: v for n, v in values.items() if not hasattr(v, "model_type") and v != getattr(fresh, n, None)}


def _defaults(config: Any) -> dict[str, Any]:
    """Fields and their values before anything was derived; a derived one (default None) stays None."""
    purpose = _on_purpose(config)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        as_is = field.default is dataclasses.MISSING or field.name in purpose or hasattr(value, "model_type")
        found[field.name] = value if as_is else field.default
    return found


def _shrunk(name: str, value: Any, sizes: Sizes) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, (list, tuple)):
        return [_shrunk(name, v, sizes) for v in value] if all(type(v) is int for v in value) else value
    if not isinstance(value, int):
        return value
    for pattern, shrink in _TABLE:
        if re.fullmatch(pattern, name):
            return shrink(value, sizes) if value > 0 else value
    return value


def _tokens(config: Any, defaults: dict[str, Any], vocabulary: int) -> dict[str, int]:
    """Special tokens that the small vocabulary no longer has, from its end; equal ones stay equal."""
    moved: dict[int, int] = {}
    changed: dict[str, int] = {}
    for name in defaults:
        value = getattr(config, name, None)
        if name.endswith(("_token_id", "_token_index")) and type(value) is int and value >= vocabulary:
            changed[name] = moved.setdefault(value, vocabulary - 1 - len(moved))
    return changed
