"""Twelve Kaggle tasks prepared, graded and imitated as MLE-bench does it (openai/mle-bench 783b15a).

    python grade.py prepare TASK... --raw DIR --data-dir DIR      Kaggle's raw files -> prepared/
    python grade.py verify TASK... --data-dir DIR                 md5 of every prepared table
    python grade.py score TASK submission.csv --data-dir DIR      one JSON object
    python grade.py standin TASK... --data-dir DIR                imitation data, same schema

What a task is stands in tasks.json: files, split, validity rules, metric, medals, stand-in recipe.
Layout: DIR/<task>/prepared/{public,private}; an existing MLE-bench cache works and is never changed.

Contents: §1 tasks, §2 metrics, §3 validity and grading, §4 medals, §5 preparation,
§6 getting data, §7 stand-ins, §8 command line.

DEVIATION from MLE-bench: a NaN score (constant predictions under Pearson's r) is invalid here, a
file that cannot be parsed is invalid instead of an error, and oversized files are not parsed.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

TASKS_FILE = Path(__file__).with_name("tasks.json")
PANDAS = tuple(int(part) for part in pd.__version__.split(".")[:2])
MAX_BYTES = 256 << 20     # a larger submission is refused unread; the largest honest one is ~60 MB
MAX_COLUMNS = 10_000      # a wider header is refused before pandas builds a table of it
HEAD_CHARS = 1 << 20      # header and first row must end within this many characters


class InvalidSubmission(ValueError):
    """The submission is refused; the text is a reason a person understands."""


class DataError(Exception):
    """Our side is at fault (task name, data, answers): one line, what is wrong and what to do."""


# --------------------------------------------------------------------------------------------------
# §1 Tasks
# --------------------------------------------------------------------------------------------------

def load_tasks():
    """All records of tasks.json, {name: record}, each with its own "name"."""
    tasks = json.loads(TASKS_FILE.read_text(encoding="utf-8"))
    return {name: dict(record, name=name) for name, record in tasks.items()}


def load_task(name):
    """One record by name, or from a user's own JSON file (a path that ends in .json).

    A user's file needs goal, metric, id, targets; its optional "data" is a folder (relative to the
    file) that holds public/ and private/. Raises DataError."""
    if str(name).endswith(".json"):
        return load_own_task(Path(name))
    tasks = load_tasks()
    if name in tasks:
        return tasks[name]
    near = [t for t in tasks if len(str(name)) > 2 and str(name).lower() in t]
    near = near or difflib.get_close_matches(str(name), tasks, n=3, cutoff=0.4)
    raise DataError(f"unknown task {str(name)!r}; " + (f"did you mean {' or '.join(near)}?" if near
                    else f"known: {', '.join(tasks)}, or the path of a task .json file"))


def load_own_task(path):
    """A user's own task file; what it leaves out gets the obvious value. Raises DataError."""
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the task file {path}: {error}") from error
    if not isinstance(task, dict):
        raise DataError(f"the task file {path} must hold one JSON object")
    missing = [key for key in ("goal", "metric", "id", "targets") if key not in task]
    if missing:
        raise DataError(f"the task file {path} lacks: {', '.join(missing)}")
    if task["metric"] not in METRICS:
        raise DataError(f"{path}: unknown metric {task['metric']!r}; known: {', '.join(METRICS)}")
    if not isinstance(task["targets"], list) or not task["targets"]:
        raise DataError(f"{path}: \"targets\" must be a list of column names")
    stem = path.stem if path.stem != "task" else path.resolve().parent.name
    own = {"name": stem, "metric_text": task["metric"].replace("_", " "), "rules": {},
           "higher_is_better": task["metric"] not in LOWER_IS_BETTER, "train": "train.csv",
           "test": "test.csv", "sample": "sample_submission.csv", "answers": "answers.csv",
           "text": [], "numeric": [], "leaks": [], "gold": None, "silver": None, "bronze": None,
           "median": None, "sample_score": None, "paper": {}, "md5": {}, **task}
    if not re.fullmatch(r"[\w.-]+", str(own["name"])):
        raise DataError(f"{path}: the name {own['name']!r} is no plain folder name")
    if "data" in own:
        own["data"] = str(path.resolve().parent / own["data"])
    return own


def paths(task, data_dir):
    """(public, private) folders of a task given by name or record."""
    task = task if isinstance(task, dict) else load_task(task)
    home = Path(task["data"]) if "data" in task else Path(data_dir) / task["name"] / "prepared"
    return home / "public", home / "private"


# --------------------------------------------------------------------------------------------------
# §2 Metrics: pure functions of (truth, prediction), one column each except log_loss
# --------------------------------------------------------------------------------------------------

def roc_auc(truth, score):
    """P(a positive scores above a negative), ties count half, from average ranks. truth: 0/1."""
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]        # (n,) average 1-based rank
    positive = truth.astype(bool)
    p, n = int(positive.sum()), int((~positive).sum())
    return (ranks[positive].sum() - p * (p + 1) / 2) / (p * n)


