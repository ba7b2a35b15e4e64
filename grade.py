"""Twelve Kaggle tasks, prepared and graded as MLE-bench does it (openai/mle-bench 783b15a).

    python grade.py prepare TASK... --raw DIR --data-dir DIR     Kaggle's raw files -> prepared data
    python grade.py verify TASK... --data-dir DIR                md5 of every prepared table
    python grade.py score TASK submission.csv --data-dir DIR     one JSON object
    python grade.py standin TASK... --data-dir DIR               imitation data of the same schema

TASK: a name in tasks.json (which holds whatever tells tasks apart), your own task's .json file, or
all. Layout: DIR/<task>/prepared/{public,private}; an MLE-bench cache works and is not changed.

DEVIATION: a NaN score (constant predictions under Pearson's r) is invalid here, a file that cannot
be parsed is invalid instead of an error, and oversized files are refused unparsed.
"""
import argparse, contextlib, csv, difflib, hashlib, io, itertools, json, os, re
import shutil, subprocess, sys, tempfile, zlib
from pathlib import Path

import numpy as np
import pandas as pd

MAX_BYTES = 128 << 20  # a larger submission is refused unparsed; the largest honest one is ~60 MB
MAX_COLUMNS = 10_000  # a wider table is refused before pandas builds its columns
HEAD_BYTES = 1 << 20  # header and first row must end within these

class InvalidSubmission(ValueError):
    """The submission is refused; the text is a reason a person understands."""

class DataError(Exception):
    """Our side is at fault (task name, data, answers): one line, what is wrong and what to do."""

@contextlib.contextmanager
def blame(kind, what):
    """Any exception of the block becomes one of the given kind, a line; ours pass as they are."""
    try:
        yield
    except (DataError, InvalidSubmission):
        raise
    except Exception as error:
        text = " ".join(f"{what}: {type(error).__name__}: {error}".split())
        raise kind(text[:400]) from error

def need(condition, reason):
    """InvalidSubmission unless the condition holds."""
    if not condition:
        raise InvalidSubmission(reason)

# §1 Tasks -----------------------------------------------------------------------------------------
def load_tasks():
    """All records of tasks.json, {name: record}, with "name" and "sign": -1 if lower is better."""
    tasks = json.loads(Path(__file__).with_name("tasks.json").read_text(encoding="utf-8"))
    for name, task in tasks.items():
        task.update(name=name, numeric=[c for p in task["numeric"] for c in expand(p)],
                    sign=1 if task["higher_is_better"] else -1)
    return tasks

def expand(pattern):
    """Column names of a pattern: "f_[00-02]" -> f_00, f_01, f_02; a plain name stays alone."""
    found = re.fullmatch(r"(.*)\[(\d+)-(\d+)\](.*)", pattern)
    if not found:
        return [pattern]
    head, first, last, tail = found.groups()
    return [f"{head}{k:0{len(first)}d}{tail}" for k in range(int(first), int(last) + 1)]

def load_task(name):
    """A record by name, or a user's task from a .json file, which needs goal, metric, id, targets;
    the rest has obvious values. A record stays as it is. Raises DataError."""
    if isinstance(name, dict):
        return name
    name, tasks = str(name), load_tasks()
    if name in tasks:
        return tasks[name]
    if not name.endswith(".json"):
        near = [t for t in tasks if name.lower() in t] or difflib.get_close_matches(name, tasks)
        raise DataError(f"unknown task {name!r}: give {', '.join(near or tasks)}, or a .json file")
    with blame(DataError, f"{name} is no task file (a JSON object with goal, id, a list of targets "
                          f"and a metric of {', '.join(METRICS)})"):
        own = json.loads(Path(name).read_text(encoding="utf-8"))
        if not (own["goal"] and own["id"] and own["targets"] and isinstance(own["targets"], list)):
            raise ValueError("goal, id or targets")
        _, higher_is_better, rules = METRICS[own["metric"]]
        task = {"metric_text": own["metric"].replace("_", " "), "train": "train.csv",
                "test": "test.csv", "sample": "sample_submission.csv", "answers": "answers.csv",
                "higher_is_better": higher_is_better, "rules": rules, "text": [], "numeric": [],
                "leaks": [], "paper": {}, "md5": {},
                **dict.fromkeys(("gold", "silver", "bronze", "median", "sample_score")), **own}
        plan = {"raw": "train.csv", "test": 0.2, "sample": 0, **own.get("prepare", {})}
        task.update(name=Path(name).stem, prepare=plan, sign=1 if task["higher_is_better"] else -1)
    return task

