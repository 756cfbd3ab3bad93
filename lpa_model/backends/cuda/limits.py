"""What the kernels can compute, without a device and without Triton."""

from __future__ import annotations

from lpa_model.config import CacheLayout, LPAConfig

MOST_HEAD_SIZE = 256
MOST_LATENT = 1024  # numbers of a cached latent
MOST_GROUP = 128  # query heads that share a key head
MOST_WIDTH = 16384  # of the residual stream: a norm holds a row whole


def unsupported(config: LPAConfig, layout: CacheLayout) -> str | None:
    """Why the kernels cannot compute a model whose cache has this layout, with the remedy if there is one."""
    if config.head_size > MOST_HEAD_SIZE:
        return f"has kernels for heads of up to {MOST_HEAD_SIZE}, and this model's have {config.head_size}"
    if config.hidden_size > MOST_WIDTH:
        return f"has kernels for a hidden_size of up to {MOST_WIDTH}, and this model's is {config.hidden_size}"
    if (group := config.num_attention_heads // config.kv_heads) > MOST_GROUP:
        return f"has kernels for up to {MOST_GROUP} query heads of one key head, and this model has {group}"
    for layer in range(config.num_hidden_layers):
        keys_latent, values_latent = config.cache_forms(layout, layer)
        ranks = (("k", keys_latent, config.rank("k", layer)), ("v", values_latent, config.rank("v", layer)))
        for name, latent, rank in ranks:
            if latent and rank is not None and rank > MOST_LATENT:
                return (
                    f"has kernels for latents of up to {MOST_LATENT} numbers, and {name} of layer {layer} has rank "
                    f"{rank}; take --kv-cache-layout full"
                )
    return None
