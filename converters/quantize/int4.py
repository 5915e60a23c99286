"""INT4 weights in blocks along the input axis: com.microsoft MatMulNBits; activations stay float.

Every block of ``block`` weights of one output channel has a float scale and, if not symmetric, a 4-bit zero point:
w = (code - zero) * scale. The range of each block is shrunk to its least squared error.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetok.converters.quantize.building import Editor, take_over
from edgetok.converters.quantize.linears import Linear
from edgetok.converters.quantize.settings import LayerRecord, QuantizeSettings

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)


def quantize_blocks(
    matrix: np.ndarray, block: int, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes, scales and zero points; K is padded with zeros to whole blocks.

    Args:
        matrix: [K, N] float32.

    Returns:
        codes u8 0..15 [N, blocks, block], scales float32 [N, blocks], zeros u8 [N, blocks] or None (meaning 8).
    """
    k, n = matrix.shape
    blocks = -(-k // block)
    padded = np.zeros((n, blocks * block), np.float32)
    padded[:, :k] = matrix.T
    w = padded.reshape(n, blocks, block)
    best = np.full((n, blocks), np.inf, np.float32)
    scales = np.ones((n, blocks), np.float32)
    zeros = np.full((n, blocks), 8, np.uint8)
    low, high = np.minimum(w.min(2), 0), np.maximum(w.max(2), 0)
    # with 16 codes and zero at 8 there is one more code below zero than above: give it to the larger end
    signed_peak = np.where(-low > high, low, high)
    for factor in _SHRINK:
        if symmetric:
            scale, zero = -signed_peak * factor / 8, np.full_like(zeros, 8)
        else:
            scale = (high - low) * factor / 15
            zero = np.clip(np.rint(-low * factor / np.where(scale == 0, 1, scale)), 0, 15).astype(np.uint8)
        scale = np.where(np.abs(scale) < 1e-30, 1, scale).astype(np.float32)
        codes = np.clip(np.rint(w / scale[..., None]) + zero[..., None], 0, 15)
        error = np.square((codes - zero[..., None]) * scale[..., None] - w).sum(2)
        better = error < best
        best, scales, zeros = (np.where(better, a, b) for a, b in ((error, best), (scale, scales), (zero, zeros)))
    codes = np.clip(np.rint(w / scales[..., None]) + zeros[..., None], 0, 15).astype(np.uint8)
    return codes, scales.astype(np.float32), None if symmetric else zeros.astype(np.uint8)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes per byte along the last axis, the even one in the low nibble; an odd end is filled with 0."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], -1)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def dequantize_blocks(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, k: int) -> np.ndarray:
    """Float32 [K, N] of what ``quantize_blocks`` gave."""
    zero = 8.0 if zeros is None else zeros[..., None].astype(np.float32)
    w = (codes.astype(np.float32) - zero) * scales[..., None]
    return np.ascontiguousarray(w.reshape(len(codes), -1)[:, :k].T)


def emit(editor: Editor, linear: Linear, settings: QuantizeSettings) -> LayerRecord:
    """Replace one linear by MatMulNBits (the bias Add stays)."""
    matrix = linear.matrix()
    k, n = linear.shape
    codes, scales, zeros = quantize_blocks(matrix, settings.block, symmetric=settings.symmetric)
    difference = dequantize_blocks(codes, scales, zeros, k) - matrix
    error = float(np.linalg.norm(difference) / max(float(np.linalg.norm(matrix)), 1e-30))
    name, node = linear.name, linear.node
    inputs: list[ir.Value | None] = [linear.x, editor.const(f"{name}/w_q4", pack_nibbles(codes))]
    inputs.append(editor.const(f"{name}/w_scale", scales.reshape(-1)))
    if zeros is not None:
        inputs.append(editor.const(f"{name}/w_zero", pack_nibbles(zeros).reshape(-1)))
    attributes = {"K": k, "N": n, "bits": 4, "block_size": settings.block, "accuracy_level": settings.accuracy_level}
    out = editor.node(node, "MatMulNBits", inputs, f"{name}/int4", attributes, domain="com.microsoft").outputs[0]
    if node.op_type == "Gemm" and linear.bias is not None:
        out = editor.node(node, "Add", [out, linear.bias], f"{name}/add").outputs[0]
    take_over(node.outputs[0], out)
    return LayerRecord(name, node.op_type, "int4", linear.shape, linear.macs, error=error)
