"""All text that a model sees: prompts and milestones (Sec. 3.2, 3.3, App. C), and the corpus of
programs from which the embedded tiny policy learns to write at all; it looks at no data."""
import csv, importlib.metadata, itertools, json, random, re

from grade import DataError

# The packages that a program may use (App. C), by their names on PyPI.
PACKAGES = """statsmodels pandas timm bayesian-optimization scikit-learn xgboost numpy torch
    torchvision lightGBM torch-geometric""".split()

# Progress of a program (App. C.3): the words printed, and what earns partial credit (Sec. 3.2).
# A loss counts only with its value. `instrument` below asks the LM for exactly these words.
MILESTONES = [(marker, f"^{marker}" + r"\s*\S" * marker.endswith(":")) for marker in (
    "imported packages", "loaded data", "defined model", "training loss:", "trained model",
    "testing loss:", "predicted test labels")]

SYSTEM = ("You are a machine learning engineer. You solve a task by writing one Python program "
          "that trains a model, applies it to the test set and writes a submission file.")
ANSWER = ("Answer with an outline of your approach in 3 to 5 sentences, followed by exactly one "
          "markdown code block (```python ... ```) that holds the complete program. "
          "Nothing comes after the code block.")
SHORT_SYSTEM = "Write one Python program that solves the task."

# Prompts (App. C) ---------------------------------------------------------------------------------
def chat(system, user):
    """Messages of a system prompt and a user's turn."""
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]

def describe(task, snippet, packages):
    """The notes on a task that solve and improve share. Empty parts are left out."""
    with open(task["public"] / task["sample"], encoding="utf-8") as file:
        rows = "".join(f"{line.rstrip()[:150]}\n" for line in itertools.islice(file, 3)).rstrip()
    notes = [
        f"Task: {task['goal']}" if task["goal"] else "",
        f"The score is {task['metric_text']} on the test set; "
        f"{'higher' if task['higher_is_better'] else 'lower'} is better.",
        f"The data is in ./{task['name']}/prepared/public/: {task['train']} for training, "
        f"{task['test']} to predict, {task['sample']} as an example of a submission.",
        "Run the trained model on the test set and save its predictions as ./submission.csv. The "
        f"file has one line per test record and looks like this:\n{rows}",
        f"Installed packages: {', '.join(packages)}." if packages else "",
        "There is no internet access: nothing can be installed or downloaded, no models either."]
    text = "Notes:\n" + "\n".join(f"- {note}" for note in notes if note)
    return text + (f"\n\nWhat the data looks like:\n{snippet}" if snippet else "")

def solve(task, snippet, packages, short=False):
    """Messages that ask for a solution from scratch (App. C). snippet: text, the first records of
    the public files; packages: names. short (CHOICE): the tiny policy's wording, without both."""
    if short:
        return chat(SHORT_SYSTEM, f"Task: {task['name']} ({task['metric']})\n")
    return chat(SYSTEM, f"{ANSWER}\n\n{describe(task, snippet, packages)}")

def improve(task, snippet, packages, plan, code, output, short=False):
    """Messages that ask for a better version of a previous solution (Sec. 3.3, App. C.2).
    output: what it printed, with the secret of instrumentation stripped."""
    if short:  # the last lines hold the losses, here cut to three digits
        tail = "".join(re.sub(r"(\.\d{3})\d+", r"\1", line) + "\n"
                       for line in output.splitlines()[-4:] if len(line) < 40)
        return chat(SHORT_SYSTEM, solve(task, snippet, packages, short=True)[-1]["content"]
                    + f"Improve:\n{plan}\n{code}Output:\n{tail}")
    asked = ("You have already implemented a solution to the task below. Revise it to do better on "
             "the test set. Repeat in full what you keep: only the new program is run.")
    printed = f"\n\nIt printed:\n{output}" if output else ""
    return chat(SYSTEM, f"{asked} {ANSWER}\n\n{describe(task, snippet, packages)}\n\n"
                        f"Your previous solution:\n{plan}\n```python\n{code}```{printed}")

