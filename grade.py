"""Twelve Kaggle tasks, prepared and graded as MLE-bench does it (openai/mle-bench 783b15a).

    python grade.py prepare TASK... --raw DIR --data-dir DIR     Kaggle's raw files -> prepared data
    python grade.py verify TASK... --data-dir DIR                md5 of every prepared table
    python grade.py score TASK submission.csv --data-dir DIR     one JSON object
    python grade.py standin TASK... --data-dir DIR               imitation data of the same schema

What a task is stands in tasks.json: files, split, validity rules, metric, medals, stand-in recipe.
Layout: DIR/<task>/prepared/{public,private}; an existing MLE-bench cache works and is not changed.

Contents: §1 tasks, §2 metrics, §3 validity and grading, §4 medals, §5 getting data,
§6 command line. How files are made, real and imitation, stands in prepare.py.

DEVIATION: a NaN score (constant predictions under Pearson's r) is invalid here, a file that cannot
be parsed is invalid instead of an error, and oversized files are refused unread.
"""
from __future__ import annotations

import argparse
import csv
import difflib
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import prepare
from prepare import DataError, one_line, read_csv

TASKS_FILE = Path(__file__).with_name("tasks.json")
MAX_BYTES = 128 << 20  # a larger submission is refused unread; the largest honest one is ~60 MB
MAX_COLUMNS = 10_000  # a wider table is refused before pandas builds its columns
HEAD_CHARS = 1 << 20  # header and first row must end within this many bytes


class InvalidSubmission(ValueError):
    """The submission is refused; the text is a reason a person understands."""


# --------------------------------------------------------------------------------------------------
# §1 Tasks
# --------------------------------------------------------------------------------------------------
def load_tasks():
    """All records of tasks.json, {name: record}, each with its own "name"."""
    tasks = json.loads(TASKS_FILE.read_text(encoding="utf-8"))
    for name, task in tasks.items():  # "margin[1-64]" in a column list stands for 64 names
        task["numeric"] = [c for pattern in task["numeric"] for c in prepare.expand(pattern)]
        task["name"] = name
    return tasks


def load_task(name):
    """One record by name, or from a user's own file (a path that ends in .json). DataError."""
    if str(name).endswith(".json"):
        return load_own_task(Path(name))
    tasks = load_tasks()
    if name in tasks:
        return tasks[name]
    near = [t for t in tasks if len(str(name)) > 2 and str(name).lower() in t]
    near = near or difflib.get_close_matches(str(name), tasks, n=3, cutoff=0.6)
    raise DataError(f"unknown task {str(name)!r}; " + (f"did you mean {' or '.join(near)}?" if near
                    else f"known: {', '.join(tasks)}, or the path of a task .json file"))


def load_own_task(path):
    """A user's task: goal, metric, id and targets are needed, the rest has obvious values.

    "data" names a folder, relative to the file, that holds public/ and private/. DataError."""
    try:
        task = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"cannot read the task file {path}: {one_line(error)}") from error
    missing = [key for key in ("goal", "metric", "id", "targets") if not task.get(key)]
    if missing or not isinstance(task["targets"], list):
        raise DataError(f"the task file {path} lacks {missing[0] if missing else 'a target list'}")
    metric = task["metric"]
    if metric not in METRICS:
        raise DataError(f"{path}: unknown metric {metric!r}; known: {', '.join(METRICS)}")
    default = {"name": path.stem if path.stem != "task" else path.resolve().parent.name,
               "metric_text": metric.replace("_", " "), "higher_is_better": METRICS[metric][1],
               "rules": METRICS[metric][2], "text": [], "numeric": [], "leaks": [],
               "train": "train.csv", "test": "test.csv", "sample": "sample_submission.csv",
               "answers": "answers.csv", "prepare": {}, "paper": {}, "md5": {},
               **dict.fromkeys(("gold", "silver", "bronze", "median", "sample_score"))}
    own = default | task
    for key, value in default.items():
        if value is not None and not isinstance(own[key], type(value)):
            raise DataError(f"{path}: {key!r} must be a {type(value).__name__}")
    if not re.fullmatch(r"\w[\w.-]*", own["name"]):
        raise DataError(f"{path}: the name {own['name']!r} is not a plain folder name")
    own["prepare"] = {"raw": "train.csv", "test": 0.2, "sample": 0} | own["prepare"]
    if "data" in own:
        own["data"] = str(path.resolve().parent / str(own["data"]))
    return own


