"""The rules an ONNX model must keep before any of its tensors is used.

Names, counts, strings, nesting, operator sets, scopes and operator schemas are checked on the parsed message;
tensors by :mod:`edgetok.onnx_tensors`. Nothing here opens a file, and no attribute of ours is ever set from a name
in the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import checker, defs

from edgetok.errors import ArtifactError, UnsupportedError
from edgetok.limits import LoadLimits, checked_add
from edgetok.onnx_scan import scan
from edgetok.onnx_tensors import External, check_tensor

A = onnx.AttributeProto
# Domains whose operators stock runtimes carry; every other domain must be defined by functions inside the model.
KNOWN_DOMAINS: dict[str, int] = {
    "": defs.onnx_opset_version(),
    "ai.onnx.ml": 5,
    "com.microsoft": 1,
    "ai.edgetok": 1,
}
OLDEST_OPSET = 7
_OPSET_MAX = (1 << 31) - 1  # of any domain; a model's own functions may number theirs freely below
_PAYLOAD = {
    A.FLOAT: "f", A.INT: "i", A.STRING: "s", A.TENSOR: "t", A.GRAPH: "g", A.SPARSE_TENSOR: "sparse_tensor",
    A.TYPE_PROTO: "tp", A.FLOATS: "floats", A.INTS: "ints", A.STRINGS: "strings", A.TENSORS: "tensors",
    A.GRAPHS: "graphs", A.SPARSE_TENSORS: "sparse_tensors", A.TYPE_PROTOS: "type_protos",
}  # fmt: skip
_LISTS = frozenset({"floats", "ints", "strings", "tensors", "graphs", "sparse_tensors", "type_protos"})
# Attributes that hold axis numbers: native shape inference elsewhere has indexed with them unchecked.
_AXES = frozenset({"axis", "axes", "perm", "batch_axis", "time_axis", "batch_dims", "start", "end"})


def printable(text: str | bytes) -> str:
    """Text from a file as it may be shown on a terminal: control characters become question marks."""
    if isinstance(text, bytes):  # what the library gives for a string that is not UTF-8
        text = text.decode("ascii", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)


@dataclass
class Checked:
    """What the rules found on the way.

    Args:
        external: places of tensors outside the file.
        bytes: of all tensors as declared.
        nodes, tensors: counts.
    """

    external: list[External] = field(default_factory=list)
    bytes: int = 0
    nodes: int = 0
    tensors: int = 0


def parse_onnx(data: bytes, limits: LoadLimits, *, where: str, schemas: bool = True) -> tuple[onnx.ModelProto, Checked]:
    """Parse and check a serialized ModelProto.

    Args:
        data: the file's bytes.
        schemas: also hold each node of a standard domain against its operator's schema.

    Raises:
        ArtifactError: not an ONNX model, or a rule is broken; the sentence names what, where and why.
        UnsupportedError: an operator set or operator this build does not know.
    """
    limits.check("model_bytes", len(data), "size of the graph in bytes (protobuf stops at 2 GiB)", where=where)
    scan(data, limits, where=where)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as exc:  # the library raises DecodeError, and others on odd unicode
        raise ArtifactError(f"not an ONNX model, or damaged: {exc}", where=where) from exc
    return model, check_model(model, limits, where=where, schemas=schemas)


def check_model(model: onnx.ModelProto, limits: LoadLimits, *, where: str, schemas: bool = True) -> Checked:
    """Check a parsed model; see :func:`parse_onnx` for what it raises."""
    if not model.HasField("graph"):
        raise ArtifactError("the file holds no graph: not an ONNX model", where=where)
    if model.ir_version < 3:
        raise ArtifactError(f"IR version {model.ir_version} is too old or missing (3 or newer is read)", where=where)
    if model.ir_version > onnx.IR_VERSION:
        raise UnsupportedError(
            f"IR version {model.ir_version} is newer than {onnx.IR_VERSION}, the newest known here",
            where=where,
            next="save the model with an older onnx package, or update the one here",
        )
    if len(model.training_info):
        raise UnsupportedError(
            "the model holds a training graph", where=where, next="export it for inference and try again"
        )
    return _Rules(model, limits, where, schemas).run()


class _Rules:
    """One pass over a model; holds what the checks share."""

    def __init__(self, model: onnx.ModelProto, limits: LoadLimits, where: str, schemas: bool) -> None:
        self.model, self.limits, self.where, self.schemas = model, limits, where, schemas
        self.found = Checked()
        self.functions: set[tuple[str, str, str]] = set()
        self.opsets: dict[str, int] = {}

    def run(self) -> Checked:
        model = self.model
        for name in ("producer_name", "producer_version", "domain"):
            self.name(getattr(model, name), name.replace("_", " "))
        self.string(model.doc_string, "documentation of the model")
        self.entries(model.metadata_props, "model metadata")
        self.limits.check("functions", len(model.functions), "functions", where=self.where)
        for function in model.functions:
            key = (function.domain, function.name, function.overload)
            if key in self.functions:
                raise ArtifactError(f"function {printable(function.name[:80])!r} is defined twice", where=self.where)
            self.functions.add(key)
        self.opsets = self.imports(model.opset_import, "the model")
        self.graph(model.graph, frozenset(), 0, top=True)
        for function in model.functions:
            self.function(function)
        return self.found

    def name(self, text: str, what: str, *, empty: bool = True) -> None:
        if not text and not empty:
            raise ArtifactError(f"{what} is empty", where=self.where)
        self.utf8(text, what)
        self.limits.check("name_chars", len(text), f"length of the {what}", where=self.where)
        if "\0" in text:
            raise ArtifactError(f"the {what} holds a NUL character", where=self.where)

    def utf8(self, text: str, what: str) -> None:
        if not isinstance(text, str):
            raise ArtifactError(f"the {what} is not UTF-8", where=self.where)

    def string(self, text: str, what: str) -> None:
        self.utf8(text, what)
        self.limits.check("string_bytes", len(text), f"length of the {what}", where=self.where)

    def unique(self, names: Iterable[str], what: str) -> set[str]:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise ArtifactError(f"{what} {name[:80]!r} appears twice", where=self.where)
            seen.add(name)
        return seen

    def entries(self, props: Sequence[Any], what: str) -> None:
        self.limits.check("entries", len(props), f"entries of the {what}", where=self.where)
        for prop in props:
            self.name(prop.key, f"key in the {what}")
            self.string(prop.value, f"value of {prop.key[:80]!r} in the {what}")
        self.unique((p.key for p in props), f"key in the {what}")

    def imports(self, opsets: Sequence[Any], what: str) -> dict[str, int]:
        self.limits.check("opset_imports", len(opsets), f"operator sets imported by {what}", where=self.where)
        result: dict[str, int] = {}
        local = {domain for domain, _, _ in self.functions}
        for opset in opsets:
            domain = "" if opset.domain == "ai.onnx" else opset.domain
            self.name(domain, "operator set's domain")
            if domain in result:
                raise ArtifactError(f"operator set {domain or 'ai.onnx'!r} is imported twice", where=self.where)
            if opset.version < 1:
                raise ArtifactError(
                    f"operator set {domain or 'ai.onnx'!r} has version {opset.version}", where=self.where
                )
            if opset.version > _OPSET_MAX:
                raise ArtifactError(f"operator set {domain!r} has version {opset.version}", where=self.where)
            newest = KNOWN_DOMAINS.get(domain)
            if newest is not None and opset.version > newest and domain not in local:
                raise UnsupportedError(
                    f"operator set {domain or 'ai.onnx'} {opset.version} is newer than {newest}, the newest known here",
                    where=self.where,
                    next="export the model at opset 18 to 23, or update the onnx package",
                )
            if domain == "" and 0 < opset.version < OLDEST_OPSET:
                raise UnsupportedError(
                    f"operator set ai.onnx {opset.version} is older than {OLDEST_OPSET}",
                    where=self.where,
                    next="convert it with onnx.version_converter.convert_version(model, 18)",
                )
            result[domain] = opset.version
        return result

    def function(self, function: onnx.FunctionProto) -> None:
        where, outer = self.where, self.opsets
        self.where = f"{where}: function {function.name[:80]!r}"
        self.name(function.name, "function's name", empty=False)
        self.name(function.domain, "function's domain")
        self.string(function.doc_string, "documentation of the function")
        self.entries(function.metadata_props, "function's metadata")
        self.opsets = self.imports(function.opset_import, "the function")
        for names, what in ((function.input, "inputs"), (function.attribute, "attributes")):
            self.limits.check("entries", len(names), f"{what} of the function", where=self.where)
            for name in names:
                self.name(name, f"name in the {what} of the function")
            self.unique(names, what[:-1])
        self.attributes(function.attribute_proto, frozenset(), 0)
        defined = self.nodes(function.node, set(function.input), frozenset(), 0)
        for name in function.output:
            if name not in defined:
                raise ArtifactError(f"function output {name[:80]!r} is computed by no node", where=self.where)
        self.where, self.opsets = where, outer

    def graph(self, graph: onnx.GraphProto, outer: frozenset[str], depth: int, *, top: bool = False) -> None:
        self.limits.check("nesting", depth, "subgraphs inside each other", where=self.where)
        self.name(graph.name, "graph's name")
        self.string(graph.doc_string, "documentation of the graph")
        self.entries(graph.metadata_props, "graph's metadata")
        values = len(graph.input) + len(graph.output) + len(graph.value_info)
        self.limits.check("values", values, "inputs, outputs and value infos", where=self.where)
        inputs = self.unique((v.name for v in graph.input), "graph input")
        self.unique((v.name for v in graph.output), "graph output")
        for value in (*graph.input, *graph.output, *graph.value_info):
            self.value(value, typed=top and value.name in inputs)
        for note in graph.quantization_annotation:
            self.name(note.tensor_name, "annotated tensor's name")
            self.entries(note.quant_parameter_tensor_names, "quantization annotation")
        constants = self.unique(
            [*(t.name for t in graph.initializer), *(s.values.name for s in graph.sparse_initializer)], "initializer"
        )
        for tensor in graph.initializer:
            self.name(tensor.name, "initializer's name", empty=False)
            self.tensor(tensor)
        for sparse in graph.sparse_initializer:
            self.sparse(sparse)
        defined = self.nodes(graph.node, inputs | constants, outer, depth)
        for value in graph.output:
            if value.name not in defined and value.name not in outer:
                raise ArtifactError(f"graph output {value.name[:80]!r} is computed by no node", where=self.where)

    def nodes(self, nodes: Sequence[onnx.NodeProto], known: set[str], outer: frozenset[str], depth: int) -> set[str]:
        self.found.nodes = checked_add(self.found.nodes, len(nodes), what="nodes", where=self.where)
        self.limits.check("nodes", self.found.nodes, "nodes in the model", where=self.where)
        defined = set(known)
        for node in nodes:
            for output in filter(None, node.output):
                self.name(output, "value's name")
                if output in defined:
                    raise ArtifactError(f"value {output[:80]!r} is defined twice", where=self.node_name(node))
                defined.add(output)
        scope = (
            frozenset(defined | outer)
            if any(a.type in (A.GRAPH, A.GRAPHS) for n in nodes for a in n.attribute)
            else outer
        )
        for node in nodes:
            self.node(node, defined, outer, scope, depth)
        return defined

    def node_name(self, node: onnx.NodeProto) -> str:
        return f"{self.where}: node {node.name[:80]!r} ({printable(node.op_type[:40])})"

    def node(
        self, node: onnx.NodeProto, defined: set[str], outer: frozenset[str], scope: frozenset[str], depth: int
    ) -> None:
        before, self.where = self.where, self.node_name(node)
        for text, what in ((node.name, "node's name"), (node.domain, "node's domain"), (node.overload, "overload")):
            self.name(text, what)
        self.name(node.op_type, "operator's name", empty=False)
        self.string(node.doc_string, "documentation of the node")
        self.entries(node.metadata_props, "node's metadata")
        self.limits.check("entries", len(node.input), "inputs of the node", where=self.where)
        self.limits.check("entries", len(node.output), "outputs of the node", where=self.where)
        for name in filter(None, node.input):
            self.name(name, "value's name")
            if name not in defined and name not in outer:
                raise ArtifactError(
                    f"input {name[:80]!r} is computed by no node and given by no input", where=self.where
                )
        has_graphs = self.attributes(node.attribute, scope, depth)
        self.operator(node, has_graphs)
        self.where = before

    def operator(self, node: onnx.NodeProto, has_graphs: bool) -> None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (node.domain, node.op_type, node.overload) in self.functions:
            return
        if domain not in KNOWN_DOMAINS:
            raise UnsupportedError(
                f"operator {printable(domain[:80])}::{printable(node.op_type[:80])} needs a library of custom "
                "operators; none is ever loaded for a model",
                where=self.where,
                next="export the model with standard operators only",
            )
        version = self.opsets.get(domain)
        if version is None:
            raise ArtifactError(f"the model does not import operator set {domain or 'ai.onnx'!r}", where=self.where)
        if domain not in ("", "ai.onnx.ml") or not self.schemas:
            return
        if not defs.has(node.op_type, version, domain):
            raise UnsupportedError(
                f"operator {printable(node.op_type[:80])} is not in operator set {domain or 'ai.onnx'} {version}",
                where=self.where,
                next="export the model at opset 18 to 23 with standard operators",
            )
        outside = any(a.t.data_location == onnx.TensorProto.EXTERNAL for a in node.attribute)
        # The checker would want the names around a subgraph, and would look for external data by itself.
        if not has_graphs and not outside:
            self.schema(node)

    def schema(self, node: onnx.NodeProto) -> None:
        context = checker.C.CheckerContext()
        context.ir_version = self.model.ir_version
        context.opset_imports = self.opsets
        try:
            checker.check_node(node, context)
        except Exception as exc:  # ValidationError, and others for what its C++ side cannot read
            first = printable((str(exc).strip() or type(exc).__name__).splitlines()[0][:300])
            raise ArtifactError(f"does not fit its operator's definition: {first}", where=self.where) from exc

    def attributes(self, attributes: Sequence[onnx.AttributeProto], scope: frozenset[str], depth: int) -> bool:
        self.limits.check("entries", len(attributes), "attributes", where=self.where)
        self.unique((a.name for a in attributes), "attribute")
        has_graphs = False
        for attribute in attributes:
            self.name(attribute.name, "attribute's name", empty=False)
            self.name(attribute.ref_attr_name, "referred attribute's name")
            self.string(attribute.doc_string, "documentation of an attribute")
            self.payload(attribute)
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                has_graphs = True
                self.graph(graph, scope, depth + 1)
        return has_graphs

    def payload(self, attribute: onnx.AttributeProto) -> None:
        where = f"{self.where}: attribute {attribute.name[:80]!r}"
        field_name = _PAYLOAD.get(attribute.type)
        if field_name is None and not attribute.ref_attr_name:
            raise ArtifactError(f"unknown attribute type {attribute.type}", where=where)
        for other in _PAYLOAD.values():
            present = len(getattr(attribute, other)) > 0 if other in _LISTS else attribute.HasField(other)
            if present and (other != field_name or attribute.ref_attr_name):
                raise ArtifactError(f"holds {other!r}, which its type {attribute.type} does not allow", where=where)
        if field_name in ("floats", "ints", "strings"):
            count = len(getattr(attribute, field_name))
            self.limits.check("attribute_values", count, "values in an attribute", where=where)
        for text in (attribute.s, *attribute.strings):
            self.limits.check("string_bytes", len(text), "length of a string attribute in bytes", where=where)
        if attribute.name in _AXES and attribute.type in (A.INT, A.INTS):
            for axis in attribute.ints if attribute.type == A.INTS else (attribute.i,):
                if not -self.limits.rank <= axis <= self.limits.rank:
                    raise ArtifactError(f"axis {axis} is outside what {self.limits.rank} axes allow", where=where)
        for tensor in (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else ())):
            self.tensor(tensor)
        for sparse in (
            *attribute.sparse_tensors, *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else ()),
        ):  # fmt: skip
            self.sparse(sparse)

    def tensor(self, tensor: onnx.TensorProto) -> None:
        self.name(tensor.name, "tensor's name")
        self.string(tensor.doc_string, "documentation of a tensor")
        self.entries(tensor.metadata_props, "tensor's metadata")
        self.found.tensors += 1
        self.limits.check("tensors", self.found.tensors, "tensors in the model", where=self.where)
        size, external = check_tensor(tensor, self.limits, where=self.where)
        self.found.bytes = checked_add(self.found.bytes, size, what="size of all tensors", where=self.where)
        self.limits.check("total_bytes", self.found.bytes, "size of all tensors in bytes", where=self.where)
        if external is not None:
            self.found.external.append(external)

    def sparse(self, sparse: onnx.SparseTensorProto) -> None:
        raise UnsupportedError(
            f"sparse tensor {sparse.values.name[:80]!r}: sparse weights are not read",
            where=self.where,
            next="export the model with dense weights",
        )

    def value(self, value: onnx.ValueInfoProto, *, typed: bool) -> None:
        self.name(value.name, "value's name", empty=False)
        self.string(value.doc_string, "documentation of a value")
        self.entries(value.metadata_props, "value's metadata")
        where = f"{self.where}: value {value.name[:80]!r}"
        if typed and value.type.WhichOneof("value") is None:
            raise ArtifactError("graph input without a type", where=where)
        if value.type.WhichOneof("value") != "tensor_type":
            return
        tensor = value.type.tensor_type
        if tensor.elem_type not in onnx.TensorProto.DataType.values() or (typed and tensor.elem_type == 0):
            raise ArtifactError(f"unknown data type {tensor.elem_type}", where=where)
        self.limits.check("rank", len(tensor.shape.dim), "axes", where=where)
        for axis, dim in enumerate(tensor.shape.dim):
            self.name(dim.dim_param, "axis' name")
            if dim.HasField("dim_value"):
                if dim.dim_value < 0:
                    raise ArtifactError(f"axis {axis} has the negative length {dim.dim_value}", where=where)
                self.limits.check("dim", dim.dim_value, f"length of axis {axis}", where=where)