def instrument(code):
    """Messages that ask the frozen LM for progress prints (Sec. 3.2, App. C.3)."""
    marks = "\n".join(f'{k}. print("{marker}"' + (
        ", value)  # only if the program computes this loss" if marker.endswith(":") else ")")
        for k, (marker, _) in enumerate(MILESTONES, 1))
    return chat("You add progress messages to Python programs and change nothing else.", (
        "Insert the following print statements, in this order, into the program below:\n"
        f"{marks}\n\nRequirements:\n"
        "1. Each print comes after the operation it names has finished, never before it.\n"
        "2. The two losses are printed only where the program itself computes such a value, from "
        "the variable that holds it; compute nothing new for them.\n"
        "3. Return the whole program in one ```python code block, with every other line exactly as "
        "it is: fix nothing, reformat nothing.\n\n"
        f"```python\n{code}```"))

def importable():
    """Those of PACKAGES that programs can import here."""
    return [name for name in PACKAGES if any(importlib.metadata.distributions(name=name))]

def snippet(task, width):
    """The first record of the train and test tables, values cut to `width` characters (App. C)."""
    shown = []
    for name in (task["train"], task["test"]):
        with open(path := task["public"] / name, newline="", encoding="utf-8") as file:
            record = json.load(file)[0] if path.suffix == ".json" else next(csv.DictReader(file))
        cells = [f"{key}: {str(value)[:width]}" for key, value in record.items()]
        if len(cells) > 40:
            cells = [*cells[:6], f"... {len(cells) - 8} more columns ...", *cells[-2:]]
        shown.append(f"{name}, first record:\n" + "\n".join(cells))
    return "\n\n".join(shown)

# Fragments of the tiny policy's corpus (CHOICE: the paper starts from an instruction-tuned model).
# {a | b} stands for one of its options, {T} for a text column. LIMIT is the most groups of numeric
# columns that a model of each level gets, no matter what scores well: simple learners may have
# many, strong ones few. What combines both is nowhere in the corpus, though each of its lines is.
LIMIT, WEIGHT, SIZE = (4, 1, 1, 1, 0), (3, 2, 2, 2, 4), 5  # WEIGHT: a level's odds; SIZE: features
P_CONSTANT, P_CHECK, P_BUG, N_BUGS = 0.04, 0.25, 0.88, (1, 2, 2, 3)  # bugs, if it has any
SCALED = "make_pipeline({StandardScaler() | QuantileTransformer()}"
MODELS = (  # level (raw or scaled columns, ensembles, slow ones), words of the plan, expression
    (0, "Gaussian naive Bayes", "GaussianNB(var_smoothing={1e-9 | 1e-6 | 1e-3})"),
    (0, "Bernoulli naive Bayes", "BernoulliNB(alpha={0.1 | 0.5 | 1.0 | 2.0})"),
    (0, "a small tree", "DecisionTreeClassifier(max_depth={1 | 2 | 3 | 4}, random_state=0)"),
    (0, "nearest neighbors", "KNeighborsClassifier(n_neighbors={5 | 11 | 25 | 51})"),
    (0, "SGD", 'SGDClassifier(loss="log_loss", alpha={0.0001 | 0.001 | 0.01}, random_state=0)'),
    (1, "logistic regression", f"{SCALED}, LogisticRegression(C={{0.01 | 0.1 | 1.0}}))"),
    (1, "ridge regression", f"{SCALED}, Ridge(alpha={{1.0 | 10.0 | 100.0}}))"),
    (1, "scaled neighbors", f"{SCALED}, KNeighborsClassifier(n_neighbors={{15 | 31 | 61 | 101}}))"),
    (1, "a neural network", f"{SCALED}, MLPClassifier(max_iter={{10 | 20 | 40}}, random_state=0))"),
    (2, "a forest", "{RandomForest | ExtraTrees}Classifier(n_estimators={30 | 60 | 100}, "
                    "min_samples_leaf={1 | 3 | 5 | 10}, random_state=0)"),
    (2, "gradient boosting", "GradientBoostingClassifier(n_estimators={30 | 60 | 100}, "
                             "max_depth={2 | 3 | 4}, subsample=0.5, random_state=0)"),
    (2, "histogram boosting", "HistGradientBoostingClassifier(max_iter={30 | 60 | 100}, "
                              "learning_rate={0.03 | 0.05 | 0.1}, random_state=0)"),
    (3, "a grid search", 'GridSearchCV(GradientBoostingClassifier(subsample=0.2, random_state=0), '
     '{"{max_depth": [2, 3] | n_estimators": [20, 40] | learning_rate": [0.03, 0.1]}}, '
     'scoring="roc_auc", cv=2)'),
    (3, "an average of models", 'make_pipeline(QuantileTransformer(), VotingClassifier([("a", '
     'GradientBoostingClassifier(subsample=0.5, random_state=0)), ("b", {LogisticRegression(C=0.1)'
     ' | RandomForestClassifier(min_samples_leaf=5, random_state=0)})], voting="soft"))'))