def paths(task, data_dir):
    """(public, private) folders of a task given by name or record."""
    home = Path(data_dir) / load_task(task)["name"] / "prepared"
    return home / "public", home / "private"

# §2 Metrics: pure functions of two (n,) arrays, truth first; log_loss takes (n, classes) ----------
def roc_auc(truth, score):
    """P(a positive scores above a negative), ties count half, from average ranks. truth: 0/1."""
    ranks, positive = pd.Series(score).rank().to_numpy(), truth.astype(bool)
    p, n = positive.sum(), (~positive).sum()
    return (ranks[positive].sum() - p * (p + 1) / 2) / (p * n)

def quadratic_kappa(truth, labels):
    """1 - sum(w O) / sum(w E), w the squared difference of ranks: of places in the sorted union of
    the values that occur. In integers, so that constant predictions give exactly 0."""
    categories = np.unique(np.concatenate([truth, labels]))
    a, b = (np.searchsorted(categories, x).astype(np.int64) for x in (truth, labels))
    observed = len(a) * int(((a - b) ** 2).sum())
    expected = len(a) * int((a * a).sum() + (b * b).sum()) - 2 * int(a.sum()) * int(b.sum())
    return 1.0 - observed / expected if expected else float("nan")

def word_jaccard(truth, given):
    """Mean over rows of |A n B| / |A u B|, the sets of lower-cased words of the two texts. A row
    without words on both sides is a ZeroDivisionError, which refuses the whole submission."""
    pairs = ((set(a.lower().split()), set(b.lower().split())) for a, b in zip(truth, given))
    return np.mean([len(a & b) / len(a | b) for a, b in pairs])

def accuracy(truth, labels):
    """Share of equal labels."""
    return np.mean(truth == labels)

def pearson(truth, values):
    """Pearson's r, NaN where a side is constant. Scaled first, so that 1e300 does not overflow."""
    x, y = (v.astype(float) / np.abs(v.astype(float)).max() for v in (truth, values))
    return float("nan") if (y == y[0]).all() else np.corrcoef(x, y)[0, 1]

def log_loss(truth, probabilities):
    """Mean of -log p(true class), p clipped to [eps, 1 - eps] and not renormalised."""
    eps = np.finfo(np.float64).eps
    clipped = np.clip(probabilities.astype(float), eps, 1 - eps)
    return -(truth * np.log(clipped)).sum(axis=1).mean()

def rmsle(truth, values):
    """Root mean square of the differences of log(1 + x)."""
    return np.sqrt(np.mean((np.log1p(values) - np.log1p(truth)) ** 2))

# Name -> function, whether higher is better, and the rules of a user's task that states none.
METRICS = {"roc_auc": (roc_auc, True, {"range": [0, 1]}),
           "quadratic_kappa": (quadratic_kappa, True, {"integral": True}),
           "word_jaccard": (word_jaccard, True, {}), "accuracy": (accuracy, True, {"text": True}),
           "pearson": (pearson, True, {}), "rmsle": (rmsle, False, {"range": [0, None]}),
           "log_loss": (log_loss, False, {"range": [0, 1], "row_sum": "close"})}

