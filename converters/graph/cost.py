"""The cost model: multiply-accumulates of a block, of a matching step, of one operator."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import onnx_ir as ir

from edgetok.converters.graph.walk import attribute_int


def macs(tokens_attn: int, tokens_mlp: int, width: int, mlp_ratio: float = 4.0) -> int:
    """Multiply-accumulates of one transformer block for one sample.

    4 N D^2 (projections) + 2 N^2 D (scores and values) + 2 rho N' D^2 (MLP); norms, softmax and biases are left out.

    Args:
        tokens_attn: N, tokens entering the attention.
        tokens_mlp: N', tokens entering the MLP.
        width: D.
        mlp_ratio: rho, the MLP's weights divided by 2 D^2 (4 for two layers of 4 D; 6 for a gated one of 4 D).

    Source: the specification's cost model; DeiT-S unreduced is 4,540,695,552 for its twelve blocks.

    Example:
        >>> 12 * macs(197, 197, 384)
        4540695552
    """
    attention = 4 * tokens_attn * width**2 + 2 * tokens_attn**2 * width
    return attention + round(2 * mlp_ratio * tokens_mlp * width**2)


def network_macs(tokens: Sequence[int], tokens_in: int, width: int, mlp_ratio: float = 4.0) -> int:
    """Multiply-accumulates of all blocks when block l hands tokens[l] tokens to its MLP and to the next block."""
    total, entering = 0, tokens_in
    for left in tokens:
        total += macs(entering, left, width, mlp_ratio)
        entering = left
    return total


def matching_macs(tokens: int, channels: int, width: int) -> int:
    """What one bipartite matching adds: na nb C for the similarities, 2 N D for merging (sort left out)."""
    return ((tokens + 1) // 2) * (tokens // 2) * channels + 2 * tokens * width


def node_macs(node: ir.Node, inputs: Sequence[tuple[int, ...] | None], output: tuple[int, ...] | None) -> int | None:
    """Multiply-accumulates of one operator.

    Args:
        node: any operator.
        inputs: concrete shape per input, None when unknown or absent.
        output: concrete shape of the first output.

    Returns:
        The count, 0 for operators that multiply nothing worth counting, None for a product of unknown shape.
    """
    op = node.op_type
    if op in _PRODUCTS:
        index = 3 if op in ("QLinearMatMul", "QLinearConv") else 1
        first = inputs[0] if inputs else None
        second = inputs[index] if len(inputs) > index else None
        if output is None or first is None:
            return None
        if op in ("Conv", "FusedConv", "ConvInteger", "QLinearConv"):
            return None if second is None else prod(output) * prod(second[1:])
        if op == "ConvTranspose":
            return None if second is None else prod(first) * prod(second[1:])
        return prod(output) * _inner(node, op, first)
    if op in _FUSED:
        return _attention_macs(node, inputs, output)
    return None if op in ("Einsum", "LSTM", "GRU", "RNN") else 0


_PRODUCTS = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul",
             "MatMulIntegerToFloat", "MatMulNBits", "Conv", "FusedConv", "ConvInteger", "QLinearConv",
             "ConvTranspose"}  # fmt: skip
_FUSED = {"Attention", "QAttention", "MultiHeadAttention", "GroupQueryAttention"}


def _inner(node: ir.Node, op: str, first: tuple[int, ...]) -> int:
    """Length of the sums in a matrix product."""
    if op == "MatMulNBits":
        return attribute_int(node, "K", first[-1] if first else 1)
    turned = attribute_int(node, "transA", 0)
    return (first[-2] if turned and len(first) > 1 else first[-1]) if first else 1


def _attention_macs(
    node: ir.Node, inputs: Sequence[tuple[int, ...] | None], output: tuple[int, ...] | None
) -> int | None:
    """Scores and weighted sum of a fused attention; its projections too where the node holds them."""
    first, second = (inputs[i] if len(inputs) > i else None for i in (0, 1))
    if first is None or second is None or output is None:
        return None
    if node.domain and node.op_type in ("Attention", "QAttention"):
        batch, length, _ = first
        return batch * length * prod(second) + 2 * batch * length * length * (second[-1] // 3)
    third = inputs[2] if len(inputs) > 2 else None
    if third is None:
        return None
    return prod(first) * second[-2] + prod(output) * third[-2]
