"""Hugging Face folders built without torch give torch's outputs in the canonical form; the rest is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file, save_file

from edgetok.converters.graph.cleanup import clean_up
from edgetok.converters.graph.find import find_blocks
from edgetok.converters.sources.hf import load_hf, supported_types
from edgetok.errors import ArtifactError, InputError, UnsupportedError

HF = Path(__file__).parent / "fixtures" / "hf"
FOLDERS = sorted(p.name for p in HF.iterdir() if p.is_dir())


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def golden(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    with np.load(folder / "golden.npz", allow_pickle=False) as data:
        feeds = {k[3:]: data[k] for k in data.files if k.startswith("in.")}
        return feeds, {k[4:]: data[k] for k in data.files if k.startswith("out.")}


def valid_rows(name: str, array: np.ndarray, feeds: dict[str, np.ndarray]) -> np.ndarray:
    mask = feeds.get("attention_mask")
    per_token = mask is not None and array.ndim == 3
    return array[mask.astype(bool)] if per_token and mask is not None else array


@pytest.fixture(autouse=True)
def _no_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals are tested as on a machine without the extra."""
    if "torch" not in request.node.name:
        monkeypatch.setattr("edgetok.converters.sources.torch_export.missing", lambda: ("torch",))


@pytest.fixture
def copy(tmp_path: Path):
    def make(name: str, **changes: object) -> Path:
        folder = tmp_path / name
        shutil.copytree(HF / name, folder)
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config.pop(key, None)
            if value is not ...:
                config[key] = value
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("name", FOLDERS)
def test_outputs_match_torch_on_valid_rows(name: str) -> None:
    feeds, expected = golden(HF / name)
    got = run(load_hf(HF / name).model, feeds)
    checked = [k for k in expected if k in got]
    assert checked
    assert {"logits"} & set(expected) <= set(got)
    for key in checked:
        # float32 rounding of two layers of width 16, values of order one
        a, b = (valid_rows(key, x, feeds) for x in (got[key], expected[key]))
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", FOLDERS)
def test_graph_is_canonical_and_valid(name: str) -> None:
    model = load_hf(HF / name).model
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert dict(model.graph.opset_imports) == {"": 18}
    ops = Counter(n.op_type for n in model.graph)
    layers = 2
    assert ops["Softmax"] == layers
    assert ops["LayerNormalization"] >= 2 * layers
    assert ops["Gemm"] + ops["If"] == 0
    for node in model.graph:
        if node.op_type == "Reshape" and node.outputs[0].shape is not None and node.outputs[0].shape.rank() == 4:
            shape = node.inputs[1].const_value
            assert shape is not None
            assert shape.numpy()[1] == 0, "a token count is baked into a Reshape"


@pytest.mark.parametrize("name", ["minilm", "vit"])
def test_batch_is_open(name: str) -> None:
    feeds, _ = golden(HF / name)
    model = load_hf(HF / name).model
    one = run(model, {k: v[:1] for k, v in feeds.items()})
    both = run(model, feeds)
    for key in one:
        np.testing.assert_allclose(one[key], both[key][:1], atol=1e-6)


@pytest.mark.parametrize("name", ["dinov2-any", "dinov2-registers-any"])
def test_other_image_size_resizes_positions_once_it_is_fixed(name: str) -> None:
    feeds, expected = golden(HF / name)
    model = load_hf(HF / name).model
    assert [str(d) for d in model.graph.inputs[0].shape][2:] == ["height", "width"]
    clean_up(model, {"pixel_values": ("batch", 3, 12, 24)})
    assert "Resize" not in {n.op_type for n in model.graph}
    assert find_blocks(model).tokens == expected["last_hidden_state"].shape[1]
    np.testing.assert_allclose(run(model, feeds)["last_hidden_state"], expected["last_hidden_state"], atol=1e-5)


def test_sequence_is_open_and_pads_do_not_matter() -> None:
    feeds, _ = golden(HF / "minilm")
    model = load_hf(HF / "minilm").model
    short = {k: v[2:, :2] for k, v in feeds.items()}  # its valid part
    np.testing.assert_allclose(
        run(model, short)["sentence_embedding"], run(model, feeds)["sentence_embedding"][2:], atol=1e-6
    )


def test_sentence_folder_has_embedding_of_unit_length() -> None:
    feeds, _ = golden(HF / "minilm")
    source = load_hf(HF / "minilm")
    assert [o.name for o in source.model.graph.outputs] == ["last_hidden_state", "sentence_embedding"]
    np.testing.assert_allclose(np.linalg.norm(run(source.model, feeds)["sentence_embedding"], axis=1), 1, atol=1e-6)
    assert {"config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"} <= set(source.files)


def test_several_pooling_modes_are_concatenated(copy) -> None:
    folder = copy("minilm")
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    modules = json.loads((folder / "modules.json").read_text())[:2]
    (folder / "modules.json").write_text(json.dumps(modules))
    feeds, _ = golden(HF / "minilm")
    got = run(load_hf(folder).model, feeds)
    hidden, keep = got["last_hidden_state"], feeds["attention_mask"][..., None].astype(bool)
    want = np.concatenate(
        [hidden[:, 0], np.where(keep, hidden, 0).sum(1) / keep.sum(1), np.where(keep, hidden, -np.inf).max(1)], axis=1
    )
    np.testing.assert_allclose(got["sentence_embedding"], want, atol=1e-6)