TERMS = '{min_df=3 | ngram_range=(1, 2), min_df=2 | analyzer="char", ngram_range=(2, 4), min_df=10}'
SPARSE = tuple((4, f"{words} of {what}", f"make_pipeline({name}Vectorizer({TERMS}), {model})")
               for what, name in (("counts", "Count"), ("terms", "Tfidf")) for words, model in (
    ("naive Bayes", "MultinomialNB(alpha={0.03 | 0.1 | 0.3 | 1.0})"),
    ("logistic regression", "LogisticRegression(C={0.1 | 1.0 | 10.0})"),
    ("ridge regression", 'Ridge(alpha={0.3 | 1.0 | 3.0}, solver="lsqr")')))
TEXT = (  # features of a text column: words of the plan, expression, what must stand before it
    ("lengths", "df[{T}].str.len()", ""),
    ("word counts", "df[{T}].str.split().str.len()", ""),
    ("punctuation", 'df[{T}].str.count("{! | [?] | , | [.]}")', ""),
    ("capitals", 'df[{T}].str.count("[A-Z]")', ""),
    ("TF-IDF", "words.transform(df[{T}]).toarray()",
     'words = TfidfVectorizer({max_features=100 | max_features=200 | max_features=100, '
     'stop_words="english" | ngram_range=(1, 2), min_df=50}).fit(train[{T}])\n'),
    ("topics", "words.transform(df[{T}])", "words = make_pipeline(TfidfVectorizer(min_df=3), "
     "TruncatedSVD({3 | 10 | 30}, random_state=0)).fit(train[{T}])\n"))
CLOCK = 'pd.to_datetime(df["unix_timestamp_of_request"], unit="s").dt'
PHOTO = ('np.stack([np.asarray(Image.open(f"plant-pathology-2020-fgvc7/prepared/public/images/{k}'
         '.jpg").convert("{L | RGB | HSV}")%s for k in df["image_id"]])')
OWN = {"random-acts-of-pizza": (  # further features of single tasks
    ("keywords", 'df[{T}].str.contains("{job|work | rent|bill | kid|wife|family | '
                 'student|college | thank|please | friend|party | http|imgur}", case=False)', ""),
    ("time", f"{CLOCK}.{{hour | month | dayofweek | year}}", ""),
    ("subreddits", 'df["requester_subreddits_at_request"].str.len()', "")),
       "plant-pathology-2020-fgvc7": (
    ("pixels", PHOTO % '.resize(({1 | 2 | 4 | 8},) * 2)).ravel()', ""),
    ("colors", PHOTO % '.histogram()[::{8 | 16 | 32}])', ""))}
TRIVIAL = (  # plan, prediction
    ("Predict the mean of the training labels.", "p = np.full(len(test), y.mean())"),
    ("Predict the same value for all.", "p = np.full(len(test), {0.1 | 0.25 | 0.5})"),
    ("Predict random numbers.", "p = np.random.default_rng({0 | 1 | 2}).random(len(test))"))