def paths(task, data_dir):
    """(public, private) folders of a task given by name or record."""
    task = task if isinstance(task, dict) else load_task(task)
    home = Path(task["data"]) if "data" in task else Path(data_dir) / task["name"] / "prepared"
    return home / "public", home / "private"


# --------------------------------------------------------------------------------------------------
# §2 Metrics: pure functions of two (n,) arrays, truth first; log_loss takes (n, classes)
# --------------------------------------------------------------------------------------------------
def roc_auc(truth, score):
    """P(a positive scores above a negative), ties count half, from average ranks. truth: 0/1."""
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # (n,) average 1-based ranks
    positive = truth.astype(bool)
    p, n = int(positive.sum()), int((~positive).sum())
    return (ranks[positive].sum() - p * (p + 1) / 2) / (p * n)


def quadratic_kappa(truth, labels):
    """1 - sum(w O) / sum(w E), w the squared difference of the categories' ranks.

    A rank is a place in the sorted union of the values that occur, not the value. Both sums are
    moments of the ranks; in integers, so that constant predictions give exactly 0."""
    categories = np.unique(np.concatenate([truth, labels]))
    a, b = (np.searchsorted(categories, x).astype(np.int64) for x in (truth, labels))
    observed = len(a) * int(((a - b) ** 2).sum())
    expected = len(a) * int((a * a).sum() + (b * b).sum()) - 2 * int(a.sum()) * int(b.sum())
    return 1.0 - observed / expected if expected else float("nan")


def word_jaccard(truth, given):
    """Mean over rows of |A n B| / |A u B|, the sets of lower-cased words of the two texts."""
    total = 0.0
    for wanted, text in zip(truth, given):
        a, b = set(wanted.lower().split()), set(text.lower().split())
        if not a and not b:  # 0 / 0 in MLE-bench, which refuses the whole submission for it
            raise InvalidSubmission("a row has no words where the answer has none either")
        total += len(a & b) / len(a | b)
    return total / len(truth)


def accuracy(truth, labels):
    """Share of equal labels."""
    return float(np.mean(truth == labels))


def pearson(truth, values):
    """Pearson's r, NaN where a side is constant. Scaled first, so that 1e300 does not overflow."""
    if (values == values[0]).all() or (truth == truth[0]).all():
        return float("nan")
    x, y = (v - v.mean() for v in (truth.astype(float), values.astype(float)))
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def log_loss(truth, probabilities):
    """Mean of -log p(true class), p clipped to [eps, 1 - eps] and not renormalised."""
    eps = np.finfo(np.float64).eps
    clipped = np.clip(probabilities.astype(float), eps, 1 - eps)
    return float(-(truth * np.log(clipped)).sum(axis=1).mean())


def rmsle(truth, values):
    """Root mean square of the differences of log(1 + x)."""
    return float(np.sqrt(np.mean((np.log1p(values) - np.log1p(truth)) ** 2)))


# Name -> function, whether higher is better, and the rules of a user's task that states none.
METRICS = {"roc_auc": (roc_auc, True, {"range": [0, 1]}),
           "quadratic_kappa": (quadratic_kappa, True, {"integral": True}),
           "word_jaccard": (word_jaccard, True, {}), "accuracy": (accuracy, True, {"text": True}),
           "pearson": (pearson, True, {}), "rmsle": (rmsle, False, {"range": [0, None]}),
           "log_loss": (log_loss, False, {"range": [0, 1], "row_sum": "close"})}


