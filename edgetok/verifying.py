"""Is this artifact what it says: structure and hashes, the golden answers replayed here, made again from its recipe."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetok.artifact import Artifact, GoldenCase, verify_artifact
from edgetok.errors import (
    ArtifactError,
    EdgeTokError,
    GateError,
    IntegrityError,
    ReproducibilityError,
)
from edgetok.gates import COSINE_PLAIN, COSINE_REDUCED, agreement, aligned
from edgetok.manifest import Manifest
from edgetok.progress import BarsOnly, NullProgress, Progress

# Another CPU rounds and orders sums differently, and int8 kernels without VNNI saturate: how far a replayed cosine may
# lie below the one recorded at conversion.
SLACK = 0.005


@dataclass(frozen=True)
class VerifyOptions:
    """What to check.

    Args:
        path: the artifact.
        device, threads: where the golden inputs are replayed.
        source: the source model, to hold its hash and its answers against the recorded ones.
        reproduce: the source model, to convert it again with the artifact's recipe.
        calib: calibration data for ``reproduce``, where the recipe used some.
        eval: evaluator file for ``reproduce``, where the artifact records its figures.
        replay: whether to replay golden inputs.
    """

    path: Path
    device: str = "auto"
    threads: int = 0
    source: Path | None = None
    reproduce: Path | None = None
    calib: Path | None = None
    eval: Path | None = None
    replay: bool = True


@dataclass
class VerifyReport:
    """Lines of (check, outcome, passed), and the first error of each kind in the order they were met."""

    path: str
    sha256: str = ""
    lines: list[tuple[str, str, bool]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    errors: list[EdgeTokError] = field(default_factory=list)

    def note(self, check: str, text: str, passed: bool = True, error: EdgeTokError | None = None) -> None:
        self.lines.append((check, text, passed))
        if error is not None:
            self.errors.append(error)

    def to_json(self) -> dict[str, Any]:
        return {
            "artifact": self.path,
            "sha256": self.sha256,
            "checks": [{"name": n, "text": t, "pass": p} for n, t, p in self.lines],
            "replay": self.outputs,
            "pass": not self.errors,
        }

    def raise_first(self) -> None:
        """Raise the error that explains most: a wrong hash, then structure, then answers, then bytes made again."""
        order = (IntegrityError, ArtifactError, EdgeTokError)
        for error in sorted(self.errors, key=lambda e: next(i for i, kind in enumerate(order) if isinstance(e, kind))):
            error.report = self.to_json()
            raise error


def verify(options: VerifyOptions, progress: Progress | None = None) -> VerifyReport:
    """Run the checks asked for; nothing is run of an artifact whose structure or hashes are wrong.

    Raises:
        InputError: nothing there.
        BackendError: the device cannot run it.
    """
    progress = progress or NullProgress()
    structure = verify_artifact(options.path)
    report = VerifyReport(str(options.path), structure.sha256)
    if not structure.ok:
        for problem in structure.problems:
            name = "hashes" if isinstance(problem, IntegrityError) else "structure"
            report.note(name, problem.message, False, problem)
        return report
    report.note("structure", f"{structure.files} files, {structure.bytes / 1e6:.1f} MB, hashes match")
    with Artifact.open(options.path) as artifact:
        manifest, cases = artifact.manifest, artifact.golden()
        if options.replay:
            _replay(options, manifest, cases, report, progress)
        if options.source is not None:
            _check_source(options, manifest, cases, report, progress)
        if options.reproduce is not None:
            _reproduce(options, artifact, report, progress)
    return report


def replay_limit(manifest: Manifest) -> float:
    """Smallest cosine a replayed output may have to the recorded one."""
    recorded = manifest.agreement.get("cosine")
    if recorded is not None:
        return recorded - SLACK
    return COSINE_REDUCED if manifest.tokens else COSINE_PLAIN


def _replay(
    options: VerifyOptions, manifest: Manifest, cases: list[GoldenCase], report: VerifyReport, progress: Progress
) -> None:
    from edgetok.runtime.session import load

    if not cases:
        report.note("replay", "the artifact carries no golden inputs")
        return
    limit = replay_limit(manifest)
    progress.start("replay", len(cases))
    found = []
    with load(options.path, device=options.device, threads=options.threads) as session:
        device = str(getattr(session, "device", options.device)).replace("_", "-")
        for case in cases:
            found.append(session.run(case.inputs))
            progress.advance()
    progress.done()
    for one in agreement([aligned(c.outputs, o) for c, o in zip(cases, found, strict=True)], found):
        ok = one.worst >= limit
        text = f"{one.name}: cosine {one.worst:.5f} to the source, {len(cases)} inputs on {device} (limit {limit:.4f})"
        error = GateError(
            f"output {one.name!r} has cosine {one.worst:.5f} to the recorded answer, the limit is {limit:.4f}",
            where=str(options.path),
            next="edgetok verify --device reference, to see whether it is the device or the artifact",
        )
        report.note("replay", text, ok, None if ok else error)
        report.outputs.append(
            {
                "name": one.name,
                "cosine": one.worst,
                "max_abs": one.max_abs,
                "limit": limit,
                "pass": ok,
                "device": device,
            }
        )


def _check_source(
    options: VerifyOptions, manifest: Manifest, cases: list[GoldenCase], report: VerifyReport, progress: Progress
) -> None:
    from edgetok.converters.sources.loader import load_source
    from edgetok.runtime.session import load

    if options.source is None:
        return
    source = load_source(options.source)
    if source.sha256 != manifest.source.sha256:
        report.note(
            "source",
            f"sha256 {source.sha256[:12]}..., the artifact was made from {manifest.source.sha256[:12]}...",
            False,
            IntegrityError(
                "this is not the source the artifact was made from",
                where=str(options.source),
                next="find the source with the sha256 that edgetok inspect ARTIFACT shows",
            ),
        )
        return
    report.note("source", f"sha256 {source.sha256[:12]}... is the one recorded")
    if not cases:
        return
    progress.start("source", len(cases))
    answers = []
    with load(options.source, device=options.device, threads=options.threads) as session:
        for case in cases:
            answers.append(session.run(case.inputs, list(case.outputs)))
            progress.advance()
    progress.done()
    for one in agreement([c.outputs for c in cases], answers):
        ok = one.worst >= COSINE_PLAIN
        error = GateError(
            f"the source's output {one.name!r} is not the recorded one (cosine {one.worst:.5f})",
            where=str(options.source),
        )
        report.note("source", f"{one.name}: cosine {one.worst:.6f} to the recorded answer", ok, None if ok else error)


def _reproduce(options: VerifyOptions, artifact: Artifact, report: VerifyReport, progress: Progress) -> None:
    from edgetok.gates import Limits
    from edgetok.pipeline import ConvertOptions, run_convert

    if options.reproduce is None:
        return
    folder = Path(tempfile.mkdtemp(prefix="edgetok-"))
    try:
        recipe = folder / "recipe.yaml"
        recipe.write_bytes(artifact.read("recipe.yaml"))
        again = ConvertOptions(
            source=options.reproduce,
            output=folder / "again",
            recipe=recipe,
            calib=options.calib,
            eval=options.eval,
            # The gates were passed when it was made; a busy machine now must not hide what the bytes are.
            limits=Limits(drop=float("inf"), cosine=-1.0, speedup=0.0),
            device=options.device,
            threads=options.threads,
        )
        run_convert(again, BarsOnly(progress))
        with Artifact.open(folder / "again") as made:
            _hold_against(artifact, made, report)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hold_against(artifact: Artifact, made: Artifact, report: VerifyReport) -> None:
    if made.sha256 == artifact.sha256:
        report.note("reproduce", f"made again from its recipe: the same bytes, sha256 {made.sha256[:12]}...")
        return
    mine, other = _hashes(artifact.manifest), _hashes(made.manifest)
    differ = sorted(n for n in {*mine, *other} if mine.get(n) != other.get(n))
    tools = sorted(
        f"{k} {artifact.manifest.tools.get(k)} then, {v} now"
        for k, v in made.manifest.tools.items()
        if artifact.manifest.tools.get(k) != v
    )
    what = f"files that differ: {', '.join(differ)}" if differ else "the files are equal, the manifest differs"
    error = ReproducibilityError(
        f"the recipe gave other bytes: {what}",
        where=str(artifact.path),
        next="; ".join(["use the same versions", *tools]) if tools else "give the same --calib and --eval as then",
    )
    report.note("reproduce", what, False, error)


def _hashes(manifest: Manifest) -> Mapping[str, str]:
    return {entry.name: entry.sha256 for entry in manifest.files}