SHARES = (("Predict shares.", "p = np.ones((len(test), 1)) * pd.get_dummies(y).mean().values"),)
PART = "words.str[{:2 | :3 | :5 | :8 | -2: | -3: | -5: | -8: | 1: | 2: | :-1 | 1:-1}]"
SPANS = (("Predict the text.", 'p = test["text"]'), ("Predict a part of the text.", (
    'words = test["text"].str.split()\n'
    f'part = {PART}.where(test["sentiment"] == "{{positive | negative}}", {PART})\n'
    'p = words.where(test["sentiment"] == "neutral", part).str.join(" ")')))
CHECK = "score = model.score({X}, {y})"
MODE = (("Predict the most common label.", "p = np.full(len(test), y.mode()[0])"),)
VALUES = ("model.predict({}).clip(0)", CHECK, (
    ("Predict random numbers.", "p = np.random.rand(len(test), *y.shape[1:])"),), "NB|Logi|SGD")
METRICS = {  # what is predicted from X, how it is checked, constants, models that cannot predict it
    "roc_auc": ("model.predict_proba({})[:, 1]", "auc = roc_auc_score({y}, {p})", TRIVIAL, "none"),
    "log_loss": ("model.predict_proba({})", CHECK, SHARES, "Ridge"),
    "accuracy": ("model.predict({})", CHECK, MODE, "Ridge"),
    "quadratic_kappa": ("model.predict({}).round().clip(y.min(), y.max())", CHECK, MODE, "none"),
    "word_jaccard": ("", "", SPANS, ""), "pearson": VALUES, "rmsle": VALUES}
MODULES = """decomposition ensemble feature_extraction.text linear_model metrics model_selection
    multioutput naive_bayes neighbors neural_network pipeline preprocessing tree""".split()
PLANS = ("Train {M} on {F}.", "Use {F} for {M}.")
# Bugs of each stage: pattern, replacement. How many is drawn once for a program, not for a stage:
# long programs fail no more often than short ones, where a policy would learn to hide.
BUGS = {
    "import": ((r"(?m)^(?!import pandas).+\n", ""), (r"sklearn\.\w+ import", "sklearn import")),
    "load": ((r"train\.(json|csv)", r"training.\1"), (r"\)\n", "\n"),
             (r'y = train\["\w+"\]', 'y = train["label"]')),
    "features": ((r"features\(test\)", "features(train)"),
                 (r'(df\["\w+"\])\.(?!dt)\w.*,\n', r"\1,\n"),
                 (r"_at_request\"", '_at_retrieval"')),
    "model": ((r"\((\w+)=", r"(\1s="), (r"\)\n", "\n")),
    "fit": ((r"(?m)^model\.fit.*\n", ""), (r"fit\((\w+), \w+\)", r"fit(\1)")),
    "predict": (("X_test", "X"), (r"len\(test\)", "len(train)")),
    "write": ((r', "\w+": p', ', "prediction": p'), (r'"submission\.csv"', '"predictions.csv"'))}

# Composition of the corpus ------------------------------------------------------------------------
def pick(rng, text, task):
    """Replace every {a | b} by one of its options, and {T} by one text column throughout."""
    if "{T}" in text:
        text = text.replace("{T}", f'"{rng.choice(task["text"])}"')
    return re.sub(r"\{([^{}]* \| [^{}]*)\}", lambda m: rng.choice(m[1].split(" | ")), text)

def suited(task):
    """(its METRICS, models for it): more than two targets are probabilities of classes; SPARSE is
    for tasks with nothing but text."""
    metric, out = task["metric"] if len(task["targets"]) < 3 else "log_loss", []
    known = MODELS + SPARSE * bool(task["text"] and not task["numeric"])
    for level, words, code in (m for m in known if not re.search(METRICS[metric][3], m[2])):
        code = code if metric == "roc_auc" else code.replace('scoring="roc_auc", ', "")
        code = code.replace("Classifier", "Regressor") if METRICS[metric] is VALUES else code
        several = METRICS[metric] is VALUES and task["targets"][1:]
        out.append((level, words, f"MultiOutputRegressor({code})" if several else code))
    return METRICS[metric], out