def quadratic_kappa(truth, labels):
    """1 - sum(w O) / sum(w E) with w the squared difference of the categories' ranks.

    The ranks are places in the sorted union of the values that occur, not the values. Both sums
    reduce to moments of the ranks, so integers keep constant predictions at exactly 0."""
    categories = np.unique(np.concatenate([truth, labels]))
    a, b = (np.searchsorted(categories, x).astype(np.int64) for x in (truth, labels))
    observed = len(a) * int(((a - b) ** 2).sum())
    expected = len(a) * int((a * a).sum() + (b * b).sum()) - 2 * int(a.sum()) * int(b.sum())
    return 1.0 - observed / expected if expected else float("nan")


def word_jaccard(truth, texts):
    """Mean over rows of |A n B| / |A u B|, A and B the sets of lower-cased words.

    Raises InvalidSubmission where both sides of a row have no words (MLE-bench divides by 0)."""
    total = 0.0
    for wanted, given in zip(truth, texts):
        a, b = set(wanted.lower().split()), set(given.lower().split())
        if not a and not b:
            raise InvalidSubmission("a row has no words where the answer has none either")
        total += len(a & b) / len(a | b)
    return total / len(truth)


def accuracy(truth, labels):
    """Share of equal labels."""
    return float(np.mean(truth == labels))


def pearson(truth, values):
    """Pearson's r; NaN where either side is constant. Scaled first, so that 1e300 is no overflow."""
    x, y = (v - v.mean() for v in (truth.astype(float), values.astype(float)))
    if (values == values[0]).all() or (truth == truth[0]).all():
        return float("nan")
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def log_loss(truth, probabilities):
    """Mean of -log p(true class), p clipped to [eps, 1 - eps], never renormalised. Both (n, C)."""
    eps = np.finfo(np.float64).eps
    clipped = np.clip(probabilities.astype(float), eps, 1 - eps)
    return float(-(truth * np.log(clipped)).sum(axis=1).mean())


def rmsle(truth, values):
    """Root mean square of the differences of log(1 + x)."""
    return float(np.sqrt(np.mean((np.log1p(values) - np.log1p(truth)) ** 2)))


METRICS = {"roc_auc": roc_auc, "quadratic_kappa": quadratic_kappa, "word_jaccard": word_jaccard,
           "accuracy": accuracy, "pearson": pearson, "log_loss": log_loss, "rmsle": rmsle}
LOWER_IS_BETTER = ("log_loss", "rmsle")


# --------------------------------------------------------------------------------------------------
# §3 Validity and grading
# --------------------------------------------------------------------------------------------------

def grade(task, submission, answers, rows=None):
    """Raw score in the metric's own direction, not rounded. MLE-bench's rules, sheet by sheet.

    task: name or record; submission: path of a .csv, DataFrame, bytes or binary file; answers: path
    or DataFrame; rows: bool mask over the answers' rows, the metric is taken on these (validity is
    checked on all). Raises InvalidSubmission for any fault of the submission, DataError for ours.
    """
    task = task if isinstance(task, dict) else load_task(task)
    truth = read_answers(task, answers)
    keep = np.ones(len(truth), bool) if rows is None else np.asarray(rows, bool)
    if keep.shape != (len(truth),):
        raise DataError(f"rows must be a mask over the {len(truth)} answer rows")
    wanted = truth_values(task, truth[keep])
    try:
        table = read_submission(submission, len(truth))
        given = {c: v[keep] for c, v in submission_values(task, align(task, table, truth)).items()}
        score = measure(task, wanted, given)
    except InvalidSubmission:
        raise
    except Exception as error:  # MLE-bench too turns any error of its grader into "invalid"
        reason = " ".join(str(error).split())[:200]
        raise InvalidSubmission(f"cannot be graded: {type(error).__name__}: {reason}") from error
    if not np.isfinite(score):  # DEVIATION: MLE-bench accepts NaN as a valid score without medal
        raise InvalidSubmission("the score is not a number (are the predictions all the same?)")
    return float(score)


def measure(task, truth, given):
    """The metric on {target: (n,) array}: the mean over targets, log-loss over the whole table."""
    metric, targets = METRICS[task["metric"]], task["targets"]
    if metric is log_loss:
        return log_loss(*(np.column_stack([side[c] for c in targets]) for side in (truth, given)))
    return np.mean([metric(truth[c], given[c]) for c in targets])


def read_answers(task, answers):
    """DataFrame of the id and target columns in file order. Raises DataError."""
    columns = tuple(dict.fromkeys([task["id"], *task["targets"]]))
    if isinstance(answers, pd.DataFrame):
        return checked_answers(answers, columns, "the answers table")
    try:
        stat = os.stat(answers)
    except OSError as error:
        raise DataError(f"no answers at {answers}: {error.strerror}; prepare the data") from error
    return answers_file(os.fspath(answers), columns, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=32)