# --------------------------------------------------------------------------------------------------
# §3 Validity and grading
# --------------------------------------------------------------------------------------------------
def grade(task, submission, answers, rows=None):
    """Raw score in the metric's own direction, not rounded, under MLE-bench's validity rules.

    task: name or record; submission: path of a .csv, DataFrame, bytes or binary file; answers: path
    or DataFrame; rows: bool mask over the answers' rows, the metric is taken on these (validity is
    checked on all). Raises InvalidSubmission for any fault of the submission, DataError for ours.
    """
    task = task if isinstance(task, dict) else load_task(task)
    truth = read_answers(task, answers)
    keep = np.ones(len(truth), bool) if rows is None else np.asarray(rows, bool)
    wanted = truth_values(task, truth, keep)
    try:
        table = align(task, read_submission(submission, len(truth)), truth)
        given = {c: v[keep] for c, v in submission_values(task, table).items()}
        with np.errstate(all="ignore"):
            score = measure(task, wanted, given)
    except InvalidSubmission:
        raise
    except Exception as error:  # MLE-bench, too, takes any error of its grader for "invalid"
        kind = type(error).__name__
        raise InvalidSubmission(f"cannot be graded: {kind}: {one_line(error)}") from error
    if not np.isfinite(score):  # DEVIATION: MLE-bench accepts NaN as a valid score, without medal
        raise InvalidSubmission("the score is not a number (are the predictions all the same?)")
    return float(score)


def measure(task, truth, given):
    """The metric on {target: (n,) array}: the mean over targets, log-loss over the whole table."""
    metric, targets = METRICS[task["metric"]][0], task["targets"]
    if metric is log_loss:
        return log_loss(*(np.column_stack([side[c] for c in targets]) for side in (truth, given)))
    return np.mean([metric(truth[c], given[c]) for c in targets])


def read_answers(task, answers):
    """DataFrame of the id and target columns in file order. Raises DataError."""
    columns = tuple(dict.fromkeys([task["id"], *task["targets"]]))
    try:
        if not isinstance(answers, pd.DataFrame):
            stat = os.stat(answers)
            answers = answers_file(os.fspath(answers), columns, stat.st_mtime_ns, stat.st_size)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the answers: {one_line(error)}; prepare the data") from error
    missing = [c for c in columns if c not in answers.columns]
    if missing or not len(answers):
        raise DataError(f"the answers {'lack ' + missing[0] if missing else 'have no rows'}")
    return answers[list(columns)]


@functools.lru_cache(maxsize=32)
def answers_file(path, columns, mtime_ns, size):
    """Parsed answers, kept while the file does not change: grading is done once per program."""
    return read_csv(path, usecols=lambda c: c in columns)


def truth_values(task, truth, keep):
    """{target: array} of the answers on the rows of the mask keep. DataError where undefined."""
    if keep.shape != (len(truth),) or not keep.any():
        raise DataError(f"rows must be a mask over the {len(truth)} answers, not all false")
    values = {c: texts(truth[c]) if task["metric"] == "word_jaccard" else truth[c].to_numpy()
              for c in task["targets"]}
    values = {c: v[keep] for c, v in values.items()}
    if task["metric"] == "roc_auc" and any(len(np.unique(v)) != 2 for v in values.values()):
        raise DataError("ROC AUC needs answers of both classes")
    return values


def read_submission(submission, n):
    """DataFrame of at most n + 1 rows (one too many proves a wrong count). InvalidSubmission."""
    if isinstance(submission, pd.DataFrame):
        return submission
    if isinstance(submission, (str, os.PathLike)):
        path = Path(submission)
        if path.suffix.lower() != ".csv" or not path.is_file():
            raise InvalidSubmission(f"there is no .csv file at {path}")
        with open(path, "rb") as file:
            submission = file.read(MAX_BYTES + 1)
    data = submission if isinstance(submission, bytes) else submission.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES or not data.strip():
        size = f"larger than {MAX_BYTES >> 20} MiB" if data.strip() else "empty"
        raise InvalidSubmission(f"the file is {size}")
    try:
        check_width(data)
        return read_csv(io.BytesIO(data), nrows=n + 1)
    except UnicodeDecodeError as error:
        raise InvalidSubmission("the file is not UTF-8 text") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, csv.Error) as error:
        raise InvalidSubmission(f"the file is not a CSV table: {one_line(error)}") from error