# §3 Validity and grading --------------------------------------------------------------------------
def grade(task, submission, answers, rows=None):
    """Raw score in the metric's own direction, not rounded, under MLE-bench's validity rules.

    task: name or record; submission: path of a .csv, DataFrame, bytes or binary file; answers: path
    or DataFrame; rows: bool mask over the answers' rows: the metric is taken on these, validity is
    checked on all. InvalidSubmission for any fault of the submission, DataError for ours."""
    task = load_task(task)
    truth, as_text = read_answers(task, answers), task["metric"] == "word_jaccard"
    keep = np.ones(len(truth), bool) if rows is None else np.asarray(rows, bool)
    with np.errstate(all="ignore"):
        with blame(DataError, "these answers, or their rows by --report-fold, cannot be graded"):
            wanted = {c: (texts(truth[c]) if as_text else truth[c].to_numpy())[keep]
                      for c in task["targets"]}
            if not np.isfinite(measure(task, wanted, wanted)):
                raise ValueError("their score against themselves is not a number")
        with blame(InvalidSubmission, "cannot be graded"):  # any error, as in MLE-bench
            table = align(task, read_submission(submission, len(truth)), truth)
            given = {c: texts(table[c]) if as_text else numbers(table[c], task["rules"])
                     for c in task["targets"]}
            if "row_sum" in task["rules"]:
                check_sums(given, task["rules"]["row_sum"])
            score = measure(task, wanted, {c: v[keep] for c, v in given.items()})
    need(np.isfinite(score), "the score is not a number (are the predictions all the same?)")
    return float(score)

def measure(task, truth, given):
    """The metric on {target: (n,) array}: the mean over targets, log-loss over the whole table."""
    metric, targets = METRICS[task["metric"]][0], task["targets"]
    if metric is log_loss:
        return log_loss(*(np.column_stack([side[c] for c in targets]) for side in (truth, given)))
    return np.mean([metric(truth[c], given[c]) for c in targets])

def read_csv(source, **options):
    """pandas as MLE-bench calls it. One pass over whole columns: no chunk-wise guess of a type."""
    if int(pd.__version__.split(".")[0]) < 3:  # exact parsing of floats is the default from 3 on
        options["float_precision"] = "round_trip"
    return pd.read_csv(source, low_memory=False, **options)

def read_answers(task, answers):
    """DataFrame of the id and target columns in file order. Raises DataError."""
    columns = list(dict.fromkeys([task["id"], *task["targets"]]))
    with blame(DataError, "cannot read the answers (is the task prepared?)"):
        given = isinstance(answers, pd.DataFrame)
        return (answers if given else read_csv(answers, usecols=columns))[columns]

def read_submission(submission, n):
    """DataFrame of at most n + 1 rows (one too many proves a wrong count). InvalidSubmission."""
    if isinstance(submission, pd.DataFrame):
        return submission
    if isinstance(submission, (str, os.PathLike)):
        path = Path(submission)
        need(path.suffix.lower() == ".csv" and path.is_file(), f"there is no .csv file at {path}")
        with open(path, "rb") as file:
            submission = file.read(MAX_BYTES + 1)
    data = submission if isinstance(submission, bytes) else submission.read(MAX_BYTES + 1)
    need(data.strip() and len(data) <= MAX_BYTES, f"the file is empty or over {MAX_BYTES} bytes")
    # Header and first row both count: a first row wider than the header would turn its surplus
    # into an index of as many levels. A third record proves that the first two were seen whole.
    head = io.StringIO(data[:HEAD_BYTES].decode("utf-8-sig", errors="replace"), newline="")
    records = list(itertools.islice(filter(None, csv.reader(head)), 3))
    narrow = all(len(record) <= MAX_COLUMNS for record in records[:2])
    need(narrow and (len(records) == 3 or len(data) <= HEAD_BYTES), "there are too many columns")
    with blame(InvalidSubmission, "the file is not a CSV table in UTF-8"):
        return read_csv(io.BytesIO(data), nrows=n + 1)

def align(task, table, truth):
    """The submission's target columns in the answers' row order. Raises InvalidSubmission."""
    rules, key, names = task["rules"], task["id"], [task["id"], *task["targets"]]
    by_position = rules.get("align") == "position"
    for c in task["targets"] if by_position else names:
        need(list(table.columns).count(c) == 1, f"the submission needs one column {c!r}")
    if "columns" in rules:  # exactly these
        extra = [str(c)[:50] for c in table.columns if c not in names]
        need(not extra, f"the submission has the extra columns {extra[:3]}")
        need(table.columns[0] == key or rules["columns"] != "exact, id first",
             f"the first column must be {key!r}")
    need(len(table) == len(truth), f"the submission needs {len(truth)} rows")
    if by_position:
        return table[task["targets"]]
    ids, wanted = table[key].to_numpy(), truth[key].to_numpy()
    need(not table[key].isna().any() and (ids.dtype == object) == (wanted.dtype == object),
         f"{key!r} has missing values, or values of the wrong type")
    # Sorted beside sorted, as in MLE-bench; stable, so that repeated keys keep their order.
    order, place = np.argsort(ids, kind="stable"), np.argsort(wanted, kind="stable")
    wrong = ids[order][ids[order] != wanted[place]]
    need(not len(wrong), f"the values of {key!r} are not the test set's, see {str(wrong[:1])[:50]}")
    return table[task["targets"]].iloc[order[np.argsort(place)]]