def answers_file(path, columns, mtime_ns, size):
    """Parsed answers, kept while the file does not change: grading is done once per program."""
    try:
        return checked_answers(read_csv(path), columns, path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the answers {path}: {' '.join(str(error).split())}") from error


def checked_answers(table, columns, where):
    """The wanted columns of an answers table, or DataError."""
    missing = [c for c in columns if c not in table.columns]
    if missing or not len(table):
        raise DataError(f"{where} {'lacks ' + ', '.join(missing) if missing else 'has no rows'}")
    return table[list(columns)].reset_index(drop=True)


def truth_values(task, truth):
    """{target: (n,) array} of the answers; DataError where a metric is undefined on them."""
    values = {c: texts(truth[c]) if task["metric"] == "word_jaccard" else truth[c].to_numpy()
              for c in task["targets"]}
    if not len(truth):
        raise DataError("no answer rows are left to grade on")
    if task["metric"] == "roc_auc" and any(len(np.unique(v)) != 2 for v in values.values()):
        raise DataError("the answer rows must hold both classes for ROC AUC")
    return values


def read_csv(source, **options):
    """pandas as MLE-bench calls it. One pass over whole columns: no chunk-wise guess of a type."""
    if PANDAS < (3, 1):                 # from 3.1 on exact parsing is the default, the option gone
        options["float_precision"] = "round_trip"
    return pd.read_csv(source, low_memory=False, **options)


def read_submission(submission, n):
    """DataFrame of at most n + 1 rows (one too many shows a wrong count). Raises InvalidSubmission."""
    if isinstance(submission, pd.DataFrame):
        return submission
    if isinstance(submission, (str, os.PathLike)):
        path = Path(submission)
        if path.suffix.lower() != ".csv" or not path.is_file():
            raise InvalidSubmission(f"there is no .csv file at {path}")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    else:
        data = submission if isinstance(submission, bytes) else submission.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InvalidSubmission(f"the file is larger than {MAX_BYTES >> 20} MiB")
    if not data.strip():
        raise InvalidSubmission("the file is empty")
    try:
        check_width(data)
        return read_csv(io.BytesIO(data), nrows=n + 1)
    except UnicodeDecodeError as error:
        raise InvalidSubmission("the file is not UTF-8 text") from error
    except (pd.errors.ParserError, csv.Error) as error:
        raise InvalidSubmission(f"not a CSV table: {' '.join(str(error).split())}") from error


def check_width(data):
    """Refuse a table whose header or first row is absurdly wide: pandas would build its columns.

    Both matter: a first row wider than the header turns its surplus into a many-level index."""
    head = data[:HEAD_CHARS].decode("utf-8-sig", errors="replace")
    reader = csv.reader(io.StringIO(head, newline=""))
    records = [record for _, record in zip(range(2), (r for r in reader if r))]
    if any(len(record) > MAX_COLUMNS for record in records):
        raise InvalidSubmission(f"the table has more than {MAX_COLUMNS} columns")
    if len(data) > HEAD_CHARS and next(reader, None) is None:
        raise InvalidSubmission("the header or the first row is too long")


def align(task, table, truth):
    """The submission's target columns in the answers' row order. Raises InvalidSubmission."""
    rules, names = task["rules"], [task["id"], *task["targets"]]
    by_position = bool(rules.get("by_position"))
    need = task["targets"] if by_position else names
    lacking = [c for c in need if list(table.columns).count(c) != 1]
    if lacking:
        raise InvalidSubmission(f"the submission needs the column {lacking[0]!r}")
    if rules.get("exact_columns") and set(table.columns) != set(names):
        extra = [str(c) for c in table.columns if c not in names]
        raise InvalidSubmission(f"the submission has extra columns: {', '.join(extra[:5])}")
    if rules.get("id_first") and table.columns[0] != task["id"]:
        raise InvalidSubmission(f"the first column must be {task['id']!r}")
    if len(table) != len(truth):
        more = "or more " if len(table) == len(truth) + 1 else ""
        raise InvalidSubmission(f"{len(table)} {more}rows where {len(truth)} are needed")
    if by_position:
        return table[need].reset_index(drop=True)
    ids, wanted = table[task["id"]], truth[task["id"]].to_numpy()
    if ids.isna().any():
        raise InvalidSubmission(f"the column {task['id']!r} has missing values")
    ids = ids.to_numpy()
    if (ids.dtype == object) != (wanted.dtype == object):
        raise InvalidSubmission(f"the values of {task['id']!r} are of another type than asked for")
    # Sorted against sorted, as MLE-bench aligns; stable, so that repeated keys keep their order.
    order, place = np.argsort(ids, kind="stable"), np.argsort(wanted, kind="stable")
    if not np.array_equal(ids[order], wanted[place]):
        wrong = np.flatnonzero(ids[order] != wanted[place])[0]
        raise InvalidSubmission(f"the values of {task['id']!r} do not match the test set, such as "
                                f"{str(ids[order][wrong])[:50]!r}")
    back = np.empty(len(order), np.int64)
    back[place] = order
    return table[task["targets"]].iloc[back]


def submission_values(task, table):
    """{target: (n,) array} after the task's validity rules. Raises InvalidSubmission."""
    rules = task["rules"]
    if task["metric"] == "word_jaccard":
        return {c: texts(table[c]) for c in table}
    values = {c: numbers(table[c], rules) for c in table}
    if "row_sum" in rules:
        sums = np.sum([v.astype(float) for v in values.values()], axis=0)
        # "close": numpy's isclose with its default rtol; "round": to 6 decimals, as for lmsys.
        right = (np.isclose(sums, 1, atol=1e-6) if rules["row_sum"] == "close"
                 else np.round(sums, 6) == 1)
        if not right.all():
            raise InvalidSubmission(f"a row's probabilities add up to {sums[~right][0]:.9g}, not 1")
    return values


def texts(column):
    """(n,) strings; a missing value is the empty string."""
    return np.array([str(v) for v in column.astype(object).where(column.notna(), "")], object)


def numbers(column, rules):
    """(n,) numbers of one target column under the task's rules. Raises InvalidSubmission."""
    name = repr(column.name)
    if column.isna().any():
        raise InvalidSubmission(f"the column {name} has missing values")
    if not pd.api.types.is_numeric_dtype(column):       # True/False columns count as numeric
        if rules.get("text") == "wrong":  # scikit-learn 1.5.1 compares text with labels: all wrong
            return np.full(len(column), None, object)
        raise InvalidSubmission(f"the column {name} must be numeric")
    values = column.to_numpy()
    if not np.isfinite(values).all():
        raise InvalidSubmission(f"the column {name} has infinite values")
    low, high = rules.get("range", (None, None))
    if (low is not None and values.min() < low) or (high is not None and values.max() > high):
        limits = f"between {low} and {high}" if high is not None else f"at least {low}"
        raise InvalidSubmission(f"the values of {name} must be {limits}")
    if rules.get("integral") and values.dtype.kind == "f":
        if not (np.abs(values) < 2.0 ** 63).all() or not (values == np.floor(values)).all():
            raise InvalidSubmission(f"the values of {name} must be whole numbers")
    return values


# --------------------------------------------------------------------------------------------------
# §4 Medals
# --------------------------------------------------------------------------------------------------

def better(task, score, other, strictly=False):
    """Is score, rounded to 5 decimals as MLE-bench does, as good as other (or better)?"""
    gain = round(score, 5) - other if task["higher_is_better"] else other - round(score, 5)
    return gain > 0 if strictly else gain >= 0


def medal(task, score):
    """"gold", "silver", "bronze" or None by the private leaderboard's thresholds."""
    task = task if isinstance(task, dict) else load_task(task)
    return next((name for name in ("gold", "silver", "bronze")
                 if task[name] is not None and better(task, score, task[name])), None)


def above_median(task, score):
    """Strictly better than the median of the private leaderboard?"""
    task = task if isinstance(task, dict) else load_task(task)
    return task["median"] is not None and better(task, score, task["median"], strictly=True)


# --------------------------------------------------------------------------------------------------
# §5 Preparation: Kaggle's raw files -> public and private, byte for byte as MLE-bench writes them
# --------------------------------------------------------------------------------------------------

def build(task, raw, out, temp):
    """Write out/public and out/private from the folder raw; temp takes what zips hold.

    Everything a task differs in is data, task["prepare"]. Raises DataError."""
    plan, table = task["prepare"], read_table(find_raw(raw, task["prepare"]["raw"], temp))
    for folder in ("public", "private", *plan.get("folders", ())):
        (out / folder).mkdir(parents=True, exist_ok=True)
    labels = [plan["one_hot"]] if "one_hot" in plan else task["targets"]
    lacking = [c for c in dict.fromkeys([task["id"], *labels]) if c not in table]
    if lacking:
        raise DataError(f"{plan['raw']} in {raw} lacks the column {lacking[0]!r}: another file?")
    if "test_file" in plan:             # the organisers' own split: the files are copied as they are
        source = find_raw(raw, plan["test_file"], temp)
        train, test = table, read_table(source)
        shutil.copyfile(find_raw(raw, plan["raw"], temp), out / "public" / task["train"])
        shutil.copyfile(source, out / "private" / task["answers"])
    else:
        train_rows, test_rows = split_rows(len(table), plan["test"], raw, temp)
        train, test = table.iloc[train_rows], table.iloc[test_rows]
        del table                       # 1.8 GB for the largest task
        copy_files(task, raw, temp, out, train[task["id"]], test[task["id"]])
        train, test = renumber(task, train, test)
        write_table(train, out / "public" / task["train"])
        write_table(answer_table(task, test), out / "private" / task["answers"])
    columns = plan.get("test_columns") or [c for c in test.columns if c not in labels]
    if isinstance(columns, str):        # the fields of the first record of a raw file
        columns = list(read_table(find_raw(raw, columns, temp)).columns)
    write_table(test[columns], out / "public" / task["test"])
    write_table(sample_table(task, test), out / "public" / task["sample"])
    if "gold" in plan:
        write_table(test[plan["gold"]], out / "private" / "gold_submission.csv")
    for name in plan.get("zips", ()):
        pack(out / "public" / name)


def split_rows(n, share, raw, temp):
    """(train, test) row numbers, both in permutation order; scikit-learn's split at random_state 0.

    share: a fraction (rounded up), a number of rows, or a raw file: its share of both files' rows."""
    if isinstance(share, str):
        m = len(read_table(find_raw(raw, share, temp)))
        share = m / (n + m)
    m = int(np.ceil(share * n)) if isinstance(share, float) else share
    if not 0 < m < n:
        raise DataError(f"the raw table in {raw} has {n} rows, too few to split off {m}")
    order = np.random.RandomState(0).permutation(n)
    return order[m:], order[:m]


def renumber(task, train, test):
    """The task's new ids in split order: a pattern for each part, the first number, and where the
    test ids start ("first", or "after" the train ids)."""
    if "new_ids" not in task["prepare"]:
        return train, test
    rule, parts = task["prepare"]["new_ids"], []
    for part, start in ((train, rule["first"]), (test, rule["first"] + (
            len(train) if rule["test_from"] == "after" else 0))):
        pattern = rule["train" if part is train else "test"]
        numbered = range(start, start + len(part))
        parts.append(part.assign(**{
            task["id"]: list(numbered) if pattern == "{}" else [pattern.format(k) for k in numbered]}))
    return parts


def answer_table(task, test):
    """The private answers: all raw columns, or the named ones, or one 0/1 column per class."""
    plan = task["prepare"]
    if "one_hot" in plan:
        hot = {c: (test[plan["one_hot"]] == c).astype(int) for c in task["targets"]}
        return pd.DataFrame({task["id"]: test[task["id"]], **hot})
    return test[plan["answers"]] if "answers" in plan else test


def sample_table(task, test):
    """The sample submission: id and constant targets (or seeded random integers)."""
    plan = task["prepare"]
    values = plan["sample"] if isinstance(plan["sample"], list) else [plan["sample"]] * len(
        task["targets"])
    table = test[plan.get("sample_columns", [task["id"]])].copy()
    for target, value in zip(task["targets"], values):
        if isinstance(value, dict):
            low, high, seed = value["randint"]
            value = np.random.RandomState(seed).randint(low, high, len(table))
        table[target] = value
    return table


def copy_files(task, raw, temp, out, *ids):
    """Images or geometry of the raw train set, under the rows' new names."""
    for rule in task["prepare"].get("files", ()):
        folder = find_raw(raw, rule["raw"], temp)
        number = task["prepare"].get("new_ids", {}).get("first", 0)
        for part, old_ids in zip(("train", "test"), ids):
            for k, old in enumerate(old_ids, start=number):
                found = sorted(folder.glob(rule["pattern"].format(old)))
                if not found:
                    raise DataError(f"no {rule['raw']}/{rule['pattern'].format(old)} in {raw}")
                target = out / "public" / rule[part].format(k=k, old=old)
                target.parent.mkdir(parents=True, exist_ok=True)
                # Two geometry files lie in one folder of nomad: MLE-bench lets the last one win.
                shutil.copyfile(found[-1], target)


def find_raw(raw, name, temp):
    """Path of the raw file or folder `name`: itself, in a folder of its own name (as MLE-bench
    leaves an extracted zip), in name.zip or stem.zip, or in the download's one zip. DataError."""
    for path in (raw / name / name, raw / name):
        if path.is_dir() if "." not in name else path.is_file():
            return path
    for packed in (f"{name}.zip", f"{Path(name).stem}.zip", f"{raw.name}.zip"):
        if (raw / packed).is_file():
            folder = temp / raw.name / Path(packed).stem
            if not folder.exists():
                unpack(raw / packed, folder)
            with contextlib.suppress(DataError):
                return find_raw(folder, name, temp)
    raise DataError(f"no {name} (nor {name}.zip, nor {Path(name).stem}.zip) in {raw}")


def unpack(packed, folder):
    """Extract a zip. DataError where it is damaged."""
    try:
        with zipfile.ZipFile(packed) as file:
            file.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{packed} is a damaged zip ({error}); download it again") from error


def pack(path):
    """stem.zip beside path, holding it alone; a fixed date keeps the bytes the same every time."""
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED)