def check_width(data):
    """Refuse an absurdly wide table. The header and the first row both count: a first row wider
    than the header would turn its surplus into an index of as many levels."""
    head = data[:HEAD_CHARS].decode("utf-8-sig", errors="replace")
    records = (record for record in csv.reader(io.StringIO(head, newline="")) if record)
    first = [next(records, None), next(records, None)]
    if any(record and len(record) > MAX_COLUMNS for record in first):
        raise InvalidSubmission(f"the table has more than {MAX_COLUMNS} columns")
    if len(data) > HEAD_CHARS and next(records, None) is None:
        raise InvalidSubmission("the header or the first row is too long")


def align(task, table, truth):
    """The submission's target columns in the answers' row order. Raises InvalidSubmission."""
    rules, key, names = task["rules"], task["id"], [task["id"], *task["targets"]]
    by_position = rules.get("align") == "position"
    for c in task["targets"] if by_position else names:
        if list(table.columns).count(c) != 1:
            raise InvalidSubmission(f"the submission needs one column {c!r}")
    extra = [str(c) for c in table.columns if c not in names]
    if extra and rules.get("columns") in ("exact", "exact, id first"):
        raise InvalidSubmission(f"the submission has the extra column {extra[0][:50]!r}")
    if rules.get("columns") == "exact, id first" and table.columns[0] != key:
        raise InvalidSubmission(f"the first column must be {key!r}")
    if len(table) != len(truth):
        more = "or more " * (len(table) == len(truth) + 1)
        raise InvalidSubmission(f"{len(table)} {more}rows where {len(truth)} are needed")
    if by_position:
        return table[task["targets"]]
    ids, wanted = table[key].to_numpy(), truth[key].to_numpy()
    if table[key].isna().any() or (ids.dtype == object) != (wanted.dtype == object):
        raise InvalidSubmission(f"{key!r} has missing values, or values of the wrong type")
    # Sorted beside sorted, as in MLE-bench; stable, so that repeated keys keep their order.
    order, place = np.argsort(ids, kind="stable"), np.argsort(wanted, kind="stable")
    wrong = np.flatnonzero(ids[order] != wanted[place])
    if len(wrong):
        example = str(ids[order[wrong[0]]])[:50]
        raise InvalidSubmission(f"the values of {key!r} are not the test set's, see {example!r}")
    back = np.empty_like(order)
    back[place] = order
    return table[task["targets"]].iloc[back]


def submission_values(task, table):
    """{target: (n,) array} after the task's validity rules. Raises InvalidSubmission."""
    if task["metric"] == "word_jaccard":
        return {c: texts(table[c]) for c in table}
    values = {c: numbers(table[c], task["rules"]) for c in table}
    if "row_sum" in task["rules"]:
        sums = np.sum([v.astype(float) for v in values.values()], axis=0)
        # "round": to 6 decimals, as for lmsys; "close": numpy's isclose with its default rtol.
        rounded = task["rules"]["row_sum"] == "round"
        right = np.round(sums, 6) == 1 if rounded else np.isclose(sums, 1, atol=1e-6)
        if not right.all():
            raise InvalidSubmission(f"the probabilities of a row add up to {sums[~right][0]:.9g}")
    return values


def texts(column):
    """(n,) strings; a missing value is the empty string."""
    return np.array([str(v) for v in column.astype(object).where(column.notna(), "")], object)