def check_sums(values, rule):
    """Rows add up to 1: "round", to 6 decimals; "close", by numpy's isclose with default rtol."""
    sums = np.sum([v.astype(float) for v in values.values()], axis=0)
    right = np.round(sums, 6) == 1 if rule == "round" else np.isclose(sums, 1, atol=1e-6)
    need(right.all(), f"the probabilities of a row add up to {sums[np.argmin(right)]:.9g}")

def texts(column):
    """(n,) strings; a missing value is the empty string."""
    return np.array([str(v) for v in column.astype(object).where(column.notna(), "")], object)

def numbers(column, rules):
    """(n,) numbers of one target column under the task's rules. Raises InvalidSubmission."""
    name, numeric = repr(column.name), pd.api.types.is_numeric_dtype(column)  # so are True, False
    need(not column.isna().any(), f"the column {name} has missing values")
    if not numeric and rules.get("text"):  # as in scikit-learn 1.5.1, where text equals no number
        return texts(column)
    need(numeric, f"the column {name} must be numeric")
    values, (low, high) = column.to_numpy(), rules.get("range", (None, None))
    need(low is None or values.min() >= low, f"the values of {name} must be at least {low}")
    need(high is None or values.max() <= high, f"the values of {name} must be at most {high}")
    need(np.isfinite(values).all(), f"the column {name} has infinite values")
    if rules.get("integral") and values.dtype.kind == "f":
        need((np.abs(values) < 2.0**63).all() and (values == np.floor(values)).all(),
             f"the values of {name} must be whole numbers")
    return values

# §4 Medals ----------------------------------------------------------------------------------------
def lead(task, score, name):
    """By how much the score, rounded to 5 decimals as in MLE-bench, is better than a threshold."""
    return -1 if task[name] is None else task["sign"] * (round(score, 5) - task[name])

def best(task, scores):
    """The best of a list of scores, None if there is none."""
    return max((s for s in scores if s is not None), key=lambda s: task["sign"] * s, default=None)

def medal(task, score):
    """"gold", "silver", "bronze" or None by the private leaderboard's thresholds."""
    return next((m for m in ("gold", "silver", "bronze") if lead(task, score, m) >= 0), None)

# §5 Preparation: raw files to public and private --------------------------------------------------
def build(task, raw, out, temp):
    """Write out/public and out/private from the folder raw as task["prepare"] says; temp takes what
    zips hold. Raises DataError."""
    plan, public, private = task["prepare"], out / "public", out / "private"
    for folder in ("public", "private", *plan.get("folders", ())):
        (out / folder).mkdir(0o777 if folder[:6] == "public" else 0o700, parents=True)
    train, test = (renumber(task, part, rows, raw, public, temp)
                   for part, rows in zip(("train", "test"), split(task, raw, temp)))
    labels, answers = task["targets"], list(test)
    if "one_hot" in plan:  # the answers have one 0/1 column per class
        classes = pd.get_dummies(test[plan["one_hot"]], dtype=int)
        test = test.join(classes.reindex(columns=labels, fill_value=0))
        labels, answers = [plan["one_hot"], *labels], [task["id"], *labels]
    write_table(train, public / task["train"])
    write_table(test[plan.get("answers", answers)], private / task["answers"])
    columns = plan.get("test_columns", [c for c in test if c not in labels])
    write_table(test[columns], public / task["test"])
    if "gold" in plan:
        write_table(test[plan["gold"]], private / "gold_submission.csv")
    values = plan["sample"] if isinstance(plan["sample"], list) else [plan["sample"]] * len(labels)
    if isinstance(plan["sample"], dict):
        low, high, seed = plan["sample"]["randint"]
        values = [np.random.RandomState(seed).randint(low, high, len(test))]
    sample = test.assign(**dict(zip(task["targets"], values)))
    columns = plan.get("sample_columns", [task["id"], *task["targets"]])
    write_table(sample[columns], public / task["sample"])
    for target, source in plan.get("copies", {}).items():  # byte for byte, not as pandas writes it
        shutil.copyfile(find_raw(raw, source, temp), out / target)
    for name in plan.get("zips", ()):
        shutil.make_archive(str((public / name).with_suffix("")), "zip", public, name)