def read_table(path):
    """DataFrame of a CSV, or of a JSON list of records (object columns: values stay as they are)."""
    try:
        if path.suffix == ".json":
            return pd.DataFrame(json.loads(path.read_text(encoding="utf-8")), dtype=object)
        return read_csv(path)
    except (ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error


def write_table(table, path):
    """CSV as pandas writes it (booleans as 0/1), or a JSON list with indent 4."""
    if path.suffix == ".json":
        path.write_text(json.dumps(table.to_dict("records"), indent=4), encoding="utf-8")
        return
    table = table.infer_objects()       # only a JSON source has object columns of numbers
    flags = [c for c in table if table[c].dtype == bool]
    table.astype(dict.fromkeys(flags, int)).to_csv(path, index=False)


# --------------------------------------------------------------------------------------------------
# §6 Getting data: use what is prepared, else raw files, else Kaggle, else a stand-in
# --------------------------------------------------------------------------------------------------

def is_standin(task, data_dir):
    """Is the prepared data an imitation? The file prepared/STANDIN marks it."""
    return (paths(task, data_dir)[0].parent / "STANDIN").is_file()


def missing_files(task, data_dir):
    """Tables of the prepared task that are not there."""
    public, private = paths(task, data_dir)
    wanted = [public / task[key] for key in ("train", "test", "sample")]
    return [p for p in [*wanted, private / task["answers"]] if not p.is_file()]


def ensure_data(task, data_dir, raw=None):
    """Make sure that the task's prepared data exists; returns whether it is a stand-in.

    Prepared data is used as it is. Otherwise it is made from raw (or the raw folder of an MLE-bench
    cache), from Kaggle where credentials are set up, or else imitated. Safe when several processes
    call it at once. Raises DataError."""
    task = task if isinstance(task, dict) else load_task(task)
    lacking, home = missing_files(task, data_dir), Path(data_dir) / task["name"]
    if not lacking and not (raw and is_standin(task, data_dir)):
        return is_standin(task, data_dir)
    if "data" in task:
        raise DataError(f"{task['name']} has no {lacking[0]}; its task file names the data folder")
    if raw is not None:
        folder = Path(raw) / task["name"]
        folder = folder if folder.is_dir() else Path(raw)
        if not folder.is_dir():
            raise DataError(f"no such folder of raw files: {raw}")
        raw = folder
    elif (home / "raw").is_dir() and any((home / "raw").iterdir()):
        raw = home / "raw"
    elif has_credentials() and task["id"] and "md5" in task and task["md5"]:
        raw = download(task, home)
    publish(task, data_dir, raw)
    return raw is None


def publish(task, data_dir, raw=None, seed=0):
    """Build prepared/ aside and rename it into place; raw None makes a stand-in from seed.

    Under a lock, so that a second process waits and then finds the data; what an interrupted run
    left aside is removed. Real data replaces a stand-in, never the reverse. Raises DataError."""
    home = Path(data_dir) / task["name"]
    home.mkdir(parents=True, exist_ok=True)
    final, temp = home / "prepared", home / ".unfinished"
    with open(home / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)            # released when the file is closed
        if not missing_files(task, data_dir) and not (raw and is_standin(task, data_dir)):
            return
        if final.is_dir() and any(final.iterdir()) and not is_standin(task, data_dir):
            raise DataError(f"{final} is incomplete (no {missing_files(task, data_dir)[0].name}) and "
                            "not ours to change; move it away or choose another --data-dir")
        shutil.rmtree(temp, ignore_errors=True)
        try:
            made = temp / "prepared"
            made.mkdir(parents=True)
            if raw is None:
                task = make_raw(task, temp / "raw", seed)
                (made / "STANDIN").write_text(f"Imitation data, seed {seed}: not comparable.\n")
            build(task, raw or temp / "raw", made, temp / "unpacked")
            if final.is_dir():
                final.rename(temp / "old")
            made.rename(final)
        finally:
            shutil.rmtree(temp, ignore_errors=True)


def has_credentials():
    """Are Kaggle credentials set up (token file or environment)? They are not read here."""
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR", Path.home() / ".kaggle"))
    return (folder / "kaggle.json").is_file() or {"KAGGLE_USERNAME", "KAGGLE_KEY"} <= set(os.environ)


def download(task, home):
    """Fetch and extract the raw files with Kaggle's own client; returns home/raw. DataError."""
    name, rest = task["name"], f"or make imitation data: python grade.py standin {task['name']}"
    if importlib.util.find_spec("kaggle") is None:
        raise DataError(f"Kaggle credentials found, but not its client: pip install kaggle; {rest}")
    zipped, temp = home / f"{name}.zip", home / ".download"
    if not zipped.is_file():
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        print(f"downloading {name} from Kaggle", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-c", "from kaggle.cli import main; main()", "competitions",
             "download", "-c", name, "-p", str(temp)], capture_output=True, text=True, check=False)
        said = " ".join((done.stdout + done.stderr).split())
        if "403" in said:
            raise DataError(f"Kaggle refuses {name} (403): sign in and accept its rules by hand at "
                            f"https://www.kaggle.com/c/{name}/rules; {rest}")
        if done.returncode or not (temp / zipped.name).is_file():
            raise DataError(f"the download of {name} failed: {said[-200:]}; {rest}")
        (temp / zipped.name).rename(zipped)
        shutil.rmtree(temp)
    shutil.rmtree(home / ".raw", ignore_errors=True)
    unpack(zipped, home / ".raw")
    (home / ".raw").rename(home / "raw")
    return home / "raw"


