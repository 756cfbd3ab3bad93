"""oneDNN's packed GEMMs in the model's own modules, with compiled attention for decode rows.

In float32 a row's product with a packed weight is the same to the bit in any number of rows above one; torch's plain
products differ between 12 rows and 16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lpa_model.attention import Attention
from lpa_model.backends.cpu.kernels import attention, rms_norm
from lpa_model.backends.cpu.kernels.attention import DecodeRows, decode_attention
from lpa_model.backends.cpu.kernels.launch import compile_kernel
from lpa_model.backends.cpu.logits import kernel_rows
from lpa_model.backends.cpu.rotary import interleaved, rope_cache
from lpa_model.backends.torch.attention import Decode, per_kv_head
from lpa_model.backends.torch.backend import TorchBackend
from lpa_model.batch import Batch
from lpa_model.cache import LatentCache
from lpa_model.layers import LowRankLinear, RMSNorm, RotaryEmbedding, SwiGLU
from lpa_model.model import LPAForCausalLM


class PackedLinear(nn.Module):
    """A linear layer whose weight oneDNN has packed once for its GEMMs, instead of at every call.

    The products are bit for bit those of `F.linear`. `weight` keeps the plain matrix where attention reads it.
    """

    def __init__(self, linear: nn.Linear, keep_weight: bool = False) -> None:
        super().__init__()
        self.weight = linear.weight.detach().clone() if keep_weight else None
        self.bias = None if linear.bias is None else linear.bias.detach().clone()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """x [..., in] -> [..., out]; `activation` is one of oneDNN's, applied before the result is rounded."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, activation, [], "")
        return y


class CompiledRMSNorm(nn.Module):
    """`RMSNorm` in one pass where its kernel can be compiled, else as it was."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm
        self.kernel = compile_kernel(rms_norm.KERNEL)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, size] float32 -> [rows, size] bfloat16."""
        kernel = self.kernel.result()
        if kernel is None or x.dim() != 2:
            y: Tensor = self.norm(x)
            return y
        return rms_norm.rms_norm(kernel, x, self.norm.weight, self.norm.eps)


class PackedSwiGLU(nn.Module):
    """`SwiGLU` of packed dense layers: activation and gating happen inside the products, before they are rounded."""

    def __init__(self, gate: PackedLinear, up: PackedLinear, down: PackedLinear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        gate = self.gate_proj(x, "swish")
        gated = torch.ops.mkldnn._linear_pointwise.binary(x, gate, self.up_proj.packed, self.up_proj.bias, "mul")
        y: Tensor = self.down_proj(gated)
        return y


class InterleavedRotary(nn.Module):
    """`RotaryEmbedding` for dimensions that rotate together as neighbours: a product of complex numbers."""

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.rope_cache = rope_cache(rotary)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., T, heads, dh] rotated by positions [..., T] (int64); computed in float32, returned in x's dtype."""
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [..., T, heads, dh/2]
        return torch.view_as_real(pairs * self.rope_cache[positions].unsqueeze(-2)).flatten(-2).to(x.dtype)


def packed_backend(model: LPAForCausalLM) -> TorchBackend:
    """`Backend` of the model's modules, changed in place: packed weights, compiled decode attention and sampling.

    The tensors as they were loaded are released.
    """
    dtype = model.embed_tokens.weight.dtype
    kernel = compile_kernel(attention.KERNELS[dtype])
    if model.rotary is not None:
        for module in model.modules():
            if isinstance(module, Attention):
                _interleave(module)
        model.rotary = InterleavedRotary(model.rotary)  # type: ignore[assignment]
    if dtype is torch.bfloat16:
        for name, module in list(model.named_modules()):
            if isinstance(module, RMSNorm) and not name.endswith(("q_norm", "k_norm")):
                model.set_submodule(name, CompiledRMSNorm(module))
    _pack(model)
    rope = model.rotary.rope_cache if isinstance(model.rotary, InterleavedRotary) else None

    def make_decode(batch: Batch, cache: LatentCache) -> Decode | None:
        compiled, rows = kernel.result(), DecodeRows.of(batch)
        if compiled is None:
            return None

        def decode(layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys_latent, values_latent = cache.forms[layer.layer]
            if keys_latent:
                q = per_kv_head(q, layer.key_up())
            up, up_bias = layer.value_up() if values_latent else (None, None)
            return decode_attention(
                compiled,
                q.contiguous(),
                k.flatten(1),
                v.flatten(1),
                cache.keys[layer.layer],
                cache.values[layer.layer],
                rows,
                layer.scale,
                turns=rope,
                up=up,
                up_bias=up_bias,
            )

        return decode

    return TorchBackend(
        model,
        name=f"cpu (oneDNN, {str(dtype).removeprefix('torch.')})",
        batch_invariant=dtype is torch.float32,
        ops=kernel_rows(dtype),
        make_decode=make_decode,
    )


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has GEMMs with packed weights of this type."""
    if not torch.backends.mkldnn.is_available():
        return False
    operators = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")  # private ones
    if not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _interleave(attention: Attention) -> None:
    for layer in (attention.q_proj, attention.k_proj):
        linear = layer.up if isinstance(layer, LowRankLinear) else layer
        rows = interleaved(linear.out_features, attention.head_dim)
        linear.weight.data = linear.weight.data[rows]
        if linear.bias is not None:
            linear.bias.data = linear.bias.data[rows]
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:
            norm.weight.data = norm.weight.data[interleaved(attention.head_dim, attention.head_dim)]


def _pack(model: LPAForCausalLM) -> None:
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    projections = [layer for attention in attentions for layer in (attention.k_proj, attention.v_proj)]
    absorbed = {layer.up for layer in projections if isinstance(layer, LowRankLinear)}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, PackedLinear(module, keep_weight=module in absorbed))
    for name, module in list(model.named_modules()):
        if isinstance(module, SwiGLU):
            layers = (module.gate_proj, module.up_proj, module.down_proj)
            packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
            if len(packed) == 3:
                model.set_submodule(name, PackedSwiGLU(*packed))
    for parameter in model.parameters():  # a view of a mapped file would keep all of it mapped
        parameter.data = parameter.data.clone()