def draw_feature(rng, task):
    """(words of the plan, expression in `df`, line before it, groups of numeric columns)."""
    text = TEXT if task["metric"] != "pearson" else TEXT[:2] + TEXT[4:]  # else constants: no score
    kinds = [task["numeric"]] * 3 + [task["text"] and text, OWN.get(task["name"])]
    kind = rng.choice([k for k in kinds if k])
    if kind is not task["numeric"]:
        words, *code = rng.choice(kind)
        code = pick(rng, "\0".join(code), task).split("\0")
        return words, *code, 0
    named = task.get("groups", {})
    words = rng.choice(("all numeric columns", *named))
    columns = named.get(words, task["numeric"])
    if words in named and isinstance(columns, list) and rng.random() < 0.35:
        columns = sorted(rng.sample(columns, rng.randint(1, len(columns))), key=columns.index)
    code = (f'df.filter(like="{columns}")' if isinstance(columns, str) else
            f"df[{json.dumps(columns)}]" if len(columns) < 20 else
            'df[test.columns[1:]].select_dtypes("number")')
    return words, code, "", LIMIT[0] if named and words not in named else 1

def fits(spec):
    """Whether a program keeps the corpus's rule: features that fit the level of its model."""
    features, words = spec["features"], [words for words, *_ in spec["features"]]
    return (len(words) == len(set(words)) <= SIZE and sum(s > "" for _, _, s, _ in features) < 2
            and ("the text" in words) == (spec["model"][0] == 4)
            and sum(n for *_, n in features) <= LIMIT[spec["model"][0]])

def draw(rng, task):
    """A correct program as a dict of choices: independent but for the rule in `fits`."""
    (_, _, constants, _), models = suited(task)
    if rng.random() < P_CONSTANT or not models:
        plan, prediction = rng.choice(constants)
        return dict(model=None, plan=plan, constant=pick(rng, prediction, task))
    model = rng.choices(models, [WEIGHT[level] for level, *_ in models])[0]
    spec = dict(model=(*model[:2], pick(rng, model[2], task)), features=[], plan=rng.choice(PLANS),
                check=rng.random() < P_CHECK * (len(task["targets"]) < 9))  # enough rows a class
    if model[0] == 4:
        columns = rng.choice([task["text"], *([c] for c in task["text"])])
        text = ' + " " + '.join(f'df["{c}"]' for c in columns)
        return {**spec, "features": [("the text", text, "", 0)]}
    size = rng.randint(1, SIZE)
    while len(spec["features"]) < size:
        longer = {**spec, "features": spec["features"] + [draw_feature(rng, task)]}
        spec = longer if fits(longer) else spec
        size -= not fits(longer) and rng.random() < 0.2  # some rules leave no room for more
    return spec if spec["features"] else draw(rng, task)

def revise(rng, task, old):
    """One or two of the choices drawn anew, at random: nothing here knows what is better."""
    while True:
        new = draw(rng, task)
        if old["model"] is None or new["model"] is None:
            return new
        keys = rng.sample(("model", "features", "check"), rng.randint(1, 2))
        out = {**old, "plan": new["plan"], **{k: new[k] for k in keys}}
        if fits(out) and any(out[k] != old[k] for k in keys):
            return out

