"""Recompute what a run claims: metrics from predictions, predictions from weights and data, whose hashes are compared.

If the weights or the data are no longer those of the run, a claim cannot be checked ("changed"). That is not the same as a
number that is wrong.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from omnivision.checkpoint.checkpointer import verify_manifest
from omnivision.checkpoint.fingerprint import classify_setting_changes, file_digest, parse_fingerprint
from omnivision.checkpoint.state_dict_file import StateDictFile, read_weights
from omnivision.config.flat import read_flat_file
from omnivision.config.schema import Settings
from omnivision.config.validate import read_run_config
from omnivision.data.batch import Batch
from omnivision.data.catalog import Split, resolve_path
from omnivision.data.loader import LoaderConfig, load_batches
from omnivision.data.sampling import Request, keyed_rng
from omnivision.interop.complete import complete_model
from omnivision.models.architecture import from_architecture
from omnivision.reporting.logs import read_lines
from omnivision.reporting.predictions import Predictions, make_table, read_predictions
from omnivision.reporting.run_directory import RunDir
from omnivision.tasks.metrics import (
    PREDICTION_METRICS,
    RANKING_METRICS,
    mean_of_finite,
    prediction_metrics,
    to_probabilities,
)
from omnivision.training import build
from omnivision.training.evaluate import evaluation_settings
from omnivision.training.trainer import resolve_amp_dtype
from omnivision.utils.errors import UserError, truncate_list
from omnivision.utils.io import BEST, LATEST, CorruptCheckpointError

Verdict = Literal["holds", "wrong", "changed", "unchecked"]
TOLERANCE = 1e-3  # percentage points, and loss: rounding of a sum in another order
# How far probabilities of the same weights may differ: evaluated both times in float32, or once in half precision.
PROBABILITY_TOLERANCE = {True: 1e-3, False: 0.05}
NUMBERS = ("loss", "top1", "top5", *(name for own in PREDICTION_METRICS.values() for name in own))


class Claim(NamedTuple):
    """One thing that a run claims, what was found instead, and whether it holds."""

    what: str
    recorded: str
    found: str
    verdict: Verdict


Track = Callable[[Iterable[Batch], int], Iterable[Batch]]


def verify_run(
    folder: Path, sample: int | None, device: torch.device, workers: int, track: Track = lambda batches, total: batches
) -> list[Claim]:
    """Return the claims of a run, and whether they hold. Of a run without predictions: those about its checkpoints and lists.

    Args:
        sample: how many predictions of each source are recomputed; None for all.
        track: shows the progress of an iterator with a number of items.

    Raises UserError for a folder that is not a run, and for predictions that cannot be read.
    """
    summary = RunDir(folder).read_summary()
    if not summary or not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} must be a run directory; it has no config.yaml, or no summary.json that can be read."
        )
    settings = read_run_config(folder / "config.yaml")
    saved = Path(settings.trainer.checkpoint.save_dir)  # in the run directory, which may have moved, or elsewhere
    run = RunDir(folder, None if saved == Path(settings.launcher.experiment_log_dir, "checkpoints") else saved)
    evaluation = summary.get("evaluation") or {}  # runs of earlier versions lack it
    files = {file.stem: file for file in sorted(run.predictions.glob("*.npz"))}
    files = {name: file for name, file in files.items() if name in (evaluation.get("sources") or files)}
    if not files:
        claims = weight_claims(run)
        if any(claim.what == LATEST and claim.verdict == "holds" for claim in claims):
            claims += data_claims(settings, read_weights(run.checkpoints / LATEST))
        return [*claims, Claim("predictions", "", "none: the run has not validated", "unchecked")]
    predictions = {name: _read(file) for name, file in files.items()}
    claims = [*metric_claims(summary, predictions, settings), *log_claims(run, summary)]
    claims += [claim for name, file in files.items() for claim in table_claims(file, predictions[name])]
    claims += weight_claims(run)
    weights, evaluated = _evaluated_weights(run, summary)
    claims += evaluated
    if weights is None:
        return claims
    lists = data_claims(settings, weights)
    claims += lists
    if missing := [claim.what for claim in lists if claim.verdict == "unchecked"]:
        found = f"not recomputed without {truncate_list(missing)} (relative paths start at {Path.cwd()})"
        return [*claims, Claim("predictions", "", found, "unchecked")]
    if changed := [claim.what for claim in claims if claim.verdict == "changed"]:
        found = f"not recomputed, because these have changed: {truncate_list(changed)}"
        return [*claims, Claim("predictions", "", found, "changed")]
    if evaluation.get("settings", now := evaluation_settings(settings.trainer)) != now:
        found = "not recomputed: they are of an evaluation with other views than config.yaml's"
        return [*claims, Claim("predictions", "", found, "unchecked")]
    exact = evaluation.get("dtype") == "float32"
    return claims + prediction_claims(settings, weights, predictions, files, sample, device, workers, exact, track)


def _read(file: Path) -> Predictions:
    try:
        return read_predictions(file)
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise UserError(f"{file} cannot be read: {error}. Validate the run again, trainer.mode=val.") from None


def metric_claims(
    summary: Mapping[str, Any], predictions: Mapping[str, Predictions], settings: Settings
) -> list[Claim]:
    """Compare the metrics in the summary with those of the predictions."""
    last = summary.get("last") or {}
    totals: dict[str, float] = {}
    count = 0
    for source, part in predictions.items():
        sums, videos = sum_losses(part, settings, source)
        count += videos
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
    found = {name: value / max(1, count) for name, value in totals.items()}
    parts = [prediction_metrics(part.label_type, part.label, part.scores) for part in predictions.values()]
    found |= {name: mean_of_finite([own[name] for own in parts]) for name in parts[0]}
    found["videos"] = sum(len(part.index) for part in predictions.values())
    return [
        _compare(name, f"{name} of the summary, from the predictions", last.get(f"val_{name}"), found[name])
        for name in (*NUMBERS, "videos")
        if name in found
    ]


def sum_losses(part: Predictions, settings: Settings, source: str) -> tuple[dict[str, float], int]:
    """Return sums over the videos with a label, of the loss and of top-1 and top-5 (%), and their number."""
    scores = torch.from_numpy(part.scores).double()
    if part.label_type == "class":
        known = torch.from_numpy(part.label >= 0)
        logits, label = scores[known], torch.from_numpy(part.label.astype(np.int64))[known]
        best = logits.topk(min(5, logits.shape[1]), 1).indices == label[:, None]
        loss = float(torch.nn.functional.cross_entropy(logits, label, reduction="sum"))
        return {"loss": loss, "top1": 100.0 * int(best[:, 0].sum()), "top5": 100.0 * int(best.any(1).sum())}, len(label)
    target = torch.from_numpy(part.label).double()
    known = target.isfinite()
    if part.label_type == "multi_label":
        losses = torch.nn.functional.binary_cross_entropy_with_logits(scores, target.nan_to_num(), reduction="none")
    else:
        losses = ((scores - target) / torch.from_numpy(_deviations(part, settings, source))) ** 2
    mean = torch.where(known, losses, 0).sum(1) / known.sum(1).clamp(min=1)
    return {"loss": float(mean.sum())}, int(known.any(1).sum())


def _deviations(part: Predictions, settings: Settings, source: str) -> np.ndarray:
    """Return the standard deviation of each target in the catalog, float64 (K,); 1 for classes."""
    entry = settings.trainer.data.sources.get(source)
    known = None if entry is None or part.label_type != "regression" else entry.label_std
    return np.array(known or [1.0] * part.scores.shape[1], dtype=np.float64)


def _compare(name: str, what: str, recorded: Any, found: float) -> Claim:
    if not isinstance(recorded, (int, float)):
        missing = recorded is None
        return Claim(
            what, "missing" if missing else repr(recorded), f"{found:.4f}", "unchecked" if missing else "wrong"
        )
    exact = name in PREDICTION_METRICS["regression"]  # in any unit, and computed in the same way
    holds = math.isclose(recorded, found, rel_tol=1e-5, abs_tol=0 if exact else TOLERANCE)
    holds = holds or (math.isnan(recorded) and math.isnan(found))
    return Claim(what, f"{recorded:.4f}", f"{found:.4f}", "holds" if holds else "wrong")


def log_claims(run: RunDir, summary: Mapping[str, Any]) -> list[Claim]:
    """Compare the summary with the last and the best validation in the log."""
    file = run.logs / "metrics.jsonl"
    lines = [line for line in read_lines(file) if line.get("phase") == "val"] if file.is_file() else []
    if not lines:
        return [Claim("the log", "", f"no validation in {file}", "unchecked")]
    last, claims = summary.get("last") or {}, []
    for name in NUMBERS:
        if isinstance(lines[-1].get(name), (int, float)):
            recorded = last.get(f"val_{name}")
            claims.append(_compare(name, f"{name} of the summary, from the log", recorded, lines[-1][name]))
    trained = (summary.get("evaluation") or {}).get("mode") != "val"  # such an evaluation replaces its line in the log
    for name in RANKING_METRICS:
        if (
            trained
            and summary.get("best") is not None
            and all(isinstance(line.get(name), (int, float)) for line in lines)
        ):
            best = max(line[name] for line in lines)
            claims.append(_compare(name, f"best {name} of the summary, from the log", summary["best"], best))
    return claims


def table_claims(file: Path, predictions: Predictions) -> list[Claim]:
    """Compare the table of predictions with the arrays."""
    table = file.with_suffix(".csv")
    if not table.is_file():
        return [Claim(f"{table.name}", "", "missing", "unchecked")]
    try:
        with open(table, encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (ValueError, csv.Error) as error:
        return [Claim(f"{table.name}", "", f"cannot be read: {error}", "wrong")]
    header, cells = make_table(predictions)
    expected = [[path, *map(str, own)] for path, own in zip(predictions.paths, cells, strict=True)]
    given = [[row.get(name) for name in ("path", *header)] for row in rows]
    has_classes = predictions.label_type != "regression"  # a target may have any name
    rounded = [has_classes and name.startswith("probability_") for name in ("path", *header)]
    differing = sum(
        not all(map(_same_cell, one, other, rounded)) for one, other in zip(expected, given, strict=False)
    ) + abs(len(expected) - len(given))
    found = f"{differing} rows differ from {file.name}" if differing else f"equal to {file.name}"
    return [Claim(f"{table.name}", f"{len(given)} rows", found, "wrong" if differing else "holds")]


def _same_cell(one: str, other: str | None, rounded: bool) -> bool:
    """Compare two cells of a table; the last digit of a rounded one depends on the machine."""
    try:
        return one == other or (rounded and math.isclose(float(one), float(other or "nan"), abs_tol=TOLERANCE))
    except ValueError:
        return False


def weight_claims(run: RunDir) -> list[Claim]:
    """Compare the checkpoints with their manifests."""
    claims = []
    for name in (LATEST, BEST):
        path = run.checkpoints / name
        if not path.is_file():
            claims.append(Claim(name, "", "missing", "unchecked"))
            continue
        try:
            claims.append(Claim(name, "its manifest", str(verify_manifest(path)["sha256"])[:12], "holds"))
        except CorruptCheckpointError:
            claims.append(Claim(name, "its manifest", "another file", "changed"))
    return claims


def _evaluated_weights(run: RunDir, summary: Mapping[str, Any]) -> tuple[StateDictFile | None, list[Claim]]:
    """Return the weights of the last evaluation, if there are any, and what they claim about it."""
    last = summary.get("last") or {}
    trained = (summary.get("evaluation") or {}).get("mode") != "val"  # checkpoints do not record such an evaluation
    epoch, found = last.get("val_epoch"), []
    for name in (LATEST, BEST):
        path = run.checkpoints / name
        try:
            weights = read_weights(path)
        except UserError:
            found.append(f"{name} cannot be read")
            continue
        own = weights.metadata.get("last") or {}
        if epoch is not None and own.get("val_epoch") == epoch and weights.metadata.get("epoch") == epoch:
            what = f"loss of the summary, from {name}"
            loss = own.get("val_loss")
            claim = _compare("loss", what, last.get("val_loss"), loss if isinstance(loss, (int, float)) else math.nan)
            if not trained:
                return weights, []
            if claim.verdict == "wrong" and _other_settings(run, weights):
                claim = claim._replace(found=f"{claim.found}, of a run with other settings", verdict="changed")
            return weights, [claim]
        found.append(f"{name} is of epoch {weights.metadata.get('epoch')}")
    text = f"no checkpoint has the weights of the last evaluation (epoch {epoch}): {'; '.join(found)}"
    return None, [Claim("predictions", "", text, "unchecked")]


def _other_settings(run: RunDir, weights: StateDictFile) -> bool:
    saved, current = parse_fingerprint(weights.metadata.get("experiment")), read_flat_file(run.path / "config.yaml")
    return saved is not None and current is not None and bool(classify_setting_changes(saved["settings"], current)[0])


def data_claims(settings: Settings, weights: StateDictFile) -> list[Claim]:
    """Compare the lists of paths, labels and segments with those of the run, by their hashes."""
    run = parse_fingerprint(weights.metadata.get("experiment"))
    if run is None:
        return [Claim("data", "", "the checkpoint records no hashes", "unchecked")]
    claims = []
    for key, digest in run["data"].items():
        _, name, which, what = key.split(".")
        split = getattr(settings.trainer.data.sources.get(name), which, None)
        try:
            found = file_digest(Path(resolve_path(getattr(split, what, None) or [], key)))
        except (UserError, OSError):
            claims.append(Claim(key, _short(digest), "missing", "unchecked"))
        else:
            claims.append(Claim(key, _short(digest), _short(found), "holds" if found == digest else "changed"))
    return claims


def _short(digest: str) -> str:
    return digest.rpartition(" ")[2][:12]


def prediction_claims(
    settings: Settings,
    weights: StateDictFile,
    predictions: Mapping[str, Predictions],
    files: Mapping[str, Path],
    sample: int | None,
    device: torch.device,
    workers: int,
    exact: bool,
    track: Track,
) -> list[Claim]:
    """Recompute predictions of each source, and compare probabilities and classes."""
    if weights.own_class is not None:
        return [Claim("predictions", "", "models of your own classes are not built here", "unchecked")]
    converted, _ = complete_model(weights)
    model = from_architecture(converted.architecture, str(weights.path))
    model.load_state_dict(converted.state)
    model = model.eval().to(device)
    task = build.build_task(settings)
    dtype = resolve_amp_dtype(settings.trainer, device)
    splits = build.open_splits(settings.with_trainer(mode="val"))[1]
    dataset = build.build_clip_dataset(settings, splits, training=False)
    claims = []
    for number, split in enumerate(splits):
        recorded = predictions.get(split.name)
        if recorded is None or sample == 0:
            claims.append(Claim(f"predictions of {split.name}", "", "none recomputed", "unchecked"))
            continue
        if misplaced := count_misplaced(split, recorded):
            what = f"paths and labels of {split.name}"
            claims.append(Claim(what, f"{len(recorded.index)} videos", f"{misplaced} are not the data's", "wrong"))
            continue
        rng = keyed_rng(0, number)
        positions = np.arange(len(recorded.index))
        absent = np.setdiff1d(np.arange(len(split)), recorded.index)  # unreadable, or not in a limited evaluation
        if settings.trainer.limit_val_batches is not None:
            absent = absent[:0]
        if sample is not None:
            positions, absent = np.sort(rng.permutation(positions)[:sample]), rng.permutation(absent)[:sample]
        requests = [[Request(number, int(index), 0)] for index in (*recorded.index[positions], *absent)]
        batches = load_batches(dataset, iter(requests), LoaderConfig(workers))
        found: dict[int, np.ndarray] = {}
        for batch in track(batches, len(requests)):
            if len(batch):
                with torch.inference_mode(), torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
                    scores = task.evaluation_step(model, batch.to(device)).scores
                found[int(batch.index[0])] = scores.float().cpu().numpy()[0]
        if readable := sum(index in found for index in absent.tolist()):
            what, text = f"videos without a prediction in {split.name}", f"{readable} of {len(absent)} can be read"
            claims.append(Claim(what, "unreadable", text, "wrong"))
        claims += _compare_predictions(
            split.name, recorded, positions, found, exact and dtype is None, files[split.name],
            _deviations(recorded, settings, split.name),
        )  # fmt: skip
    return claims


def count_misplaced(split: Split, recorded: Predictions) -> int:
    """Count rows that are not in the split, twice there, or have another path or label there."""
    index = recorded.index.tolist()
    right = {
        i
        for i, path, label in zip(index, recorded.paths, recorded.label, strict=True)
        if 0 <= i < len(split) and split.path(i) == path and np.array_equal(split.label(i), label, equal_nan=True)
    }
    return len(index) - len(right)


def _compare_predictions(
    name: str,
    recorded: Predictions,
    positions: np.ndarray,
    found: Mapping[int, np.ndarray],
    exact: bool,
    file: Path,
    unit: np.ndarray,
) -> list[Claim]:
    """Compare recorded with recomputed probabilities, or with values, in `unit` (K,).

    Videos that are newer than the predictions count as changed data.
    """
    wrong, newer, largest, other_class = 0, 0, 0.0, 0
    is_value = recorded.label_type == "regression"
    probabilities = recorded.scores if is_value else recorded.probabilities
    for position in positions.tolist():
        own = found.get(int(recorded.index[position]))
        if own is not None and not is_value:
            own = to_probabilities(own, recorded.label_type)
        difference = math.inf if own is None else float((np.abs(own - probabilities[position]) / unit).max())
        largest = max(largest, difference)
        if difference > PROBABILITY_TOLERANCE[exact]:
            path = Path(recorded.paths[position])
            is_newer = not path.exists() or path.stat().st_mtime > file.stat().st_mtime
            newer += is_newer
            wrong += not is_newer
        elif own is not None and recorded.label_type == "class":
            other_class += int(own.argmax() != probabilities[position].argmax())
    what = f"predictions of {name}, from weights and data"
    text = f"largest difference of a {'value, in standard deviations,' if is_value else 'probability'} {largest:.2g}"
    if wrong:
        return [Claim(what, f"{len(positions)} videos", f"{wrong} differ; {text}", "wrong")]
    if newer:
        return [Claim(what, f"{len(positions)} videos", f"{newer} videos changed after the evaluation", "changed")]
    if other_class:
        text += f"; {other_class} ties were decided otherwise"
    return [Claim(what, f"{len(positions)} videos", text, "holds")]