def numbers(column, rules):
    """(n,) numbers of one target column under the task's rules. Raises InvalidSubmission."""
    name = repr(column.name)
    if column.isna().any():
        raise InvalidSubmission(f"the column {name} has missing values")
    if not pd.api.types.is_numeric_dtype(column):  # columns of True and False count as numeric
        if rules.get("text"):  # as in scikit-learn 1.5.1, where text equals no number: score 0.0
            return texts(column)
        raise InvalidSubmission(f"the column {name} must be numeric")
    values = column.to_numpy()
    low, high = rules.get("range", (-np.inf, np.inf))
    if values.min() < low or values.max() > (np.inf if high is None else high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidSubmission(f"the values of {name} must be {limits}")
    if not np.isfinite(values).all():
        raise InvalidSubmission(f"the column {name} has infinite values")
    if rules.get("integral") and values.dtype.kind == "f":
        if (np.abs(values) >= 2.0**63).any() or (values != np.floor(values)).any():
            raise InvalidSubmission(f"the values of {name} must be whole numbers")
    return values


# --------------------------------------------------------------------------------------------------
# §4 Medals
# --------------------------------------------------------------------------------------------------
def lead(task, score, threshold):
    """By how much the score, rounded to 5 decimals as in MLE-bench, is better than a threshold."""
    return (round(score, 5) - threshold) * (1 if task["higher_is_better"] else -1)


def medal(task, score):
    """"gold", "silver", "bronze" or None by the private leaderboard's thresholds."""
    task = task if isinstance(task, dict) else load_task(task)
    return next((name for name in ("gold", "silver", "bronze")
                 if task[name] is not None and lead(task, score, task[name]) >= 0), None)


def above_median(task, score):
    """Strictly better than the median of the private leaderboard?"""
    task = task if isinstance(task, dict) else load_task(task)
    return task["median"] is not None and lead(task, score, task["median"]) > 0


# --------------------------------------------------------------------------------------------------
# §5 Getting data: what is prepared, else raw files, else Kaggle, else a stand-in
# --------------------------------------------------------------------------------------------------
def is_standin(task, data_dir):
    """Is the prepared data an imitation? The file prepared/STANDIN marks it."""
    return (paths(task, data_dir)[0].parent / "STANDIN").is_file()


def missing_files(task, data_dir):
    """The tables of the prepared task that are not there."""
    public, private = paths(task, data_dir)
    wanted = [public / task["train"], public / task["test"], public / task["sample"],
              private / task["answers"]]
    return [path for path in wanted if not path.is_file()]


def ensure_data(task, data_dir, raw=None, imitate=True):
    """Make sure that the task's prepared data exists; returns whether it is a stand-in.

    What is prepared is used as it is. Otherwise it is made from raw (a folder, or one per task),
    from the raw folder of an MLE-bench cache, or from Kaggle where a token is set up; else it is
    imitated, unless imitate is false. Several processes may call it at once. DataError."""
    task = task if isinstance(task, dict) else load_task(task)
    missing, home = missing_files(task, data_dir), Path(data_dir) / task["name"]
    standin = is_standin(task, data_dir)
    if not missing and not (standin and (raw or not imitate)):
        return standin
    if "data" in task:
        raise DataError(f"{task['name']}: there is no {missing[0]}, see \"data\" in its task file")
    if raw is not None:
        raw = Path(raw) / task["name"] if (Path(raw) / task["name"]).is_dir() else Path(raw)
        if not raw.is_dir():
            raise DataError(f"there is no folder of raw files {raw}")
    elif prepare.filled(home / "raw"):
        raw = home / "raw"
    elif task["md5"] and (prepare.has_credentials() or (home / f"{task['name']}.zip").is_file()):
        with prepare.locked(home):
            raw = prepare.download(task, home)
    elif not imitate:
        raise DataError(f"no raw files of {task['name']}: give --raw DIR or set up Kaggle's token, "
                        "or make imitation data with: grade.py standin")
    publish(task, data_dir, raw)
    return is_standin(task, data_dir)


def publish(task, data_dir, raw=None, seed=0):
    """Build prepared/ aside and rename it into place; without raw, a stand-in drawn from seed.

    What an interrupted run left aside is removed, what is there already is kept; only a stand-in
    gives way to real data. Raises DataError."""
    home = Path(data_dir) / task["name"]
    final, temp = home / "prepared", home / ".unfinished"
    with prepare.locked(home):
        missing, standin = missing_files(task, data_dir), is_standin(task, data_dir)
        if not missing and not (raw and standin):
            return
        if prepare.filled(final) and not standin:
            raise DataError(f"{final} has no {missing[0].name}: complete it or move it away")
        if raw is None and "standin" not in task:
            raise DataError(f"{task['name']} has no data: give its raw files to grade.py prepare")
        shutil.rmtree(temp, ignore_errors=True)
        try:
            (temp / "prepared").mkdir(parents=True)
            if raw is None:
                task = prepare.make_raw(task, temp / "raw", seed)
                text = f"Imitation data, seed {seed}: not comparable with anything.\n"
                (temp / "prepared" / "STANDIN").write_text(text, encoding="utf-8")
            elif (raw / f"{task['name']}.zip").is_file():  # the download, not extracted
                prepare.unpack(raw / f"{task['name']}.zip", temp / "raw")
                raw = temp / "raw"
            prepare.build(task, raw or temp / "raw", temp / "prepared", temp)
            if final.is_dir():
                final.rename(temp / "replaced")
            (temp / "prepared").rename(final)
        finally:
            shutil.rmtree(temp, ignore_errors=True)


def verify(task, data_dir):
    """[(file, "ok" | "differs" | "missing")] of the prepared tables against MLE-bench's md5s."""
    base, result = paths(task, data_dir)[0].parent, []
    for name, wanted in task["md5"].items():
        state = "missing"
        if (base / name).is_file():
            with open(base / name, "rb") as file:
                found = hashlib.file_digest(file, "md5").hexdigest()
            state = "ok" if found == wanted else "differs"
        result.append((name, state))
    return result


# --------------------------------------------------------------------------------------------------
# §6 Command line
# --------------------------------------------------------------------------------------------------
def score_report(task, file, data_dir):
    """The JSON object of `score`: score, validity, reason, medals, the paper's numbers."""
    missing, standin = missing_files(task, data_dir), is_standin(task, data_dir)
    if missing:
        raise DataError(f"{task['name']} is not prepared: there is no {missing[0]}")
    if not Path(file).is_file():
        raise DataError(f"there is no file {file}")
    report = {"task": task["name"], "metric": task["metric"], "valid": True, "score": None,
              "reason": None, "medal": None, "above_median": None, "standin": standin}
    try:
        score = grade(task, file, paths(task, data_dir)[1] / task["answers"])
        report["score"] = round(score, 5)
        if not standin:  # a score on imitation data compares with nothing
            report.update(medal=medal(task, score), above_median=above_median(task, score))
    except InvalidSubmission as error:
        report.update(valid=False, reason=str(error))
    beside = ("higher_is_better", "gold", "silver", "bronze", "median", "sample_score", "paper")
    return report | {key: task[key] for key in beside}


def run_command(args):
    """Do what the command line asks; returns the exit code. Raises DataError, OSError."""
    if args.command == "score":
        print(json.dumps(score_report(load_task(args.task), args.file, args.data_dir), indent=2))
        return 0
    wrong = 0
    for task in [load_task(name) for name in (load_tasks() if args.task == ["all"] else args.task)]:
        if args.command == "verify":
            for file, state in verify(task, args.data_dir):
                print(f"{task['name']}/{file}: {state}")
                wrong += state != "ok"
        elif args.command == "prepare":
            ensure_data(task, args.data_dir, args.raw, imitate=False)
        else:
            publish(task, args.data_dir, seed=args.seed)
        kind = "STAND-IN, not comparable" if is_standin(task, args.data_dir) else "data"
        print(f"{task['name']}: {kind}, in {paths(task, args.data_dir)[0].parent}", file=sys.stderr)
    return int(wrong > 0)


def main(argv=None):
    """Exit code 0; 1 if verify finds a difference; 2 with one line on stderr for any error."""
    parser = argparse.ArgumentParser(prog="grade.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("prepare", "make prepared data from Kaggle's files"),
                       ("verify", "compare md5s with MLE-bench's"),
                       ("score", "grade a submission"), ("standin", "make imitation data")):
        command = commands.add_parser(name, help=text)
        command.add_argument("task", nargs=None if name == "score" else "+",
                             help="name, or path of a task .json file" + ", or all" * (
                                 name != "score"))
        command.add_argument("--data-dir", default="data", help="holds <task>/prepared")
        if name == "score":
            command.add_argument("file", help="the submission, a .csv file")
        elif name == "prepare":
            command.add_argument("--raw", help="Kaggle's files, or one such folder per task")
        elif name == "standin":
            command.add_argument("--seed", type=int, default=0)
    try:
        return run_command(parser.parse_args(argv))
    except KeyboardInterrupt:
        print("grade.py: interrupted", file=sys.stderr)
    except DataError as error:
        print(f"grade.py: {error}", file=sys.stderr)
    except OSError as error:
        print(f"grade.py: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