def verify(task, data_dir):
    """[(file, "ok" | "differs" | "missing")] of the prepared tables against MLE-bench's md5s."""
    task = task if isinstance(task, dict) else load_task(task)
    base, result = paths(task, data_dir)[0].parent, []
    for name, wanted in task["md5"].items():
        state = "missing"
        if (base / name).is_file():
            with open(base / name, "rb") as file:
                state = "ok" if hashlib.file_digest(file, "md5").hexdigest() == wanted else "differs"
        result.append((name, state))
    return result


# --------------------------------------------------------------------------------------------------
# §7 Stand-ins: raw files of the real schema, drawn from the recipe in tasks.json, then prepared
# --------------------------------------------------------------------------------------------------
#
# Each row has latent factors z ~ N(0, 1). Weighted terms of z (linear, product, threshold) and noise
# decide the target; columns and words show the factors, so that a model can find them again.

COMMON = """the to and a of in is it for that you on with my be this was have are but not they at from
as we so if or an can will there what all about one out just up when who how more their some would
been like no do time only other into than then now over also after most your which me her his our
because very through could were had has any made many those where while before between both under
again against each few own same such too during without within across toward upon since until""".split()
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789"))


def make_raw(task, folder, seed):
    """Write the stand-in's raw files to folder; returns the record with its split scaled down."""
    spec, rng = task["standin"], np.random.default_rng([seed, zlib.crc32(task["name"].encode())])
    n = spec["rows"] + spec.get("test_rows", 0)
    z = rng.normal(size=(n, spec["factors"]))                       # (n, K) latent factors
    y = decide(spec, z, rng)
    table = {}
    for name, (kind, *args) in spec["columns"].items():
        for k, column in enumerate(expand(name)):
            table[column] = COLUMNS[kind](rng, z, y, table, spec, k, *args)
    table = pd.DataFrame({c: pd.Series(list(v), dtype=object) for c, v in table.items()})
    folder.mkdir(parents=True)
    plan = dict(task["prepare"])
    write_table(table[:spec["rows"]], folder / plan["raw"])
    other = plan.get("test_file") or (plan["test"] if isinstance(plan["test"], str) else None)
    if other:
        write_table(table[spec["rows"]:][spec.get("test_fields", list(table))], folder / other)
    elif isinstance(plan["test"], int):
        plan["test"] = 0.2              # the real number of test rows would not fit
    for rule in plan.get("files", ()):
        for i, row in enumerate(table.to_dict("records")):
            path = folder / rule["raw"] / rule["pattern"].format(row[task["id"]]).replace("*", "geometry")
            path.parent.mkdir(parents=True, exist_ok=True)
            DRAWINGS[rule["draw"]](path, rng, z[i], row)
    return dict(task, prepare=plan)