def test_shards_read_like_one_file(copy) -> None:
    folder = copy("bert")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / file)
    index = {"weight_map": {k: f for f, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    feeds, expected = golden(folder)
    got = run(load_hf(folder).model, feeds)
    np.testing.assert_allclose(got["pooler_output"], expected["pooler_output"], atol=1e-5)


def test_shard_names_outside_the_folder_are_refused(copy) -> None:
    folder = copy("bert")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../bert/model.safetensors"}}')
    with pytest.raises(ArtifactError, match="plain"):
        load_hf(folder)


def test_source_hash_follows_the_weights(copy) -> None:
    folder = copy("bert")
    before = load_hf(folder).sha256
    assert before == load_hf(folder).sha256
    tensors = load_file(folder / "model.safetensors")
    tensors["pooler.dense.bias"] = tensors["pooler.dense.bias"] + 1
    save_file(tensors, folder / "model.safetensors")
    assert load_hf(folder).sha256 != before


def test_old_layer_norm_names_are_read(copy) -> None:
    folder = copy("bert")
    tensors = load_file(folder / "model.safetensors")
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        tensors = {k.replace(new, old): v for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    feeds, expected = golden(folder)
    got = run(load_hf(folder).model, feeds)
    np.testing.assert_allclose(got["pooler_output"], expected["pooler_output"], atol=1e-5)


def test_other_types_go_through_torch_when_it_is_installed(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the [torch] extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the [torch] extra is not installed")
    config = transformers.ElectraConfig(
        vocab_size=60,
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
    )
    model = transformers.ElectraModel(config).eval()
    model.save_pretrained(tmp_path)
    ids = np.arange(12).reshape(2, 6)
    got = run(load_hf(tmp_path).model, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    with torch.no_grad():
        want = model(torch.from_numpy(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(got["last_hidden_state"], want, atol=1e-5)


def test_unknown_type_names_the_extra(copy) -> None:
    with pytest.raises(UnsupportedError, match="mamba") as caught:
        load_hf(copy("bert", model_type="mamba"))
    assert "edgetok[torch]" in (caught.value.next or "")
    assert all(t in caught.value.message for t in supported_types())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("rope_theta", 10000.0),
        ("quantization_config", {"bits": 4}),
        ("auto_map", {"AutoModel": "evil.Model"}),
        ("sliding_window", 128),
        ("pruned_heads", {"0": [1]}),
    ],
)
def test_keys_that_change_the_maths_are_refused_by_name(copy, key: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=key):
        load_hf(copy("bert", **{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", "12"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2.0),
        ("num_hidden_layers", ...),
        ("hidden_size", 10**6),
        ("hidden_size", 18),
        ("vocab_size", -1),
        ("intermediate_size", 10**7),
        ("layer_norm_eps", "small"),
        ("layer_norm_eps", -1.0),
        ("layer_norm_eps", float("nan")),
        ("hidden_act", 3),
    ],
)
def test_bad_counts_are_rejected_by_name(copy, key: str, value: object) -> None:
    with pytest.raises(ArtifactError):
        load_hf(copy("bert", **{key: value}))


def test_unknown_activation_lists_the_known(copy) -> None:
    with pytest.raises(UnsupportedError, match="gelu_new"):
        load_hf(copy("bert", hidden_act="mish"))


def test_more_layers_than_weights_names_the_missing_tensor(copy) -> None:
    with pytest.raises(ArtifactError, match=r"layer\.2\..*missing"):
        load_hf(copy("bert", num_hidden_layers=3))


def test_fewer_layers_than_weights_is_refused(copy) -> None:
    with pytest.raises(UnsupportedError, match=r"encoder\.layer\.1"):
        load_hf(copy("bert", num_hidden_layers=1))


def test_pickled_weights_are_refused(copy) -> None:
    folder = copy("bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="pickle"):
        load_hf(folder)


def test_missing_folder_and_missing_weights_are_usage_errors(copy, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load_hf(tmp_path / "nothing")
    folder = copy("bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError):
        load_hf(folder)


@pytest.mark.parametrize("keep", [0, 7, 8, 60, 400])
def test_cut_weights_are_rejected(copy, keep: int) -> None:
    folder = copy("bert")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(ArtifactError):
        load_hf(folder)


def test_broken_json_is_rejected(copy) -> None:
    folder = copy("bert")
    for text in ("", "{", "[]", "[" * 100_000, "\xff"):
        (folder / "config.json").write_text(text, "latin-1")
        with pytest.raises(ArtifactError):
            load_hf(folder)


def test_loading_imports_no_torch() -> None:
    code = (
        "import sys, pathlib; from edgetok.converters.sources.hf import load_hf;"
        f"load_hf(pathlib.Path({str(HF / 'vit')!r})); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


@pytest.mark.model
def test_real_minilm_matches_torch(public_model) -> None:
    """all-MiniLM-L6-v2 against transformers, to the float32 rounding of six layers."""
    source = load_hf(Path(public_model("minilm-l6")))
    with np.load(HF / "minilm_l6_golden.npz", allow_pickle=False) as data:
        ids, mask, first, embedding = (data[k] for k in ("ids", "mask", "first", "embedding"))
    got = run(source.model, {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    np.testing.assert_allclose(got["sentence_embedding"], embedding, atol=1e-6)
    np.testing.assert_allclose(got["last_hidden_state"][:, 0], first, atol=1e-5)
