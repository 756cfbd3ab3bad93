"""A loaded model made ready to compute: the same function in forms that a processor runs faster.

Nothing here touches checkpoints or training; a model that has been prepared cannot be saved or trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lpa_model.attention import Attention
from lpa_model.cache import LatentCache
from lpa_model.fused import FusedStep, can_fuse
from lpa_model.kernels import attention, draws, masks, programs, rms_norm, row_scores
from lpa_model.kernels.instructions import paired_products
from lpa_model.kernels.launch import compile_kernel
from lpa_model.layers import LowRankLinear, RMSNorm, SwiGLU
from lpa_model.model import LPAForCausalLM


class PackedLinear(nn.Module):
    """A linear layer whose weight oneDNN has laid out once for its products, instead of at every call.

    The products are bit for bit those of `F.linear`. `weight` keeps the plain matrix where somebody reads it.
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


def prepare_for_inference(model: LPAForCausalLM, cache: LatentCache | None = None) -> None:
    """Change a loaded model in place: rotary pairs side by side, and one product for the A of q, k and v.

    With a cache, and where the processor multiplies pairs of bfloat16, its steps over that cache become programs and
    the layers are let go. Otherwise, where torch has oneDNN (and the processor multiplies bfloat16 if the weights are),
    weights are laid out for it, the feed-forward layers are fused, and the tensors as they were loaded are let go. In
    float32 a row's product is then the same to the bit in any number of rows above one; plain products differ from 12
    rows to 16.
    """
    kernel = None
    if cache is not None and can_fuse(model, cache):
        kernel = compile_kernel(programs.KERNELS[paired_products()[0]])
    for module in model.modules():
        if isinstance(module, Attention):
            if model.rotary is not None:
                _interleave(module)
            _join_down(module)
    if model.rotary is not None:
        model.rotary.turns = torch.complex(model.rotary.cos, model.rotary.sin)
    if cache is not None and kernel is not None and (ready := kernel.result()) is not None:
        model.fused = FusedStep(model, cache, ready)
        del model.layers, model.lm_head
        _let_go(model)
    else:
        _compile_layers(model)
        if can_pack(model):
            _pack(model)
    _compile_for_logits(model.embed_tokens.weight)


def _interleave(attention: Attention) -> None:
    """Reorder the dimensions of queries and keys so that those that turn together are neighbours; scores stay."""
    order = torch.arange(attention.head_dim).view(2, -1).T.flatten()  # 0, dh/2, 1, dh/2 + 1, ...
    for layer in (attention.q_proj, attention.k_proj):
        linear = layer.up if isinstance(layer, LowRankLinear) else layer
        rows = torch.arange(linear.out_features).view(-1, attention.head_dim)[:, order].flatten()
        _replace(linear, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:
            norm.weight.data = norm.weight.data[order]


def _join_down(attention: Attention) -> None:
    """One layer for the A of q, k and v, where all three are low-rank."""
    layers = [
        layer for layer in (attention.q_proj, attention.k_proj, attention.v_proj) if isinstance(layer, LowRankLinear)
    ]
    if len(layers) < 3:
        return
    biases = [layer.down.bias.data for layer in layers if layer.down.bias is not None]  # all three have one, or none
    joint = nn.Linear(1, 1)
    weights = [layer.down.weight.data for layer in layers]
    _replace(joint, torch.cat(weights), torch.cat(biases) if biases else None)
    attention.joint_down, attention.joint_ranks = joint, [len(weight) for weight in weights]
    for layer in layers:
        del layer.down


def _replace(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    linear.out_features, linear.in_features = weight.shape


def can_pack(model: LPAForCausalLM) -> bool:
    """Whether oneDNN's products with weights in its own layout are there for this model's dtype and device."""
    weight = model.embed_tokens.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    operators = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")  # private ones
    if not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


def _compile_layers(model: LPAForCausalLM) -> None:
    """Have kernels compiled where there are some for this model's dtype and device."""
    weight = model.embed_tokens.weight
    decode_kernel = attention.KERNELS.get(weight.dtype)
    if weight.device.type != "cpu" or decode_kernel is None:
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention):
            module.kernel = compile_kernel(decode_kernel)
        if isinstance(module, RMSNorm) and weight.dtype is torch.bfloat16:
            model.set_submodule(name, CompiledRMSNorm(module))


def _compile_for_logits(weight: Tensor) -> None:
    """The same for whoever samples from logits in the dtype of `weight`, or scores them."""
    if weight.device.type != "cpu" or weight.dtype not in draws.KERNELS:
        return
    for dtype in {weight.dtype, torch.float32}:  # of logits as they are, and of those that something was added to
        compile_kernel(draws.KERNELS[dtype])
    for kernels in (masks.KERNELS, row_scores.KERNELS):
        compile_kernel(kernels[weight.dtype])


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
    _let_go(model)


def _let_go(model: LPAForCausalLM) -> None:
    for parameter in model.parameters():  # a view of a mapped file would keep all of it mapped
        parameter.data = parameter.data.clone()
