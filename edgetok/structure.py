"""What can be said about an artifact without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from edgetok.errors import ArtifactError, EdgeTokError, InputError, IntegrityError
from edgetok.limits import DEFAULT, LoadLimits
from edgetok.reading import GOLDEN_NAME, RECIPE_NAME, Artifact


@dataclass
class StructureReport:
    """What :func:`verify_artifact` found: every problem, not only the first."""

    path: str
    sha256: str = ""
    files: int = 0
    bytes: int = 0
    problems: list[EdgeTokError] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_first(self) -> None:
        """Raise the first problem; a wrong hash goes before anything else, because it explains the rest."""
        for problem in sorted(self.problems, key=lambda p: not isinstance(p, IntegrityError)):
            raise problem


def verify_artifact(path: Path | str, limits: LoadLimits = DEFAULT) -> StructureReport:
    """Check everything that needs no run: listing, hashes, ONNX rules, interface, golden arrays, recipe.

    Raises:
        InputError: nothing there.
    """
    report = StructureReport(str(path))
    try:
        artifact = Artifact.open(path, verify=True, limits=limits)
    except InputError:
        raise
    except EdgeTokError as exc:
        report.problems.append(exc)
        return report
    with artifact:
        report.sha256 = artifact.sha256
        report.files, report.bytes = len(artifact.manifest.files), sum(e.bytes for e in artifact.manifest.files)
        graphs = [name for name in artifact.names() if name.endswith(".onnx")]
        steps: list[Callable[[], object]] = [partial(artifact.check_model, name, schemas=True) for name in graphs]
        steps += [partial(_check_golden, artifact), partial(_check_recipe, artifact), artifact.measured]
        for step in steps:
            try:
                step()
            except EdgeTokError as exc:
                report.problems.append(exc)
    return report


KEPT_SUFFIX = ".kept"  # an output of this ending names the source row of each row of the output it is named after


def _check_golden(artifact: Artifact) -> None:
    inputs = {t.name: t for t in artifact.manifest.inputs}
    outputs = {t.name: t for t in artifact.manifest.outputs}
    for index, case in enumerate(artifact.golden()):
        if set(case.inputs) != set(inputs) or not set(case.outputs) <= set(outputs):
            raise ArtifactError(f"case {index} does not fit the inputs and outputs of the model", where=GOLDEN_NAME)
        for arrays, infos in ((case.inputs, inputs), (case.outputs, outputs)):
            for name, array in arrays.items():
                info = infos[name]
                # Cut short by --outputs reduced: the source's own run has all rows, <name>.kept says which are left.
                short = name + KEPT_SUFFIX in outputs
                fits = len(array.shape) == len(info.shape) and all(
                    not isinstance(want, int) or want == have or (short and axis == 1 and want < have)
                    for axis, (want, have) in enumerate(zip(info.shape, array.shape, strict=True))
                )
                if str(array.dtype) != info.dtype or not fits:
                    raise ArtifactError(
                        f"case {index}: {name!r} is {array.dtype}{list(array.shape)}, "
                        f"the model has {info.dtype}{info.shape}",
                        where=GOLDEN_NAME,
                    )


def _check_recipe(artifact: Artifact) -> None:
    if artifact.recipe() != artifact.manifest.recipe:
        raise ArtifactError("the recipe in the manifest is another one", where=RECIPE_NAME)
