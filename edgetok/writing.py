"""From a judged conversion to the artifact on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgetok.artifact import Accuracy, ArtifactContent, GoldenCase, LayerTokens, SourceInfo, write_artifact
from edgetok.errors import InputError
from edgetok.judging import Verdict, interval
from edgetok.machine import conditions

if TYPE_CHECKING:
    from edgetok.conversion import Conversion

LICENCE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


def write(conversion: Conversion, verdict: Verdict) -> None:
    """Write the artifact named by the options and fill in the rest of the report."""
    c, o = conversion, conversion.options
    if o.output is None:
        raise InputError("no output to write to", next="add -o FOLDER")
    files = carried_files(c)
    extra: dict[str, ir.Model] = {}
    if c.packed is not None:
        extra["model.packed.onnx"] = c.packed
    content = ArtifactContent(
        model=c.exported,
        source=SourceInfo(
            name=c.source.name,
            kind=c.source.kind,
            sha256=c.source.sha256,
            bytes=c.source.bytes,
            producer=c.source.producer,
            licence=_first_line(files.get("LICENSE")),
        ),
        recipe=c.recipe().to_dict(),
        golden=[GoldenCase(feeds, outputs) for feeds, outputs in verdict.golden],
        tokens=_tokens(c),
        preprocess=c.preprocess.to_dict() if c.preprocess else None,
        agreement=_agreement(verdict),
        accuracy=_accuracy(c, verdict),
        measured=_measured(c, verdict),
        files=files,
        extra_models=extra,
    )
    with write_artifact(o.output, content, force=o.force) as artifact:
        sizes = sum(entry.bytes for entry in artifact.manifest.files)
        c.report.artifact = str(o.output)
        c.report.sha256 = artifact.sha256
        c.report.bytes = sizes
        c.report.recipe = c.recipe().to_dict()
    c.say("wrote", f"{o.output} {sizes / 1e6:.1f} MB  sha256:{artifact.sha256[:12]}")
    c.say("next", f"edgetok bench {o.output}")


def carried_files(c: Conversion) -> dict[str, bytes | memoryview]:
    """Tokenizer, configs and licence of the source, the licence given with ``--licence`` first."""
    files: dict[str, bytes | memoryview] = dict(c.source.files)
    if c.options.licence is not None:
        files["LICENSE"] = c.options.licence.read_bytes()
    elif "LICENSE" not in files:
        beside = c.options.source if c.options.source.is_dir() else c.options.source.parent
        for name in LICENCE_NAMES:
            if (beside / name).is_file() and (beside / name).stat().st_size < 1 << 20:
                files["LICENSE"] = (beside / name).read_bytes()
                break
    files.update(c.target_files())
    return files


def _first_line(text: bytes | memoryview | None) -> str:
    if text is None:
        return ""
    lines = [s.strip() for s in bytes(text).decode("utf-8", "replace").splitlines()]
    return next((s for s in lines if s), "")[:80]


def _agreement(verdict: Verdict) -> dict[str, float]:
    """The smallest cosine of any sample and output, which ``verify`` holds replays against, and the means by output."""
    if not verdict.found:
        return {}
    means = {a.name: round(a.cosine, 6) for a in verdict.found}
    return {**means, "cosine": round(min(a.worst for a in verdict.found), 6)}


def _tokens(c: Conversion) -> list[LayerTokens]:
    if c.reduced is None:
        return []
    before = c.reduced.tokens_in
    layers = []
    for i, after in enumerate(c.reduced.tokens):
        layers.append(LayerTokens(layer=i, before=before, after=after))
        before = after
    return layers


def _accuracy(c: Conversion, verdict: Verdict) -> list[Accuracy]:
    if verdict.accuracy is None:
        return []
    theirs, ours, _, low, high = verdict.accuracy
    o = c.options
    return [
        Accuracy(
            metric=theirs.metric,
            source=theirs.value,
            artifact=ours.value,
            drop=theirs.value - ours.value,
            unit="points",
            limit=c.report.check.get("limit"),
            passed=True,
            n=theirs.n,
            ci95=(low, high) if interval(low, high) else None,
            conditions={"device": c.report.speed["device"], "data": evaluated_on(o.eval)},
        )
    ]


def evaluated_on(given: Path | str | Callable[..., Any] | None) -> str:
    """A name for what ``--eval`` named."""
    if given is None:
        return ""
    return given.name if isinstance(given, Path) else str(getattr(given, "__name__", given))


def _measured(c: Conversion, verdict: Verdict) -> dict[str, Any]:
    from edgetok.devices._host import thread_count

    return {
        "conditions": conditions(thread_count(c.options.threads)),
        "speed": c.report.speed,
        "stages_ms": {n: {"p50": t.p50_ms, "p90": t.p90_ms, "n": len(t.samples_ms)} for n, t in verdict.times.items()},
        "peak_rss_bytes": verdict.rss_bytes,
    }