def expand(name):
    """Column names of a pattern: "f_[00-02]" -> f_00, f_01, f_02; a plain name stays alone."""
    found = re.fullmatch(r"(.*)\[(\d+)-(\d+)\](.*)", name)
    if not found:
        return [name]
    head, first, last, tail = found.groups()
    return [f"{head}{k:0{len(first)}d}{tail}" for k in range(int(first), int(last) + 1)]


def decide(spec, z, rng):
    """(n, C) float scores of the targets, or (n,) int classes.

    "signal": one list of [weight, "linear" | "product" | "beyond", factor(s)] per class or target.
    "shares": cut the one score into ordered classes of these shares; "classes": the best score wins."""
    signal = np.zeros((len(z), len(spec["signal"])))
    for c, terms in enumerate(spec["signal"]):
        for weight, kind, *f in terms:
            part = z[:, f].prod(axis=1) if kind != "beyond" else np.sign(np.abs(z[:, f[0]]) - 0.67)
            signal[:, c] += weight * part
    signal += spec.get("noise", 0.0) * rng.logistic(size=signal.shape)
    if "shares" in spec:
        cuts = np.quantile(signal[:, 0], np.cumsum(spec["shares"])[:-1])
        return np.searchsorted(cuts, signal[:, 0])
    return signal.argmax(axis=1) if spec.get("classes") else signal