def split(task, raw, temp):
    """(train, test) tables of the raw files, in permutation order. Raises DataError."""
    plan, table = task["prepare"], read_table(find_raw(raw, task["prepare"]["raw"], temp))
    if "test_file" in plan:  # the organisers' own split
        return table, read_table(find_raw(raw, plan["test_file"], temp))
    from sklearn.model_selection import train_test_split
    return train_test_split(table, test_size=plan["test"], random_state=0)

def renumber(task, part, rows, raw, public, temp):
    """The rows, under new ids where the plan has some, to which files are copied. DataError."""
    plan, ids = task["prepare"], rows[task["id"]]
    if "new_ids" in plan:
        pattern, first = plan["new_ids"][part]
        ids = [pattern.format(k) for k in range(first, first + len(rows))]
    if "files" in plan:
        rule, folder = plan["files"], find_raw(raw, plan["files"]["raw"], temp)
        for old, new in zip(rows[task["id"]], ids):
            target = public / rule[part].format(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            # One nomad folder has two files, and MLE-bench lets the last one win.
            found = sorted(folder.glob(rule["pattern"].format(old)))
            if not found:
                raise DataError(f"no {rule['pattern'].format(old)} in {folder}")
            shutil.copyfile(found[-1], target)
    return rows.assign(**{task["id"]: ids})

def find_raw(raw, name, temp):
    """Path of the raw file or folder: itself, in a folder of its own name (as MLE-bench leaves an
    extracted zip), or in name.zip or stem.zip. Raises DataError."""
    for path in (raw / name / name, raw / name):
        if path.is_file() if "." in name else path.is_dir():
            return path
    for packed in (raw / f"{name}.zip", raw / f"{Path(name).stem}.zip"):
        folder = temp / packed.name
        if packed.is_file() and not folder.exists():
            with blame(DataError, f"{packed} is a damaged zip, download it again"):
                shutil.unpack_archive(packed, folder, "zip")
        if (folder / name).exists():
            return folder / name
    raise DataError(f"no {name} (nor {name}.zip, nor {Path(name).stem}.zip) in {raw}")

def read_table(path):
    """DataFrame of a CSV, or of a JSON list of records (object columns keep values as they are)."""
    with blame(DataError, f"cannot read {path}"):
        if path.suffix == ".json":
            return pd.DataFrame(json.loads(path.read_text(encoding="utf-8")), dtype=object)
        return read_csv(path)

def write_table(table, path):
    """CSV as pandas writes it, booleans as 0/1; or a JSON list with indent 4."""
    if path.suffix == ".json":
        path.write_text(json.dumps(table.to_dict("records"), indent=4), encoding="utf-8")
        return
    table = table.infer_objects()  # a JSON source has object columns
    table.astype(dict.fromkeys(table.select_dtypes(bool), int)).to_csv(path, index=False)

def drop_columns(folder, columns):
    """Remove columns from the tables of a staged copy of a public folder, and delete its zips."""
    for path in sorted(Path(folder).iterdir()) if columns else ():
        if path.suffix in (".csv", ".json"):
            write_table(read_table(path).drop(columns=columns, errors="ignore"), path)
        elif path.suffix == ".zip":
            path.unlink()

# §6 Getting data: what is prepared, else raw files, else Kaggle, else a stand-in ------------------
def is_standin(task, data_dir):
    """Is the prepared data an imitation? The file prepared/STANDIN marks it."""
    return (paths(task, data_dir)[0].parent / "STANDIN").is_file()

def missing_files(task, data_dir):
    """The tables of the prepared task that are not there."""
    public, private = paths(task, data_dir)
    tables = [public / task[key] for key in ("train", "test", "sample")]
    return [path for path in [*tables, private / task["answers"]] if not path.is_file()]

def ensure_data(task, data_dir, raw=None, imitate=True):
    """Make sure that the task's prepared data exists; returns whether it is a stand-in. What exists
    is kept, only a stand-in gives way to real data. DataError, also in place of imitation."""
    task = load_task(task)
    if missing_files(task, data_dir) or is_standin(task, data_dir) and (raw or not imitate):
        with blame(DataError, f"cannot get the data of {task['name']}"):
            raw = raw_folder(task, data_dir, raw)
        if raw is None and not (imitate and "standin" in task):
            raise DataError(f"no raw files of {task['name']}: give --raw DIR or set up Kaggle's "
                            "token; grade.py standin makes imitation data of the known tasks")
        publish(task, data_dir, raw)
    return is_standin(task, data_dir)

def open_task(name, data_dir, raw=None, fold=0.0, seed=0):
    """A record and its data: `standin` (bool), `public` and `private` folder, `truth` (table of
    answers), bool masks over its rows: `rows`, which are rewarded, and `report_rows`, a share
    `fold`, which are reported (both are all rows if it is 0). Raises DataError."""
    task = load_task(name)
    standin, (public, private) = ensure_data(task, data_dir, raw), paths(task, data_dir)
    truth = read_answers(task, private / task["answers"])
    kept = np.random.default_rng(seed).random(len(truth)) < fold
    return task | dict(standin=standin, public=public, private=private, truth=truth, rows=~kept,
                       report_rows=kept if fold else ~kept)

def raw_folder(task, data_dir, raw=None):
    """Where the raw files are: raw, or the task's folder in it; an MLE-bench cache's raw folder;
    that folder filled by Kaggle's own client, where a token is set up; None. Raises DataError."""
    name, home = task["name"], Path(data_dir) / task["name"]
    if raw is not None:
        return Path(raw) / name if (Path(raw) / name).is_dir() else Path(raw)
    token = Path(os.environ.get("KAGGLE_CONFIG_DIR") or Path.home() / ".kaggle") / "kaggle.json"
    known = token.is_file() or {"KAGGLE_USERNAME", "KAGGLE_KEY"} <= {*os.environ}
    if any((home / "raw").glob("*")) or not (task["md5"] and known):
        return home / "raw" if (home / "raw").is_dir() else None
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=home) as temp:
        client = [sys.executable, "-m", "kaggle.cli", "competitions", "download"]
        done = subprocess.run([*client, "-c", name, "-p", temp], capture_output=True, text=True)
        with blame(DataError, f"cannot download {name}: {(done.stdout + done.stderr)[-150:]}; pip "
                   "install kaggle; after a 403, accept the rules by hand, signed in, at "
                   f"https://www.kaggle.com/c/{name}/rules; or: grade.py standin {name}"):
            shutil.unpack_archive(Path(temp, f"{name}.zip"), Path(temp, "raw"))
        with contextlib.suppress(OSError):  # another process may have been first
            Path(temp, "raw").rename(home / "raw")
    return home / "raw"

