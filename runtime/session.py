"""``edgetok.load``: an artifact or an ONNX file, compiled for a device and ready to run from any thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgetok.devices.base import Executable, Options, Placement, Stats, TensorSpec
from edgetok.errors import ArtifactError, InputError
from edgetok.limits import DEFAULT, LoadLimits, effective
from edgetok.runtime.choosing import Choice, compile_on, named
from edgetok.runtime.opening import ModelFiles, open_model
from edgetok.runtime.packing import PACKED_INPUTS, pack_plan, plan_groups
from edgetok.runtime.text import TextInput, bucket_of, fill, position_limit, role_of

# Groups of like length waste less attention; on MiniLM 1.25 to 1.5 cost least processor time, 2 about 6 % more.
_GROUP_TOKENS = 4096
_GROUP_SPREAD = 1.5
_TRIAL_LENGTH = 128


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    threads: int = 0,
    verify: bool = True,
    limits: LoadLimits = DEFAULT,
    optimize: bool = True,
    profile: bool = False,
    strict: bool = True,
    allow_native_code: bool = False,
    extra: Mapping[str, str] | Sequence[tuple[str, str]] = (),
) -> Session:
    """Load a model.

    Args:
        path: an artifact (folder or ``.edgetok``) or an ``.onnx`` file.
        device: a name that ``edgetok devices`` lists, "cpu", or "auto" for a short trial among the installed ones.
        threads: 0 means one per physical core.
        verify: check hashes of an artifact, and an ONNX file against the rules for such files.
        limits: what the file may ask for.
        optimize: let the device rewrite the graph.
        profile: collect times per node for ``stats``.
        strict: refuse a node that would run on another device than asked for.
        allow_native_code: load libraries packed in the artifact.
        extra: settings of the device.

    Raises:
        InputError: nothing there, no such device, or an unknown setting.
        ArtifactError, IntegrityError: the file breaks a rule, or was changed.
        UnsupportedError, BackendError: the device cannot run it, or is not here.
    """
    files = open_model(Path(path), verify, effective(limits))
    pairs = tuple(extra.items()) if isinstance(extra, Mapping) else tuple(extra)
    options = Options(threads, strict, profile, optimize, allow_native_code, pairs)
    try:
        executable, choice = compile_on(device, files.model, options, lambda e: _trial_feeds(files, e))
    except BaseException:
        files.close()
        raise
    return Session(files, executable, choice, options)


class Session:
    """A compiled model. All methods may be called from several threads at once; use it in a ``with`` block.

    Attributes:
        inputs, outputs: names, dtypes and shapes.
        device: where it runs.
        choice: why there.
        artifact: what it was loaded from; None for a plain ONNX file.
    """

    def __init__(self, files: ModelFiles, executable: Executable, choice: Choice, options: Options) -> None:
        self.inputs: tuple[TensorSpec, ...] = executable.inputs
        self.outputs: tuple[TensorSpec, ...] = executable.outputs
        self.choice, self.device, self.artifact = choice, choice.device, files.artifact
        self._files, self._executable, self._options = files, executable, options
        self._bucket = bucket_of(self.inputs)
        self._lock = threading.Lock()
        self._packed: Executable | None = None
        self._text: TextInput | None = None
        self._closed = False

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Run once. The GIL is released while the device computes.

        Args:
            feeds: input name to array, or to anything with ``__dlpack__`` on the CPU, not copied. Texts shorter than
                the fixed length of a graph are padded and masked, and per-token outputs are cut back.
            outputs: names wanted; all when None.

        Returns:
            Output name to a new array.

        Raises:
            InputError: closed, or an input is missing, unknown, or of a wrong dtype or shape.
        """
        executable = self._live()
        short = self._short(feeds) if self._bucket else None
        if short is None:
            return executable.run(feeds, outputs)
        found = executable.run(self._widen(feeds, short), outputs)
        return {n: a[:, :short] if a.ndim == 3 and a.shape[1] == self._bucket else a for n, a in found.items()}

    def _short(self, feeds: Mapping[str, Any]) -> int | None:
        """Length of the feeds when it is below the graph's, the same for all, and a mask can say so."""
        shapes = [tuple(getattr(feeds.get(s.name), "shape", ())) for s in self.inputs]
        lengths = {int(s[1]) for s in shapes if len(s) == 2}
        if len(lengths) != 1 or any(len(s) != 2 for s in shapes):
            return None
        length = lengths.pop()
        return length if 0 < length < (self._bucket or 0) else None

    def _widen(self, feeds: Mapping[str, Any], length: int) -> dict[str, np.ndarray]:
        wide = {}
        for spec in self.inputs:
            value = feeds[spec.name]
            array = value if isinstance(value, np.ndarray) else np.from_dlpack(value)
            wide[spec.name] = np.pad(array, ((0, 0), (0, (self._bucket or length) - length)))
        return wide | {n: v for n, v in feeds.items() if n not in wide}

    # --- text -----------------------------------------------------------------------------------------------

    def encode(
        self,
        texts: Sequence[str],
        *,
        batch: int = 64,
        packed: bool | None = None,
        output: str | None = None,
    ) -> np.ndarray:
        """One vector per text, [n, D], in the order given.

        Args:
            texts: cut to the length the model's files name.
            batch: texts per padded run; texts of like length share a run. Packed runs choose their own.
            packed: run without work on pads; None means whenever the artifact has a packed graph.
            output: which output to return; ``sentence_embedding``, or the only one with two axes.

        Raises:
            InputError: no tokenizer, no such output, or no packed graph though asked for.
        """
        text, name = self.tokenizer(), self._vector_output(output)
        if batch < 1:
            raise InputError("batch must be 1 or more")
        ids = text.encode(texts)
        if not ids:
            width = next((s.shape[-1] for s in self.outputs if s.name == name and s.shape), 0)
            return np.empty((0, width if isinstance(width, int) else 0), np.float32)
        if packed is True or (packed is None and self.has_packed):
            return self.run_packed(ids, outputs=[name])[name]
        order = np.argsort([-len(i) for i in ids], kind="stable")
        parts = []
        for at in range(0, len(order), batch):
            chosen = [ids[i] for i in order[at : at + batch]]
            parts.append(self._live().run(text.pad_batch(chosen, self.inputs), [name])[name])
        result = np.empty((len(ids), *parts[0].shape[1:]), parts[0].dtype)
        result[order] = np.concatenate(parts)
        return result

    def run_packed(
        self, ids: Sequence[np.ndarray | Sequence[int]], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run a batch of texts of different lengths without work on pads.

        Args:
            ids: token ids of each text, [n] each, special tokens included.
            outputs: names wanted; all when None.

        Returns:
            Output name to array, first axis as ``ids``; per-token outputs [B, S, D] are zero after a text's end.

        Raises:
            InputError: no packed graph, or an empty text.
        """
        packed = self._packed_executable()
        rows = [np.asarray(i, np.int64).reshape(-1) for i in ids]
        lengths = np.array([len(r) for r in rows], np.int64)
        if not len(rows) or lengths.min() < 1:
            raise InputError("run_packed takes at least one text, each of at least one token")
        groups = plan_groups(lengths, max_tokens=_GROUP_TOKENS, spread=_GROUP_SPREAD)
        parts = [packed.run(self._packed_feeds(packed, rows, lengths, g), outputs) for g in groups]
        if len(groups) == 1 and (np.diff(groups[0]) == 1).all():
            return parts[0]
        return {name: _gather([p[name] for p in parts], groups) for name in parts[0]}

    def _packed_feeds(
        self, packed: Executable, rows: Sequence[np.ndarray], lengths: np.ndarray, group: np.ndarray
    ) -> dict[str, np.ndarray]:
        plan = pack_plan(lengths[group])
        flat = np.concatenate([rows[i] for i in group])
        feeds = {"word_idx": plan.word_idx, "unpack_idx": plan.unpack_idx}
        for spec in packed.inputs:
            if spec.name not in PACKED_INPUTS:
                value = flat if fill(spec) == "ids" else np.zeros_like(flat)
                feeds[spec.name] = value.astype(spec.dtype, copy=False)
        return feeds

    @property
    def has_packed(self) -> bool:
        """Whether a packed graph travels with the model."""
        return self._packed is not None or self._files.packed() is not None

    def tokenizer(self) -> TextInput:
        """The model's tokenizer; raises InputError when there is none."""
        with self._lock:
            if self._text is None:
                self._text = TextInput(self._files.read, self.inputs, str(self._files.model))
            return self._text

    def _vector_output(self, name: str | None) -> str:
        known = [s.name for s in self.outputs]
        if name is not None:
            if name not in known:
                raise InputError(f"unknown output {name!r}", next=f"the model's outputs are: {', '.join(known)}")
            return name
        if "sentence_embedding" in known:
            return "sentence_embedding"
        vectors = [s.name for s in self.outputs if s.shape is not None and len(s.shape) == 2]
        if len(vectors) != 1 or not any(role_of(s.name) == "ids" for s in self.inputs):
            raise InputError("the model has no sentence embedding", next=f"name an output: {', '.join(known)}")
        return vectors[0]

    def _packed_executable(self) -> Executable:
        self._live()
        with self._lock:
            if self._packed is None:
                path = self._files.packed()
                if path is None:
                    raise InputError(
                        "there is no packed graph beside this model",
                        next="convert the text encoder without --reduce, or call run with padded inputs",
                    )
                self._packed = named(self.device).compile(path, self._options)
            return self._packed

    # --- the rest -------------------------------------------------------------------------------------------

    def placement(self) -> Placement:
        """Which library runs how many nodes."""
        return self._live().placement()

    def stats(self) -> Stats:
        """Seconds to compile; times per node when loaded with ``profile``."""
        return self._live().stats()

    def close(self) -> None:
        """Free the model; a second call does nothing."""
        with self._lock:
            self._closed = True
            for executable in (self._executable, self._packed):
                if executable is not None:
                    executable.close()
            self._packed = None
            self._files.close()

    def _live(self) -> Executable:
        if self._closed:
            raise InputError("this session is closed", next="load the model again")
        return self._executable

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({str(self._files.model)!r}, device={self.device!r})"


def _gather(parts: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> np.ndarray:
    """Put the rows of grouped runs back in order; per-token outputs are widened with zeros."""
    rest = tuple(np.max([p.shape[1:] for p in parts], axis=0).tolist())
    result = np.zeros((sum(map(len, groups)), *rest), parts[0].dtype)
    for part, group in zip(parts, groups, strict=True):
        if part.ndim > 2:
            result[group, : part.shape[1]] = part
        else:
            result[group] = part
    return result


def _trial_feeds(files: ModelFiles, executable: Executable) -> Mapping[str, np.ndarray] | None:
    """Inputs for a trial: the recorded ones, else made up; None when an axis stays open."""
    from edgetok.feeds import random_feeds

    try:
        golden = files.golden()
        if golden is not None:
            return golden
        length = min(_TRIAL_LENGTH, position_limit(files.read) or _TRIAL_LENGTH)
        texts = [s for s in executable.inputs if s.shape is not None and len(s.shape) == 2 and role_of(s.name)]
        shapes = {s.name: (1, length) for s in texts if s.shape and not isinstance(s.shape[1], int)}
        feeds = random_feeds(executable.inputs, batch=1, shapes=shapes)
        # Any vocabulary has an entry 1, and a random id may lie outside it.
        return feeds | {s.name: np.ones_like(feeds[s.name]) for s in texts if role_of(s.name) == "ids"}
    except (InputError, ArtifactError):
        return None