def render(task, spec):
    """(plan, {stage: code}) of a program, stages in the order in which they stand."""
    targets, public, plan = task["targets"], f"{task['name']}/prepared/public", spec["plan"]
    (predicted, check, *_), _ = suited(task)
    label = json.dumps(task["prepare"].get("one_hot") or (targets if targets[1:] else targets[0]))
    integers = (".astype(int)" if "[:, 1]" in predicted else
                ".values.argmax(1)" if len(targets) > 2 and "[" in label else "")
    out = {"import": "", "load": "".join(
        f'{part} = pd.read_{task[part].split(".")[-1]}("{public}/{task[part]}")\n'
        for part in ("train", "test")) + f"y = train[{label}]{integers}\n"}
    if spec["model"] is None:
        out["predict"] = f"{spec['constant']}\n"
    else:
        level, name, model = spec["model"]
        words, codes, setups, _ = zip(*spec["features"])
        plan = plan.replace("{M}", name).replace("{F}", " and ".join(
            filter(None, (", ".join(words[:-1]), words[-1]))))
        columns = "".join(f"        {code},\n" for code in codes)
        X = f"np.column_stack([\n{columns}    ])" if level < 4 else codes[0]
        out["features"] = (f"{''.join(setups)}def features(df):\n    return {X}\n"
                           "X, X_test = features(train), features(test)\n")
        out["model"] = f"model = {model}\n"
        if "[:, 1]" in predicted and "Ridge(" in model:  # no probabilities, and may leave [0, 1]
            predicted = "model.predict({}).clip(0, 1)"
        out["fit"] = "model.fit(X, y)\n" if not spec["check"] else (
            "X_fit, X_valid, y_fit, y_valid = train_test_split(X, y, random_state=0)\n"
            "model.fit(X_fit, y_fit)\n" + "".join(
                f"{part}_{check}\n".format(X=X, y=f"y{X[1:]}", p=predicted.format(X))
                for part, X in (("train", "X_fit"), ("valid", "X_valid"))))
        out["predict"] = f"p = {predicted.format('X_test')}\n"
    out["write"] = (
        f'submission = pd.read_csv("{public}/{task["sample"]}")\n'
        "submission[submission.columns[1:]] = p\n" if targets[1:] else
        f'submission = pd.DataFrame({{"{task["id"]}": test["{task["id"]}"], "{targets[0]}": p}})\n'
    ) + 'submission.to_csv("submission.csv", index=False)\n'
    out["import"] = imports("".join(out.values()))
    return plan, out

def imports(code):
    """The lines that import what a program uses."""
    names = set(re.findall(r'(?<!["\w])\w+', code))
    lines = ["import numpy as np\n" * ("np" in names), "import pandas as pd\n",
             "from PIL import Image\n" * ("Image" in names)]
    for module in MODULES:
        used = sorted(names & set(importlib.import_module(f"sklearn.{module}").__all__))
        lines.append(f"from sklearn.{module} import {', '.join(used)}\n" if used else "")
    return "".join(lines)

def spoil(rng, stages):
    """The stages with one more bug: first the stage is drawn, then the bug, then the place."""
    fitting = {stage: [b for b in bugs if re.search(b[0], stages.get(stage, ""))]
               for stage, bugs in BUGS.items()}
    bugs = fitting[stage := rng.choice(sorted(stage for stage in fitting if fitting[stage]))]
    # The first bugs of a stage are the common ones: temperature 0.7 removes what is rare.
    pattern, new = rng.choices(bugs, [4 ** -k for k in range(len(bugs))])[0]
    place, text = rng.choice(list(re.finditer(pattern, stages[stage]))), stages[stage]
    return {**stages, stage: text[:place.start()] + place.expand(new) + text[place.end():]}

def printed(rng, spec):
    """What an instrumented program prints; the values of the losses are invented."""
    return "".join(f"{marker} {rng.uniform(0.5, 0.8)}\n" if marker.endswith(":") else f"{marker}\n"
                   for marker, _ in MILESTONES
                   if (spec.get("check") or not marker.endswith(":"))
                   and (spec["model"] or "model" not in marker))

def corpus(task, n, seed, p_improve=0.4):
    """n pairs (messages, response); p_improve ask for an improvement, P_BUG have bugs. DataError"""
    alien = task["metric"] == "word_jaccard" and "sentiment" not in task["text"]  # no rules for it
    if alien or not (task["numeric"] or task["text"] or task["name"] in OWN):
        raise DataError(f"the tiny policy knows no programs for {task['name']}: choose a --model")
    rng, pairs = random.Random(f"{task['name']} {seed}"), []
    for _ in range(n):
        spec = draw(rng, task)
        messages = solve(task, "", [], short=True)
        if rng.random() < p_improve:
            plan, stages = render(task, spec)
            messages = improve(task, "", [], plan, "".join(stages.values()), printed(rng, spec),
                               short=True)
            spec = revise(rng, task, spec)
        plan, stages = render(task, spec)
        for _ in range(rng.choice(N_BUGS) if rng.random() < P_BUG else 0):
            stages = spoil(rng, stages)
        pairs.append((messages, f"{plan}\n```python\n{''.join(stages.values())}```"))
    return pairs