# Columns: functions of (rng, z, y, table so far, spec, k-th of its pattern, the recipe's arguments).

def factor(rng, z, k):
    """The k-th latent factor, or fresh noise for null."""
    return rng.normal(size=len(z)) if k is None else z[:, k]


def count_column(rng, z, y, table, spec, i, k, median, spread):
    """Non-negative integers, log-normal in the factor, with a heap at 0 where the median is small."""
    return np.floor(median * np.exp(spread * factor(rng, z, k))).astype(int).tolist()


def real_column(rng, z, y, table, spec, i, k, centre, spread, digits=6):
    """Normal values in the factor (the k + i-th: a pattern's columns each show one)."""
    return np.round(centre + spread * factor(rng, z, None if k is None else k + i), digits).tolist()


def skew_column(rng, z, y, table, spec, i, k, median, spread, digits=6):
    """Positive values, log-normal in the factor."""
    return np.round(median * np.exp(spread * factor(rng, z, k)), digits).tolist()


def more_column(rng, z, y, table, spec, i, other, median, spread):
    """Another column plus a log-normal extra of its own type: a count or age seen later."""
    extra = median * np.exp(spread * rng.normal(size=len(z)))
    whole = isinstance(table[other][0], int)
    return [a + (int(b) if whole else round(b, 6)) for a, b in zip(table[other], extra.tolist())]


def pick_column(rng, z, y, table, spec, i, k, values):
    """One of the values: even slices of the factor, in order."""
    place = factor(rng, z, k).argsort().argsort() * len(values) // len(z)
    return [values[p] for p in place]


def label_column(rng, z, y, table, spec, i, values):
    """The value of the row's class."""
    return [values[c] for c in y]


def code_column(rng, z, y, table, spec, i, pattern, length):
    """Distinct names: a random code of letters and digits put in the pattern."""
    names = set()
    while len(names) < len(z):
        names.add("".join(rng.choice(LETTERS, length)))
    return [pattern.format(name) for name in sorted(names, key=lambda s: zlib.crc32(s.encode()))]


def revealed_column(rng, z, y, table, spec, i, share, otherwise):
    """A name that only rows of the last class have, and only a share of them: the leak."""
    names = code_column(rng, z, y, table, spec, i, "{}", 8)
    known = (y == max(y)) & (rng.random(len(z)) < share)
    return [name if k else otherwise for name, k in zip(names, known)]


def list_column(rng, z, y, table, spec, i, count):
    """Lists of distinct words, as many as the column `count` says (at most all of them)."""
    return [rng.permutation(COMMON)[:c].tolist() for c in table[count]]