def publish(task, data_dir, raw=None):
    """Build prepared/ aside and rename it into place; without raw, a stand-in. DataError."""
    final = paths(task, data_dir)[0].parent
    with blame(DataError, f"cannot prepare {task['name']}"):
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=final.parent) as temp:
            new = Path(temp, "new")
            build(task, raw or make_raw(task, Path(temp, "raw")), new, Path(temp))
            if raw is None:
                (new / "STANDIN").write_text("Imitation data: compares with nothing.\n")
            with contextlib.suppress(OSError):  # another process may have been first
                if is_standin(task, data_dir):
                    final.rename(Path(temp, "replaced"))
                new.rename(final)
    for path in missing_files(task, data_dir):
        raise DataError(f"{path} is missing, and {final} in the way: complete it or move it away")

# §7 Stand-ins: raw files of the real schema, drawn from the recipe in tasks.json ------------------
COMMON = np.array("""the to and a of in is it for that you on with my be this was have are but not
they at from as we so if or an can will there what all about one out just up when who how more
their some been like no do time only other into than then now over also after""".split(), object)

class Rows:
    """Rows of an imitated table. Latent factors z ~ N(0, 1) and noise decide the targets; numbers
    and words show the factors, so that a better model can recover more of what decided.
    "signal" lists, per class or target, terms [weight, factor, ...]: a weighted product of factors.
    "shares" cuts the one score into ordered classes of these shares; else the best score wins. For
    the columns, the scores are further factors."""

    def __init__(self, task, seed):
        self.spec, self.targets, self.table = task["standin"], task["targets"], {}
        self.rng = np.random.default_rng([seed, zlib.crc32(task["name"].encode())])
        self.n = self.spec["rows"] + self.spec.get("test_rows", 0)
        z = self.rng.normal(size=(self.n, self.spec["factors"]))
        score = self.spec["noise"] * self.rng.logistic(size=(self.n, len(self.spec["signal"])))
        for c, terms in enumerate(self.spec["signal"]):
            for weight, *factors in terms:
                score[:, c] += weight * z[:, factors].prod(axis=1)
        self.y = score.argmax(axis=1)
        if "shares" in self.spec:
            cuts = np.quantile(score[:, 0], np.cumsum(self.spec["shares"])[:-1])
            self.y = np.searchsorted(cuts, score[:, 0])
        self.z = np.hstack([z, score])

    def column(self, i, kind, *args):
        """Values of the i-th column of a name pattern, a list. k is the factor that it shows (the
        columns of a pattern show k, k + 1, ...); None: noise."""
        match (kind, *args):
            case "real" | "skew", k, centre, spread, digits:  # normal | log-normal
                z = spread * self.factor(k, i)
                values = np.round(centre + z if kind == "real" else centre * np.exp(z), digits)
                return (values if digits else values.astype(int)).tolist()
            case "pick", k, values:  # by even slices of the factor
                place = self.factor(k, i).argsort().argsort() * len(values) // self.n
                return [values[p] for p in place]
            case "label", values:  # the value of the row's class
                return [(values or self.targets)[c] for c in self.y]
            case "name", pattern, first, last:  # distinct random numbers
                drawn = first + self.rng.choice(last - first, self.n, replace=False)
                return [pattern.format(k) for k in drawn.tolist()]
            case "letters", length, alphabet:
                return ["".join(w) for w in self.rng.choice([*alphabet], (self.n, length))]
            case "around", other, length:  # common words before and after another column's text
                parts = zip(self.text(length), self.table[other], self.text(length))
                return [" ".join(part) for part in parts]
            case "text", *rest:
                return self.text(*rest)

    def factor(self, k, i=0):
        """(n,) values of factor k + i; fresh noise for None."""
        return self.rng.normal(size=self.n) if k is None else self.z[:, k + i]

    def text(self, length, rate=0, leans=(), longer=None, form="{}"):
        """Texts of about `length` words, more where the factor `longer` is high. leans: [factor,
        slope] per pool of the recipe's words, which replace common ones at up to `rate`."""
        rng, pools = self.rng, self.spec.get("words", ())
        counts = np.clip(length * np.exp(0.5 * self.factor(longer)), 1, 8 * length).astype(int)
        row = np.repeat(np.arange(self.n), counts)  # (words of all texts,) the text of each
        words = rng.choice(COMMON, len(row))
        for lines, (k, slope) in zip(pools, leans):
            special = rng.random(len(row)) < rate / (1 + np.exp(-slope * self.z[row, k]))
            words[special] = rng.choice(np.array(" ".join(lines).split(), object), special.sum())
        parts = np.split(words, np.cumsum(counts)[:-1])
        return [form.format(" ".join(part)) if form else part.tolist() for part in parts]

