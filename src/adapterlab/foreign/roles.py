"""Role names (`q`, `v`, `down`, ...) for the modules of any transformer, found from module paths.

The aliases come from a count over the modelling files of `transformers`. A name such as `dense` means different
things under different parents, so an alias may be `parent/name`, where `parent` is matched as a suffix of the name
of the module's parent (lower case, without underscores), and such longer aliases win.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q", "linear_q", "to_q", "q_lin", "wq", "query_proj"),
    "k": ("k_proj", "key", "k", "linear_k", "to_k", "k_lin", "wk", "key_proj"),
    "v": ("v_proj", "value", "v", "linear_v", "to_v", "v_lin", "wv", "value_proj"),
    "o": (
        "o_proj", "out_proj", "output_proj", "out_lin", "linear_out", "o", "wo_proj",
        "attention.output/dense", "selfoutput/dense", "attn/c_proj", "attention/c_proj", "attn/proj",
        "attention/dense", "attn/dense", "selfattention/o",
    ),
    "qkv": ("qkv", "c_attn", "query_key_value", "qkv_proj", "in_proj_qkv", "Wqkv"),
    "gate": ("gate_proj", "wi_0", "w1_gate"),
    "up": (
        "up_proj", "fc1", "intermediate_dense", "lin1", "wi", "wi_1", "c_fc", "linear1", "dense_h_to_4h",
        "fc_in", "intermediate/dense", "mlp/fc1",
    ),
    "gate_up": ("gate_up_proj", "w12"),
    "down": (
        "down_proj", "fc2", "output_dense", "lin2", "wo", "linear2", "dense_4h_to_h", "fc_out", "mlp/c_proj",
        "output/dense",
    ),
    "embed": ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings"),
    "attn": ("self_attn", "attention", "attn", "SelfAttention", "self_attention"),
    "mlp": ("mlp", "ffn", "feed_forward", "DenseReluDense", "block_sparse_moe"),
    "position": ("wpe", "position_embeddings", "embed_positions"),
    "head": ("lm_head", "embed_out", "score", "classifier", "qa_outputs", "classification_head"),
}  # fmt: skip

_BY_NAME = {alias: role for role, aliases in ROLES.items() for alias in aliases if "/" not in alias}
_BY_PARENT = sorted(
    ((*alias.rsplit("/", 1), role) for role, aliases in ROLES.items() for alias in aliases if "/" in alias),
    key=lambda entry: -len(entry[0]),
)


def role_of(path: str) -> str | None:
    """Return the role of the module at `path`, or None when its name says nothing."""
    parent, _, name = path.rpartition(".")
    flat = "." + parent.lower().replace("_", "")
    for suffix, alias, role in _BY_PARENT:
        if name == alias and flat.endswith(suffix):
            return role
    return _BY_NAME.get(name)


def ranks_by_role(ranks: Mapping[str, int]) -> dict[str, str]:
    """Say which ranks the modules of each role have, in the order of the model; nothing where all are alike."""
    if len(set(ranks.values())) < 2:
        return {}
    roles: dict[str, list[int]] = defaultdict(list)
    for path, rank in ranks.items():
        roles[role_of(path) or path.rpartition(".")[2]].append(rank)
    said = [f"{role} {' '.join(map(str, found))}" for role, found in roles.items()]
    return {"ranks": f"{sum(ranks.values())} in all, layer by layer: {'; '.join(said)}"}