def text_column(rng, z, y, table, spec, i, length, factors=(), rate=0.1, sharp=1.0, longer=None,
                form="{}"):
    """Texts of about `length` common words, of which a share `rate` comes from the word pools: the
    pool is drawn by the softmax of the factors (one factor: two pools, for and against it)."""
    counts = length * np.exp(0.5 * factor(rng, z, longer))
    counts = np.clip(counts, 1, 8 * length).astype(int)                         # (n,)
    row = np.repeat(np.arange(len(z)), counts)
    weight = 1 / (np.arange(len(COMMON)) + 3)                                   # Zipf-like
    words = rng.choice(np.array(COMMON, object), len(row), p=weight / weight.sum())
    if factors:
        lean = z[:, factors] if len(factors) > 1 else np.hstack([z[:, factors], -z[:, factors]])
        odds = np.exp(sharp * lean)
        edges = (odds / odds.sum(axis=1, keepdims=True)).cumsum(axis=1)         # (n, pools)
        pool = np.minimum((rng.random((len(row), 1)) > edges[row]).sum(axis=1), lean.shape[1] - 1)
        pools = [pool_words.split() for pool_words in spec["words"]]
        pools = np.array([p[:min(map(len, pools))] for p in pools], object)     # (pools, words)
        special = rng.random(len(row)) < rate
        words[special] = pools[pool, rng.integers(pools.shape[1], size=len(row))][special]
    parts = np.split(words, np.cumsum(counts)[:-1])
    return [form.format(" ".join(part).capitalize()) for part in parts]


COLUMNS = {"count": count_column, "real": real_column, "skew": skew_column, "more": more_column,
           "pick": pick_column, "label": label_column, "code": code_column, "list": list_column,
           "revealed": revealed_column, "text": text_column,
           "same": lambda rng, z, y, table, spec, i, other: table[other]}
DRAWINGS = {}


# --------------------------------------------------------------------------------------------------
# §8 Command line
# --------------------------------------------------------------------------------------------------

def score_report(task, file, data_dir):
    """The JSON object of `score`: score, validity, reason, medals, the paper's numbers."""
    if not Path(file).is_file():
        raise DataError(f"no such file: {file}")
    lacking, standin = missing_files(task, data_dir), is_standin(task, data_dir)
    if lacking:
        raise DataError(f"{task['name']} is not prepared (no {lacking[0]}); run grade.py prepare or "
                        "standin first, or give --data-dir")
    report = {"task": task["name"], "valid": True, "score": None, "reason": None,
              "metric": task["metric"], "higher_is_better": task["higher_is_better"],
              "standin": standin, "medal": None, "above_median": None}
    try:
        score = grade(task, file, paths(task, data_dir)[1] / task["answers"])
        report["score"] = round(score, 5)
        if not standin:                 # a score on imitation data compares with nothing
            report.update(medal=medal(task, score), above_median=above_median(task, score))
    except InvalidSubmission as error:
        report.update(valid=False, reason=str(error))
    thresholds = {key: task[key] for key in ("gold", "silver", "bronze", "median", "sample_score")}
    return {**report, **thresholds, "paper": task["paper"]}


def run_command(args):
    """Do what the command line asks; returns the exit code. Raises DataError, OSError."""
    if args.command == "score":
        print(json.dumps(score_report(load_task(args.task), args.file, args.data_dir), indent=2))
        return 0
    status = 0
    for name in load_tasks() if args.task == ["all"] else args.task:
        task = load_task(name)
        if args.command == "verify":
            states = verify(task, args.data_dir)
            for file, state in states:
                print(f"{task['name']}/{file}: {state}")
            if is_standin(task, args.data_dir):
                print(f"{task['name']} is a STAND-IN, not the real data")
            status |= any(state != "ok" for _, state in states)
            continue
        if args.command == "prepare":
            ensure_data(task, args.data_dir, args.raw)
        else:
            publish(task, args.data_dir, seed=args.seed)
        kind = "STAND-IN" if is_standin(task, args.data_dir) else "real data"
        print(f"{task['name']}: {kind} in {paths(task, args.data_dir)[0].parent}")
    return status


def main(argv=None):
    """Exit code 0; verify: 1 where a file differs; 2 with one line on stderr for any error."""
    parser = argparse.ArgumentParser(prog="grade.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("prepare", "raw Kaggle files (or a download) to prepared data"),
                       ("verify", "compare md5s with MLE-bench's"),
                       ("standin", "generate imitation data"), ("score", "grade a submission")):
        command = commands.add_parser(name, help=text)
        command.add_argument("task", nargs=None if name == "score" else "+",
                             help="task name, path of a task .json file" + " or all" * (
                                 name != "score"))
        if name == "score":
            command.add_argument("file", help="the submission, a .csv file")
        command.add_argument("--data-dir", default="data", help="holds <task>/prepared")
        if name == "prepare":
            command.add_argument("--raw", help="Kaggle's files, or one such folder per task")
        if name == "standin":
            command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        return run_command(args)
    except DataError as error:
        print(f"grade.py: {error}", file=sys.stderr)
    except OSError as error:
        print(f"grade.py: {error.filename or 'disk'}: {error.strerror or error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
