"""Find out what a path is and load it: an ONNX file, an artifact, a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from edgetok.converters.sources.base import Source
from edgetok.errors import ArtifactError, EdgeTokError, InputError, UnsupportedError
from edgetok.limits import DEFAULT, LoadLimits, effective

MANIFEST = "edgetok.json"
_PICKLE = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib"})
_READS = "edgetok reads .onnx files, artifacts (folder or .edgetok) and Hugging Face folders"


def load_source(path: Path | str, limits: LoadLimits = DEFAULT) -> Source:
    """Load whatever ``path`` names.

    Raises:
        InputError: nothing there, or no kind of file that edgetok reads; names the next step.
        UnsupportedError: a kind of file this version does not read yet.
        ArtifactError: malformed, over a limit, or a pickle.
    """
    path, limits = Path(path), effective(limits)
    if not path.exists():
        raise InputError("no such file or folder", where=str(path), next="check the path; " + _READS)
    if path.is_dir():
        return _load_folder(path, limits)
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        from edgetok.converters.sources.onnx import load_onnx

        return load_onnx(path, limits)
    if suffix == ".edgetok":
        return load_artifact(path, limits)
    raise _refusal(path, suffix)


def _load_folder(path: Path, limits: LoadLimits) -> Source:
    if (path / MANIFEST).is_file():
        return load_artifact(path, limits)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        from edgetok.converters.sources.hf import load_hf

        return load_hf(path, limits)
    models = sorted(path.glob("*.onnx"))
    if len(models) == 1:
        from edgetok.converters.sources.onnx import load_onnx

        return load_onnx(models[0], limits)
    if models:
        names = ", ".join(m.name for m in models[:5])
        raise InputError(
            f"the folder holds {len(models)} ONNX files: {names}", where=str(path), next="name one of them"
        )
    pickles = sorted(p for p in path.iterdir() if p.suffix.lower() in _PICKLE)
    if pickles:
        raise _refusal(pickles[0], pickles[0].suffix.lower())
    raise InputError("the folder holds no model", where=str(path), next=_READS)


def _refusal(path: Path, suffix: str) -> EdgeTokError:
    if suffix in _PICKLE:
        return ArtifactError(
            f"{suffix} files are Python pickles: loading one runs whatever code is in it, so none is ever loaded",
            where=str(path),
            next="save the weights as safetensors (model.save_pretrained(folder)), or export with torch.onnx.export",
        )
    if suffix == ".gguf":
        return UnsupportedError(
            "GGUF files hold decoders; decoders come later, this version converts encoders",
            where=str(path),
            next=_READS,
        )
    if suffix == ".safetensors":
        return InputError(
            "a safetensors file alone does not say what the model is",
            where=str(path),
            next=f"name its folder, with config.json in it: {path.parent}",
        )
    return InputError(f"a {suffix or 'nameless'} file is not a model edgetok reads", where=str(path), next=_READS)


def load_artifact(path: Path, limits: LoadLimits = DEFAULT) -> Source:
    """Load an artifact as a source, its hashes checked.

    Raises:
        ArtifactError: malformed or over a limit.
        IntegrityError: a file does not match its hash.
    """
    from edgetok.artifact import Artifact
    from edgetok.converters.sources.onnx import COMPANIONS, parse_with_data

    with Artifact.open(path, limits=limits) as artifact:  # the model's tensors keep their maps alive
        names = artifact.names()
        data = {name: artifact.map(name) for name in names if name.endswith(".data")}
        model = parse_with_data(artifact.read("model.onnx"), data, limits, where=f"{path.name}/model.onnx")
        manifest = artifact.manifest
        return Source(
            model=model,
            path=path,
            kind="artifact",
            name=manifest.source.name,
            sha256=artifact.sha256,
            bytes=sum(e.bytes for e in manifest.files if e.name in ("model.onnx", "model.onnx.data")),
            files={name: artifact.read(name) for name in names if name in COMPANIONS},
            producer=f"edgetok {manifest.tools.get('edgetok', '')}".strip(),
        )
