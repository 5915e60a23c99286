"""Evaluators: metrics against plain definitions, data formats, refusals by name, paired comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgetok.errors import ArtifactError, InputError
from edgetok.evaluators import EVALUATORS
from edgetok.evaluators._metrics import auc, ranks, spearman
from edgetok.evaluators.base import EvalResult, Evaluator, load_evaluator, mcnemar, paired_difference, result
from edgetok.preprocess import InputSpec, Preprocess

IMAGE = [InputSpec("image", "float32", ("batch", 3, 4, 4))]
VECTOR = [InputSpec("x", "float32", ("batch", 3))]
TEXT = [InputSpec(n, "int64", ("batch", "sequence")) for n in ("input_ids", "attention_mask", "token_type_ids")]
PLAIN = Preprocess(4, 4)
TOKENIZER = (Path(__file__).parent / "fixtures" / "hf" / "minilm" / "tokenizer.json").read_bytes()


def write(path: Path, values: dict[str, object]) -> Path:
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def identity(feeds):  # type: ignore[no-untyped-def]
    return dict(feeds)


# --- metrics ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auc_counts_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    scores = np.array([r[0] for r in rows], float)
    labels = np.array([r[1] for r in rows], int)
    if 0 < labels.sum() < len(labels):
        pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
        assert auc(scores, labels) == pytest.approx(np.mean(pairs))
    else:
        assert np.isnan(auc(scores, labels))


def test_ranks_share_ties() -> None:
    assert ranks(np.array([10, 20, 10, 5])).tolist() == [2.5, 4, 2.5, 1]


def test_spearman_golden() -> None:
    assert spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 30, 40])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3, 4]), np.array([4, 3, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1, 2, 3, 4, 5]), np.array([5, 6, 7, 8, 7])) == pytest.approx(0.8207826816681233)
    assert np.isnan(spearman(np.array([1, 1]), np.array([1, 2])))


# --- paired comparison --------------------------------------------------------------------------------------------


def test_paired_difference_of_equal_results_is_zero() -> None:
    a = result("accuracy", np.array([1, 0, 1, 1]))
    assert paired_difference(a, a) == (0, 0, 0)


def test_paired_difference_is_b_minus_a_and_its_interval_covers_it() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(2000) < 0.8
    other = right.copy()
    other[:40] = False  # 2 points lost on the same samples
    a, b = result("accuracy", right), result("accuracy", other)
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx(100 * (other.mean() - right.mean()))
    assert low < difference < high < 0
    assert high - low < 2  # pairing removes the spread between samples, 1.8 points either way unpaired


def test_paired_difference_resamples_auc() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 2
    good = labels + rng.normal(0, 0.7, 300)
    worse = good + rng.normal(0, 1.0, 300)
    difference, low, high = paired_difference(result("auc", good, labels), result("auc", worse, labels))
    assert low < difference < high < 0


def test_paired_difference_needs_the_same_samples() -> None:
    with pytest.raises(InputError):
        paired_difference(result("accuracy", np.ones(3)), result("accuracy", np.ones(4)))
    found = paired_difference(EvalResult("m", 80.0, 0), EvalResult("m", 79.0, 0))
    assert found[0] == -1
    assert np.isnan(found[1:]).all()


def test_mcnemar_golden() -> None:
    a = result("accuracy", np.array([1] * 10 + [0] * 2 + [1] * 5))
    b = result("accuracy", np.array([0] * 10 + [1] * 2 + [1] * 5))
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 12 + 66) / 4096)  # binomial(12, 1/2), at most 2
    assert mcnemar(a, a) == 1


# --- kinds --------------------------------------------------------------------------------------------------------


def probe_head(path: Path, width: int) -> None:
    rng = np.random.default_rng(0)
    np.savez(path, weight=rng.standard_normal((3, width)).astype(np.float32), bias=np.zeros(3, np.float32))


def test_probe_pools_cls_beside_the_mean_of_patches(tmp_path: Path) -> None:
    probe_head(tmp_path / "head.npz", 8)
    hidden = np.random.default_rng(1).standard_normal((6, 5, 4)).astype(np.float32)
    with np.load(tmp_path / "head.npz") as head:
        features = np.concatenate([hidden[:, 0], hidden[:, 1:].mean(1)], axis=1)
        labels = np.argmax(features @ head["weight"].T, axis=1)
    np.savez(tmp_path / "data.npz", x=np.zeros((6, 3), np.float32), labels=labels)
    path = write(
        tmp_path / "probe.json",
        {"kind": "probe", "data": "data.npz", "head": "head.npz", "features": "f", "limit": 0.4},
    )
    evaluator = load_evaluator(path, inputs=VECTOR)
    assert isinstance(evaluator, Evaluator)
    assert (evaluator.limit, evaluator.tensors) == (0.4, ("f",))
    rows = iter(hidden)
    found = evaluator.score(lambda feeds: {"f": next(rows)[None]})
    assert (found.metric, found.value, found.n) == ("accuracy", 100.0, 6)
    assert found.predictions is not None
    assert found.predictions.tolist() == labels.tolist()
    rows = iter(np.concatenate([hidden[:3], -hidden[3:]]))
    assert evaluator.score(lambda feeds: {"f": next(rows)[None]}).value < 100


def test_probe_weighs_merged_tokens_by_their_size(tmp_path: Path) -> None:
    probe_head(tmp_path / "head.npz", 2)
    np.savez(tmp_path / "data.npz", x=np.zeros((1, 3), np.float32), labels=[0])
    path = write(
        tmp_path / "p.json", {"kind": "probe", "data": "data.npz", "head": "head.npz", "features": "f", "pool": "mean"}
    )
    evaluator = load_evaluator(path, inputs=VECTOR)
    hidden = np.random.default_rng(0).standard_normal((1, 3, 2)).astype(np.float32)  # CLS, a token of 3, a token of 1
    whole = np.concatenate([hidden[:, :1], np.repeat(hidden[:, 1:2], 3, axis=1), hidden[:, 2:]], axis=1)
    sizes = np.array([1, 3, 1], np.float32).reshape(1, 3, 1)
    merged = evaluator.readout({"f": hidden, "f.size": sizes})  # type: ignore[attr-defined]
    np.testing.assert_allclose(merged, evaluator.readout({"f": whole}), rtol=1e-12)  # type: ignore[attr-defined]


def test_probe_names_the_flag_when_the_features_are_no_output(tmp_path: Path) -> None:
    probe_head(tmp_path / "head.npz", 2)
    np.savez(tmp_path / "data.npz", x=np.zeros((1, 3), np.float32), labels=[0])
    path = write(tmp_path / "p.json", {"kind": "probe", "data": "data.npz", "head": "head.npz", "features": "/a/b"})
    with pytest.raises(InputError) as caught:
        load_evaluator(path, inputs=VECTOR).score(identity)
    assert "--outputs /a/b" in (caught.value.next or "")


def test_classify_reads_logits(tmp_path: Path) -> None:
    x = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]]
    np.savez(tmp_path / "d.npz", x=x, truth=[0, 1, 2, 2])
    path = write(tmp_path / "c.json", {"kind": "classify", "data": "d.npz", "labels": "truth"})
    found = load_evaluator(path, inputs=VECTOR).score(lambda f: {"other": f["x"][:, :2], "logits": f["x"]})
    assert found.value == 75
    steps: list[tuple[int, int]] = []
    load_evaluator(path, inputs=VECTOR).score(lambda f: {"logits": f["x"]}, lambda d, t: steps.append((d, t)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_samples_takes_the_first(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.eye(3, dtype=np.float32), labels=[0, 1, 0])
    path = write(tmp_path / "c.json", {"kind": "classify", "data": "d.npz", "samples": 2})
    assert load_evaluator(path, inputs=VECTOR).score(lambda f: {"logits": f["x"]}).n == 2


def test_dense_takes_the_first_model_as_truth(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    path = write(tmp_path / "e.json", {"kind": "dense", "data": "d.npz"})
    evaluator = load_evaluator(path, inputs=VECTOR)
    source = evaluator.score(lambda f: {"map": f["x"].reshape(1, 1, 3)})
    assert source.value == pytest.approx(100)
    assert evaluator.score(lambda f: {"map": 2 * f["x"].reshape(1, 1, 3)}).value == pytest.approx(100)
    turned = evaluator.score(lambda f: {"map": -f["x"].reshape(1, 1, 3)})
    assert turned.value == pytest.approx(-100)
    assert paired_difference(source, turned)[0] == pytest.approx(-200)
    with pytest.raises(InputError, match="truth"):
        evaluator.score(lambda f: {"map": np.ones((1, 4), np.float32)})


def test_dense_with_maps_from_a_file(tmp_path: Path) -> None:
    x = np.eye(3, dtype=np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    np.savez(tmp_path / "t.npz", map=x.reshape(3, 1, 3))
    path = write(tmp_path / "e.json", {"kind": "dense", "data": "d.npz", "labels": "t.npz", "output": "map"})
    assert load_evaluator(path, inputs=VECTOR).score(lambda f: {"map": f["x"]}).value == pytest.approx(100)


def bag(feeds):  # type: ignore[no-untyped-def]
    """A toy sentence encoder: counts of token ids."""
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    return {
        "sentence_embedding": np.stack([np.bincount(i[m > 0], minlength=80) for i, m in zip(ids, mask)]).astype(float)
    }


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl"])
@pytest.mark.parametrize("metric", ["auc", "spearman"])
def test_pairs_rank_similar_texts_first(tmp_path: Path, suffix: str, metric: str) -> None:
    rows = [("a b c", "a b c", 1), ("a b", "a b d", 1), ("a b", "x y", 0), ("c d", "x z", 0)]
    if suffix == ".tsv":
        text = "sentence1\tsentence2\tlabel\n" + "".join(f"{a}\t{b}\t{c}\n" for a, b, c in rows)
    else:
        text = "".join(json.dumps({"text_a": a, "text_b": b, "label": c}) + "\n" for a, b, c in rows)
    (tmp_path / f"d{suffix}").write_text(text)
    path = write(tmp_path / "e.json", {"kind": "pairs", "data": f"d{suffix}", "metric": metric})
    found = load_evaluator(path, inputs=TEXT, tokenizer=TOKENIZER).score(bag)
    assert (found.metric, found.n) == (metric, 4)
    assert found.value == 100 if metric == "auc" else found.value > 80


def test_pairs_pool_hidden_states_over_the_mask(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("text_a\ttext_b\tlabel\na\ta\t1\na\tb\t0\n")
    fixed = [InputSpec(i.name, i.dtype, ("batch", 6)) for i in TEXT]
    path = write(tmp_path / "e.json", {"kind": "pairs", "data": "d.tsv", "features": "h"})

    def hidden(feeds):  # type: ignore[no-untyped-def]
        rows = np.eye(80)[feeds["input_ids"]]
        rows[feeds["attention_mask"] == 0] = 99  # what a model leaves on pads must not matter
        return {"h": rows}

    assert load_evaluator(path, inputs=fixed, tokenizer=TOKENIZER).score(hidden).value == 100


def test_pairs_refuse_auc_of_one_kind(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("text_a\ttext_b\tlabel\na\ta\t1\na\tb\t1\n")
    path = write(tmp_path / "e.json", {"kind": "pairs", "data": "d.tsv"})
    with pytest.raises(InputError, match="both kinds"):
        load_evaluator(path, inputs=TEXT, tokenizer=TOKENIZER)


def test_texts_classify_with_pairs_joined(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"premise": "a", "hypothesis": "b", "label": 1}\n')
    path = write(tmp_path / "e.json", {"kind": "classify", "data": "d.jsonl"})
    seen = []

    def run(feeds):  # type: ignore[no-untyped-def]
        seen.append(feeds)
        return {"logits": np.array([[0.0, 1.0]])}

    assert load_evaluator(path, inputs=TEXT, tokenizer=TOKENIZER).score(run).value == 100
    assert seen[0]["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]  # [CLS] a [SEP] b [SEP]


def test_python_function_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "my_metric_module.py").write_text(
        "def score(run, scale=1.0):\n    return scale * float(run({'x': 1})['x']), [1.0, 0.0]\n"
    )
    path = write(tmp_path / "e.json", {"kind": "python:my_metric_module:score", "settings": {"scale": 50}, "limit": 2})
    evaluator = load_evaluator(path, inputs=VECTOR)
    found = evaluator.score(identity)
    assert (found.metric, found.value, found.n, evaluator.limit) == ("score", 50.0, 2, 2.0)
    assert load_evaluator(lambda run: 12.5, inputs=VECTOR).score(identity).value == 12.5
    assert load_evaluator("python:math:prod", inputs=VECTOR).metric == "prod"
    for bad in ("python:math", "python:no_such_module_here:f", "python:math:nothing", "python:math:pi"):
        with pytest.raises(InputError):
            load_evaluator(bad, inputs=VECTOR)
    with pytest.raises(InputError, match="expected points"):
        load_evaluator(lambda run: "good", inputs=VECTOR).score(identity)


# --- image data ---------------------------------------------------------------------------------------------------


def colours(count: int) -> np.ndarray:
    return (np.arange(count)[:, None, None, None] * 20 + np.zeros((1, 4, 4, 3))).astype(np.uint8)


def brightness(feeds):  # type: ignore[no-untyped-def]
    level = round(float(feeds["image"].mean() * 255 / 20))
    return {"logits": np.eye(12)[[level]]}


def test_sheet_of_images_with_labels(tmp_path: Path) -> None:
    Image.fromarray(colours(6).reshape(6, 16, 3)).save(tmp_path / "sheet.png")
    write(tmp_path / "labels.json", [0, 1, 2, 3, 4, 9])  # type: ignore[arg-type]
    values = {"kind": "classify", "data": "sheet.png", "labels": "labels.json"}
    evaluator = load_evaluator(write(tmp_path / "e.json", values), inputs=IMAGE, preprocess=PLAIN)
    assert evaluator.score(brightness).value == pytest.approx(100 * 5 / 6)


@pytest.mark.parametrize("form", ["csv", "json", "folders"])
def test_image_folder_with_labels(tmp_path: Path, form: str) -> None:
    images = tmp_path / "images"
    for i, pixels in enumerate(colours(4)):
        folder = images / f"class{i}" if form == "folders" else images
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    values: dict[str, object] = {"kind": "classify", "data": "images"}
    if form == "csv":
        (tmp_path / "l.csv").write_text("file,label\n0.png,0\n1.png,1\n3.png,7\n")
        values["labels"] = "l.csv"
    elif form == "json":
        write(tmp_path / "l.json", {"0.png": 0, "1.png": 1, "3.png": 7})
        values["labels"] = "l.json"
    evaluator = load_evaluator(write(tmp_path / "e.json", values), inputs=IMAGE, preprocess=PLAIN)
    found = evaluator.score(brightness)
    assert found.n == (4 if form == "folders" else 3)
    assert found.value == pytest.approx(100 if form == "folders" else 100 * 2 / 3)


def test_images_are_made_one_at_a_time(tmp_path: Path) -> None:
    Image.fromarray(colours(12).reshape(12, 16, 3)).save(tmp_path / "sheet.png")
    evaluator = load_evaluator({"kind": "dense", "data": str(tmp_path / "sheet.png")}, inputs=IMAGE, preprocess=PLAIN)
    assert evaluator.cases.feed(3)["image"].shape == (1, 3, 4, 4)  # type: ignore[attr-defined]


def test_images_without_preprocess_name_the_flag(tmp_path: Path) -> None:
    Image.fromarray(colours(2).reshape(2, 16, 3)).save(tmp_path / "s.png")
    values = {"kind": "dense", "data": "s.png"}
    with pytest.raises(InputError) as caught:
        load_evaluator(write(tmp_path / "e.json", values), inputs=IMAGE)
    assert "--preprocess" in (caught.value.next or "")
    values["preprocess"] = {"height": 4, "width": 4}  # type: ignore[assignment]
    assert load_evaluator(write(tmp_path / "e.json", values), inputs=IMAGE)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"data": "d.npz"}, "kind"),
        ({"kind": "magic", "data": "d.npz"}, "magic"),
        ({"kind": "classify"}, "data"),
        ({"kind": "classify", "data": "missing.npz"}, "no such file"),
        ({"kind": "classify", "data": "d.npz", "limits": 3}, "limits"),
        ({"kind": "classify", "data": "d.npz", "limit": -1}, "limit"),
        ({"kind": "classify", "data": "d.npz", "limit": "much"}, "limit"),
        ({"kind": "classify", "data": "d.npz", "samples": 0}, "samples"),
        ({"kind": "classify", "data": "d.npz", "metric": "f1"}, "accuracy"),
        ({"kind": "classify", "data": "nolabels.npz"}, "labels"),
        ({"kind": "classify", "data": "short.npz"}, "labels"),
        ({"kind": "classify", "data": "other.npz"}, "no array for input"),
        ({"kind": "probe", "data": "d.npz", "features": "f"}, "head"),
        ({"kind": "probe", "data": "d.npz", "features": "f", "head": "d.npz"}, "head"),
        ({"kind": "pairs", "data": "d.npz"}, "tsv"),
        ({"kind": "pairs", "data": "d.tsv"}, "tokenizer"),
    ],
)
def test_bad_eval_files_are_usage_errors_by_name(tmp_path: Path, values: dict[str, object], match: str) -> None:
    x = np.eye(3, dtype=np.float32)
    np.savez(tmp_path / "d.npz", x=x, labels=[0, 1, 2])
    np.savez(tmp_path / "nolabels.npz", x=x)
    np.savez(tmp_path / "short.npz", x=x, labels=[0])
    np.savez(tmp_path / "other.npz", y=x)
    (tmp_path / "d.tsv").write_text("text_a\ttext_b\tlabel\na\ta\t1\na\tb\t0\n")
    with pytest.raises(InputError, match=match):
        load_evaluator(write(tmp_path / "e.json", values), inputs=VECTOR)


def test_pickled_arrays_are_never_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ArtifactError):
        load_evaluator(write(tmp_path / "e.json", {"kind": "classify", "data": "d.npz"}), inputs=VECTOR)


@pytest.mark.parametrize("text", ["- a list", "a: [", "\x00", "kind: !!python/object:os.system {}"])
def test_broken_eval_files_are_usage_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(InputError):
        load_evaluator(tmp_path / "e.yaml", inputs=VECTOR)


def test_malformed_rows_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text_a": "a", "text_b": "b", "label": 1}\n{oops\n')
    with pytest.raises(ArtifactError, match="line 2"):
        load_evaluator({"kind": "pairs", "data": str(tmp_path / "d.jsonl")}, inputs=TEXT, tokenizer=TOKENIZER)


def test_every_kind_is_listed() -> None:
    assert EVALUATORS.names() == ("classify", "dense", "pairs", "probe", "python")
