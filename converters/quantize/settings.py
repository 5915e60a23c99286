"""What a user may set about quantization, and the record of what was done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from edgetok.errors import InputError

PRECISIONS = ("keep", "fp16", "int8", "int8-dynamic", "int4")
RANGE_METHODS = ("minmax", "percentile-99.99", "percentile-99.9", "percentile-99", "mse", "entropy")
REDUCE_PREFIX = "edgetok/reduce/"

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QuantizeSettings:
    """How to quantize. The defaults are for a transformer encoder on a CPU with u8 x s8 dot products.

    Args:
        threads: onnxruntime threads while calibrating.
        rows: sampled activation rows kept per quantized input; more is slower and needs more memory.
        range_methods: candidates for the activation range; the one with the least output error is taken.
        smooth: "auto" (fold or insert where it lowers the error), "fold" (only where it is free), "off".
        alphas: candidates of SmoothQuant's migration strength, 0 to 1.
        insert_gain: a scale that cannot be folded costs one multiplication per element; it is inserted only if it
            divides the squared output error of the layer by at least this much.
        bias_correction: move the mean output error of each layer into its bias.
        keep_float: name patterns (fnmatch) of linear layers that stay float, before anything is measured.
        auto_keep: choose more layers to keep float by measured error share.
        max_error: aim of ``auto_keep``, relative L2 error of the graph outputs on calibration samples.
        max_float_macs: ``auto_keep`` keeps at most this share of all multiply-accumulates float.
        sensitivity_samples: calibration samples used to measure error shares.
        reduce_range: 7-bit weights, for CPUs without VNNI where u8 x s8 pairs saturate 16 bits.
        tables: quantize embedding tables (Gather from a constant) of at least 1 MiB to 8 bits per row.
        block: int4 block along the input axis: 16, 32, 64, 128 or 256.
        symmetric: int4 without zero points.
        accuracy_level: int4 arithmetic in onnxruntime: 4 computes in int8, 0 in float.
    """

    threads: int = 2
    rows: int = 1024
    range_methods: tuple[str, ...] = ("minmax", "percentile-99.99", "percentile-99.9", "mse", "entropy")
    smooth: str = "auto"
    alphas: tuple[float, ...] = (0.3, 0.5, 0.65, 0.8)
    insert_gain: float = 1.6
    bias_correction: bool = True
    keep_float: tuple[str, ...] = ()
    auto_keep: bool = True
    max_error: float = 0.1
    max_float_macs: float = 0.15
    sensitivity_samples: int = 2
    reduce_range: bool = False
    tables: bool = True
    block: int = 32
    symmetric: bool = False
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        unknown = [m for m in self.range_methods if m not in RANGE_METHODS]
        if unknown or not self.range_methods:
            raise InputError(f"unknown range method {unknown!r}", next=f"choose from {', '.join(RANGE_METHODS)}")
        if self.smooth not in ("auto", "fold", "off"):
            raise InputError(f"smooth={self.smooth!r}: choose auto, fold or off")
        if self.block not in (16, 32, 64, 128, 256):
            raise InputError(f"int4 block {self.block}: choose 16, 32, 64, 128 or 256")
        if not all(0 < a <= 1 for a in self.alphas):
            raise InputError("alphas must lie above 0 and at most 1")
        if not (1 <= self.rows <= 65536 and self.threads >= 1 and self.sensitivity_samples >= 1):
            raise InputError("rows must be 1 to 65536, threads and sensitivity_samples at least 1")


@dataclass(frozen=True)
class LayerRecord:
    """What became of one linear layer or table.

    Args:
        name: of the node.
        op: "MatMul", "Gemm" or "Gather".
        precision: "int8", "int8-dynamic", "int4", "int8-table", "float".
        weight_shape: [K, N].
        macs: per row of input, K * N.
        range_method: how the activation range was chosen; "" if there is none.
        scale, zero_point: of the activation.
        smooth: "" or "folded into NODE" or "inserted", with ``alpha``.
        error: relative L2 error of this layer's own output on sampled rows.
        share: its share of the squared error at the graph outputs, measured one layer (group) at a time; the layers
            reading one activation are measured together and carry the same share. None if not measured.
        reason: why it stayed float.
    """

    name: str
    op: str
    precision: str
    weight_shape: tuple[int, int]
    macs: int
    range_method: str = ""
    scale: float | None = None
    zero_point: int | None = None
    smooth: str = ""
    alpha: float | None = None
    error: float | None = None
    share: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class QuantizeReport:
    """What quantization did.

    Args:
        precision: as asked.
        layers: one record per layer or table considered.
        kept_float: names of linear layers that stayed float.
        samples: calibration samples used.
        output_error: graph output to relative L2 error against the float graph on ``sensitivity_samples`` samples.
        bytes_before, bytes_after: of all initializers.
        seconds: wall time.
        notes: sentences for the user.
    """

    precision: str
    layers: tuple[LayerRecord, ...] = ()
    kept_float: tuple[str, ...] = ()
    samples: int = 0
    output_error: dict[str, float] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def worst(self, count: int = 5) -> tuple[LayerRecord, ...]:
        """The layers with the largest share of the output error, largest first."""
        known = [r for r in self.layers if r.share is not None and r.precision != "float"]
        return tuple(sorted(known, key=lambda r: -(r.share or 0.0))[:count])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest and ``--json``."""
        return asdict(self)