def make_raw(task, folder, seed=0):
    """Write a task's imitated raw files to a new folder and return it."""
    rows, plan, spec = Rows(task, seed), task["prepare"], task["standin"]
    for pattern, recipe in spec["columns"].items():
        for i, name in enumerate(expand(pattern)):
            rows.table[name] = rows.column(i, *recipe)
    table = pd.DataFrame({c: pd.Series(v, dtype=object) for c, v in rows.table.items()})
    folder.mkdir(parents=True)
    write_table(table[spec.get("fields", list(table))][:spec["rows"]], folder / plan["raw"])
    if "test_file" in plan:
        write_table(table[spec["rows"]:], folder / plan["test_file"])
    for record, z in zip(table.to_dict("records"), rows.z) if "files" in plan else ():
        pattern = plan["files"]["pattern"].replace("*", "geometry")
        path = folder / plan["files"]["raw"] / pattern.format(record[task["id"]])
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(path, rows.rng, z, record)
    return folder

def draw(path, rng, z, record):
    """A small JPEG with blots in red, green and blue, more of them where factor 0, 1, 2 is high; or
    lattice vectors and atoms in the format of the real geometry files."""
    if path.suffix == ".jpg":
        from PIL import Image  # here, because only the image tasks' stand-ins need it
        pixels = rng.normal(90, 12, (48, 64, 3))
        for colour, factor in enumerate(z[:3]):
            for y, x in rng.integers(0, [44, 60], (int(8 * np.exp(min(factor, 2))), 2)):
                pixels[y:y + 4, x:x + 4, colour] += 80
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)
        return
    lattice = np.diag([record[f"lattice_vector_{k}_ang"] for k in (1, 2, 3)])
    shares = np.array([record[f"percent_atom_{e}"] for e in ("al", "ga", "in")])
    n = int(record["number_of_total_atoms"])
    atoms = [*rng.choice(["Al", "Ga", "In"], 2 * n // 5, p=shares / shares.sum()), *["O"] * n][:n]
    lines = ["lattice_vector {:.10f} {:.10f} {:.10f}".format(*vector) for vector in lattice]
    lines += ["atom {:.10f} {:.10f} {:.10f} {}".format(*rng.random(3) @ lattice, e) for e in atoms]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")

# §8 Command line ----------------------------------------------------------------------------------
def score_report(task, file, data_dir):
    """The JSON object of `score`: score, validity, reason, medals, the paper's numbers."""
    if not Path(file).is_file():
        raise DataError(f"there is no file {file}")
    score, reason, standin = None, None, is_standin(task, data_dir)
    try:
        score = grade(task, file, paths(task, data_dir)[1] / task["answers"])
    except InvalidSubmission as error:
        reason = str(error)
    known = score is not None and not standin  # a score on imitation data compares with nothing
    beside = ("higher_is_better", "gold", "silver", "bronze", "median", "sample_score", "paper")
    return {"task": task["name"], "metric": task["metric"], "valid": reason is None,
            "score": None if score is None else round(score, 5), "reason": reason,
            "medal": medal(task, score) if known else None, "standin": standin,
            "above_median": lead(task, score, "median") > 0 if known else None,
            **{key: task[key] for key in beside}}

def run_command(command, names, data_dir, raw):
    """Do what the command line asks; returns the exit code. Raises DataError."""
    if command == "score":
        print(json.dumps(score_report(load_task(names[0]), names[-1], data_dir), indent=2))
        return 0
    wrong = 0
    for task in map(load_task, load_tasks() if names == ["all"] else names):
        home = paths(task, data_dir)[0].parent
        if command == "prepare":
            ensure_data(task, data_dir, raw, imitate=False)
        elif command == "standin" and missing_files(task, data_dir):
            publish(task, data_dir)
        for name, md5 in task["md5"].items() if command == "verify" else ():
            found = (home / name).is_file() and hashlib.md5((home / name).read_bytes()).hexdigest()
            state = "ok" if found == md5 else "differs" if found else "missing"
            print(f"{task['name']}/{name}: {state}")
            wrong += state != "ok"
        kind = "STAND-IN, not comparable" if is_standin(task, data_dir) else "data"
        print(f"{task['name']}: {kind}, in {home}", file=sys.stderr)
    return int(wrong > 0)

def main(argv=None):
    """Exit code 0; 1 if verify finds a difference; 2 with one line on stderr for any error."""
    parser = argparse.ArgumentParser(prog="grade.py", description=__doc__.split("\n\nDEV")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "verify", "score", "standin"))
    parser.add_argument("names", nargs="+", metavar="TASK", help="for score, a task and a file")
    parser.add_argument("--data-dir", default="data", help="holds <task>/prepared")
    parser.add_argument("--raw", help="Kaggle's files, or one such folder per task")
    try:
        return run_command(**vars(parser.parse_args(argv)))
    except (DataError, OSError, KeyboardInterrupt) as error:
        print(f"grade.py: {str(error) or 'interrupted'}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
