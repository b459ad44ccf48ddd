"""The scripts from end to end on 48 tiny pictures: files, resume, errors, exit codes.

Most tests run a script inside this process. Those that kill or interrupt a run start it with
`start`, in a process forked from a server that has imported torch already: an import takes seconds.
"""

import ast
import errno
import functools
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import baselines
import common
import eat
import eval as evaluator
import hardness_manipulation
import panum_at

ROOT = Path(__file__).resolve().parent.parent
OUR_FILES = {"args.json", "log.jsonl", "last.pt", "results.json"}
METRICS = {"R@1", "R@2", "R@4", "R@8", "mAP@R", "NMI", "AMI", "F1"}
RULES = {"vote", "member_mean", "concat", "mean", "member_1", "member_2"}
RESULTS = {"schema", "method", "variant", "dataset", "arch", "embedding_dim", "image_size", "amp",
           "seed", "epoch", "clean", "robust", "warnings", "seconds", "peak_gb", "env"}
SCORES = METRICS | {"NMI_chance", "n_queries", "n_singletons"}
ENTRY = SCORES | {"protocol", "rule", "attack", "objective", "norm", "eps", "eps_255", "step",
                  "step_255", "steps", "restarts", "random_start", "seed", "n_queries", "limited",
                  "seconds"}
CLOCK = ("seconds", "images_per_second")


# ---- helpers

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Six classes of eight 32 x 32 pictures; "folder" trains on the first three classes."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    ramp = torch.arange(32) / 31
    for label in range(6):
        folder = root / f"class{label}"
        folder.mkdir()
        stripes = torch.stack([ramp, ramp.flip(0), (ramp * (label + 2) * 4).sin().abs()])
        pattern = stripes.roll(label, 0)[:, None, :].expand(3, 32, 32)
        for i in range(8):
            image = (pattern + 0.3 * torch.rand(3, 32, 32, generator=generator)).clamp(0, 1)
            pixels = (image * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def flags(pictures, out, *more, method="eat"):
    """The flags of a tiny run; argparse takes the last value of a flag given twice."""
    own = {"eat": ["--members", "2"], "panum": [], "hm": [],
           "ensemble": ["--method", "ensemble", "--members", "2"]}.get(method, ["--method", method])
    return ["--dataset", "folder", "--data-root", str(pictures), "--out", str(out),
            "--arch", "convnet", "--weights", "none", "--image-size", "32", "--epochs", "4",
            "--batch-size", "6", "--attack-steps", "1", "--eval-steps", "1",
            "--embedding-dim", "8", "--workers", "0", "--device", "cpu", "--plain-epochs", "0",
            *own, *more]


def train(*arguments, script=eat):
    script.main(script.parse_args([str(argument) for argument in arguments]))


def train_baseline(method, pictures, out, *more):
    train(*flags(pictures, out, *more, method=method), script=baselines)


def resume(out, *more, script=eat):
    train("--resume", "--out", out, *more, script=script)


def evaluate(*arguments):
    evaluator.main(evaluator.parse_args([str(argument) for argument in arguments]))


def saved(out):
    return torch.load(Path(out) / "last.pt")


def stored(out):
    return json.loads((Path(out) / "results.json").read_text())


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def contents(folder):
    """{name: bytes} of every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def same_bits(first, second):
    """Whether two nests of dicts and lists hold the same tensors and values, bit for bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_bits(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_bits, first, second))
    return first == second


def same_training(first, second):
    """Whether two runs ended with the same networks, proxies, optimisers and schedulers."""
    parts = ("epoch", "members", "proxies", "optimizers", "schedulers", "state", "classes")
    first, second = saved(first), saved(second)
    return all(same_bits(first[part], second[part]) for part in parts)


def same_members(first, second, count=1):
    """Whether the first `count` networks of two runs ended the same, with their proxies and all."""
    parts = ("members", "proxies", "optimizers", "schedulers")
    first, second = saved(first), saved(second)
    return all(same_bits(first[part][:count], second[part][:count]) for part in parts)


def without_clock(lines):
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def without_seconds(results):
    """The scores of results.json: all that does not depend on the clock or the machine's load."""
    robust = [{k: v for k, v in entry.items() if k != "seconds"} for entry in results["robust"]]
    return {"clean": results["clean"], "robust": robust, "warnings": results["warnings"]}


def interrupt_after(monkeypatch, epochs):
    """Let the training be interrupted right after the checkpoint of this epoch (0: before any)."""
    save = common.save_checkpoint

    def save_and_stop(args, **content):
        if epochs:
            save(args, **content)
        if content["epoch"] >= epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_checkpoint", save_and_stop)


def must_not_run(*_, **__):
    raise AssertionError("this must not be computed again")


@pytest.fixture(scope="session")
def finished_run(pictures, tmp_path_factory):
    """A complete run; tests read it and must not change it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(*flags(pictures, out))
    return out


@pytest.fixture(scope="session")
def stopped_run(pictures, tmp_path_factory):
    """The same run, interrupted after two of its four epochs; not to be changed either."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        interrupt_after(monkeypatch, 2)
        train(*flags(pictures, out))
    return out


@pytest.fixture(scope="session")
def long_run(pictures, tmp_path_factory):
    """A complete run of twelve epochs: what a killed one must end like."""
    out = tmp_path_factory.mktemp("runs") / "long"
    train(*flags(pictures, out, "--epochs", "12"))
    return out


@pytest.fixture(scope="session")
def baseline_run(pictures, tmp_path_factory):
    """baseline_run(method): a complete run of that method, made once; not to be changed."""
    root = tmp_path_factory.mktemp("baselines")

    @functools.cache
    def make(method):
        train_baseline(method, pictures, root / method)
        return root / method

    return make


@pytest.fixture
def finished(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "finished")


@pytest.fixture
def stopped(stopped_run, tmp_path):
    return shutil.copytree(stopped_run, tmp_path / "stopped")


@pytest.fixture
def fails(capsys, monkeypatch):
    """fails(code, words, script, flags...): exit code and one line on stderr with these words."""
    def check(code, words, script, *arguments):
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)   # restored later
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            common.run_script(lambda: script.parse_args([str(a) for a in arguments]), script.main)
        error = capsys.readouterr().err
        assert stop.value.code == code, error
        assert error.count("\n") == 1 and error.endswith("\n") and "error: " in error, error
        for word in words:
            assert word in error, error
    return check


def in_child(script, arguments, folder, file_limit):
    """What `start` runs: a script as on a command line; stdout and stderr go to files."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = open(Path(folder) / "stdout", "w", buffering=1)
    sys.stderr = open(Path(folder) / "stderr", "w", buffering=1)
    if file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [f"{script}.py", *map(str, arguments)]
    module = {"eat": eat, "baselines": baselines, "panum_at": panum_at, "eval": evaluator,
              "hardness_manipulation": hardness_manipulation}[script]
    common.run_script(module.parse_args, module.main)


def start(script, arguments, folder, file_limit=None):
    """A script in a process of its own. file_limit: no file can grow beyond so many bytes."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "torchvision", "pytest"])
    folder.mkdir(exist_ok=True)
    process = server.Process(target=in_child, args=(script, arguments, folder, file_limit))
    process.start()
    return process


def wait_for_log_lines(process, out, count):
    """Until log.jsonl has so many lines; the process must still be running then."""
    for _ in range(6000):
        if process.exitcode is None and (out / "log.jsonl").exists() and \
                (out / "log.jsonl").read_bytes().count(b"\n") >= count:
            return
        assert process.exitcode is None, "the run ended too early"
        time.sleep(0.005)
    raise AssertionError("the run logs nothing")


# ---- (1) a run's folder

def test_a_run_writes_four_files_and_nothing_else(finished_run):
    assert set(contents(finished_run)) == OUR_FILES


def test_args_json_has_every_flag_and_where_it_ran(finished_run, pictures):
    record = json.loads((finished_run / "args.json").read_text())
    for name, value in vars(eat.parse_args(flags(pictures, finished_run))).items():
        assert record[name] == value, name
    assert {"versions", "commit", "dirty", "device", "threads"} <= set(record)
    assert {"python", "torch", "torchvision", "numpy"} <= set(record["versions"])


def test_log_jsonl_has_one_object_per_epoch(finished_run):
    lines = log(finished_run)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert set(line) == {"epoch", "clean", "adversarial", "lr", "seconds", "images_per_second",
                             "collapse"}
        assert line["clean"] > 0 and line["adversarial"] > 0 and line["lr"] > 0
        assert line["seconds"] > 0 and line["images_per_second"] > 0 and -1 <= line["collapse"] <= 1


def test_log_jsonl_has_the_learning_rate_of_that_epoch(finished_run):
    rates = [line["lr"] for line in log(finished_run)]   # x 0.1 after half and three quarters
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-6])


def test_last_pt_has_the_documented_keys(finished_run):
    checkpoint = saved(finished_run)
    assert set(checkpoint) == {"format", "method", "args", "epoch", "members", "proxies",
                               "optimizers", "schedulers", "state", "classes", "versions"}
    assert checkpoint["method"] == "eat" and checkpoint["epoch"] == 4
    assert checkpoint["classes"] == ["class0", "class1", "class2"]
    for part in ("members", "proxies", "optimizers", "schedulers"):
        assert len(checkpoint[part]) == 2, part
    assert checkpoint["proxies"][0].shape == (3, 8)


def test_last_pt_loads_where_the_project_is_unknown(finished_run, tmp_path):
    code = ("import importlib.util, sys, torch\n"
            "assert importlib.util.find_spec('common') is None\n"
            "print(torch.load(sys.argv[1])['epoch'])")
    done = subprocess.run([sys.executable, "-I", "-c", code, str(finished_run / "last.pt")],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr


def test_results_json_has_the_documented_keys(finished_run):
    results = stored(finished_run)
    assert set(results) == RESULTS | {"undefended"}
    assert (results["method"], results["variant"], results["epoch"]) == ("eat", "", 4)
    assert (results["arch"], results["embedding_dim"], results["image_size"]) == ("convnet", 8, 32)
    assert results["clean"]["rule"] == "vote" and SCORES <= set(results["clean"])
    assert set(results["clean"]["by_rule"]) == RULES
    for by_rule in results["clean"]["by_rule"].values():
        assert SCORES <= set(by_rule) and by_rule["n_queries"] == 24
    assert {entry["rule"] for entry in results["robust"]} == RULES
    for entry in results["robust"]:
        assert ENTRY <= set(entry)
        assert entry["protocol"] == "clustering" and entry["steps"] == 1
        assert entry["eps_255"] == pytest.approx(8) and entry["step_255"] == pytest.approx(2)
        assert entry["limited"] is False


def test_scores_are_fractions_not_percent(finished_run):
    results = stored(finished_run)
    for scores in [*results["clean"]["by_rule"].values(), *results["robust"]]:
        for name in METRICS:                     # AMI is adjusted for chance: it may be below 0
            assert (-1 if name == "AMI" else 0) <= scores[name] <= 1 + 1e-9, name


def test_the_closing_table_names_the_undefended_row_and_every_rule(pictures, tmp_path, capsys):
    train(*flags(pictures, tmp_path / "run", "--epochs", "1"))
    table = capsys.readouterr().out
    for words in ("not trained", "vote", "member_mean", "concat", "member_2", "mAP@R", "NMI"):
        assert words in table


# ---- (2) killed and resumed

def test_a_run_killed_in_training_and_resumed_ends_bit_for_bit_the_same(long_run, pictures,
                                                                        tmp_path):
    killed = tmp_path / "killed"
    process = start("eat", flags(pictures, killed, "--epochs", "12"), tmp_path / "output")
    wait_for_log_lines(process, killed, 2)
    time.sleep(0.13)                                         # in the middle of an epoch
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (killed / "results.json").exists()
    resume(killed)
    assert same_training(long_run, killed)
    assert without_seconds(stored(long_run)) == without_seconds(stored(killed))


def test_a_run_killed_before_its_results_only_evaluates_again(finished, monkeypatch):
    before, checkpoint = stored(finished), (finished / "last.pt").read_bytes()
    (finished / "results.json").unlink()
    monkeypatch.setattr(eat, "member_loss", must_not_run)
    resume(finished)
    assert without_seconds(stored(finished)) == without_seconds(before)
    assert (finished / "last.pt").read_bytes() == checkpoint


def test_resuming_a_complete_run_prints_its_table_and_changes_nothing(finished, capsys,
                                                                      monkeypatch):
    monkeypatch.setattr(common, "evaluate_set", must_not_run)
    before = contents(finished)
    resume(finished)                             # no SystemExit: exit code 0
    assert "eat vote" in capsys.readouterr().out
    assert contents(finished) == before


def test_log_lines_after_the_checkpoint_are_dropped(stopped, finished_run):
    with open(stopped / "log.jsonl", "a") as file:
        file.write(json.dumps({**log(stopped)[-1], "epoch": 3, "clean": -1.0}) + "\n")
        file.write('{"epoch": 4, "cle')
    resume(stopped)
    assert same_training(stopped, finished_run)
    assert without_clock(log(stopped)) == without_clock(log(finished_run))


def test_a_run_killed_before_its_first_checkpoint_takes_its_flags_from_args_json(
        pictures, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        train(*flags(pictures, out, "--epochs", "1", "--beta", "0.25"))
    assert not (out / "last.pt").exists()
    resume(out)
    assert saved(out)["args"]["beta"] == 0.25 and [line["epoch"] for line in log(out)] == [1]


# ---- (3) flags beside --resume

@pytest.mark.parametrize("flag, given, kept", [
    ("--lr", "0.5", "0.0001"), ("--members", "3", "2"), ("--epochs", "9", "4"),
    ("--attack-loss", "pal-label", "shift"), ("--seed", "1", "0"), ("--no-split", "False", "True")])
def test_resume_with_another_value_names_both(flag, given, kept, stopped, fails):
    before = contents(stopped)
    value = [] if flag == "--no-split" else [given]
    fails(2, [flag.replace("no-", ""), given, kept], eat, "--resume", "--out", stopped, flag,
          *value)
    assert contents(stopped) == before


def test_resume_with_the_same_flags_and_another_machine_is_fine(stopped, finished_run, pictures):
    resume(stopped, *flags(pictures, stopped, "--workers", "1", "--device", "auto"))
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert same_training(stopped, finished_run)


def test_resume_works_in_a_folder_that_was_moved(stopped, finished_run, tmp_path):
    moved = stopped.rename(tmp_path / "moved")
    resume(moved)
    assert same_training(moved, finished_run) and not stopped.exists()


def test_resume_together_with_overwrite_is_refused(stopped, fails):
    before = contents(stopped)
    fails(2, ["--resume", "--overwrite"], eat, "--out", stopped, "--resume", "--overwrite")
    assert contents(stopped) == before


def test_resume_without_any_run_starts_at_the_beginning(pictures, tmp_path):
    resume(tmp_path / "new", *flags(pictures, tmp_path / "new", "--epochs", "1"))
    assert [line["epoch"] for line in log(tmp_path / "new")] == [1]


# ---- (4) a folder that holds a run

@pytest.mark.parametrize("kept", ["args.json", "last.pt"])
def test_a_second_run_in_the_same_folder_is_refused(kept, finished, pictures, fails):
    for name in OUR_FILES - {kept}:
        (finished / name).unlink()
    before = contents(finished)
    fails(2, ["--resume", "--overwrite", "--out"], eat, *flags(pictures, finished))
    assert contents(finished) == before


def test_overwrite_replaces_only_our_four_files(finished, pictures):
    (finished / "notes.txt").write_text("mine")
    (finished / "figures").mkdir()
    (finished / "figures" / "one.png").write_bytes(b"mine too")
    before = contents(finished)
    train(*flags(pictures, finished, "--overwrite", "--seed", "1", "--epochs", "2"))
    after = contents(finished)
    assert set(after) == set(before)
    assert {name for name in before if after[name] != before[name]} == OUR_FILES
    assert [line["epoch"] for line in log(finished)] == [1, 2] and stored(finished)["seed"] == 1


def test_overwrite_keeps_the_old_checkpoint_until_the_first_new_one(finished, pictures,
                                                                    monkeypatch):
    old = (finished / "last.pt").read_bytes()
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        train(*flags(pictures, finished, "--overwrite", "--seed", "1", "--epochs", "2"))
    assert (finished / "last.pt").read_bytes() == old and saved(finished)["epoch"] == 4
    resume(finished)                             # the new run, from its beginning
    assert [line["epoch"] for line in log(finished)] == [1, 2]
    assert saved(finished)["args"]["seed"] == 1 and saved(finished)["epoch"] == 2
    fresh = finished.with_name("fresh")
    train(*flags(pictures, fresh, "--seed", "1", "--epochs", "2"))
    assert same_training(finished, fresh)


def test_an_overwritten_run_is_not_continued_even_with_the_same_flags(finished, pictures,
                                                                      monkeypatch):
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        train(*flags(pictures, finished, "--overwrite"))
    resume(finished)
    assert [line["epoch"] for line in log(finished)] == [1, 2, 3, 4]


# ---- (5) interrupted

def test_ctrl_c_exits_with_130_and_leaves_a_complete_checkpoint(pictures, tmp_path):
    out = tmp_path / "run"
    process = start("eat", flags(pictures, out, "--epochs", "200"), tmp_path / "output")
    wait_for_log_lines(process, out, 2)          # epoch 1 is saved, epoch 2 perhaps
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert (tmp_path / "output" / "stderr").read_text() == "interrupted\n"
    assert 1 <= saved(out)["epoch"] <= len(log(out)) < 200


# ---- (6) workers

@pytest.mark.parametrize("cache_gb", ["4", "0"])
def test_results_do_not_depend_on_the_workers(cache_gb, pictures, tmp_path):
    for workers in ("0", "2"):
        train(*flags(pictures, tmp_path / workers, "--epochs", "1", "--workers", workers,
                     "--cache-gb", cache_gb))
    assert same_training(tmp_path / "0", tmp_path / "2")
    assert without_seconds(stored(tmp_path / "0")) == without_seconds(stored(tmp_path / "2"))


# ---- (7) every option runs

@pytest.mark.parametrize("options", [
    "--members 1 --no-split", "--no-split", "--own-batches", "--own-batches --no-split",
    "--attack-loss pal-pseudo", "--attack-loss pal-label", "--attack-loss pal-batch",
    "--val-classes 1", "--batch-size 3 --images-per-class 2", "--eps-ramp-epochs 2",
    "--plain-epochs 1", "--attack-steps 0", "--beta 1", "--eps 0", "--amp"])
def test_every_option_runs(options, pictures, tmp_path):
    train(*flags(pictures, tmp_path / "run", "--epochs", "1", *options.split()))
    results = stored(tmp_path / "run")
    assert results["epoch"] == 1
    assert results["clean"]["n_queries"] == (8 if "--val-classes" in options else 24)
    named = {"--no-split": "nosplit", "--beta 1": "beta1", "--attack-loss pal-pseudo": "pal-pseudo",
             "--attack-loss pal-label": "pal-label", "--attack-loss pal-batch": "pal-batch",
             "--own-batches": "ownbatches"}
    assert results["variant"] == "-".join(word for flag, word in named.items() if flag in options)
    assert results["undefended"]["epochs"] == (1 if "--plain-epochs" in options else 0)
    if "--members 1" in options:
        assert set(results["clean"]["by_rule"]) == {"member_1"}
        assert results["clean"]["rule"] == "member_1"


def test_one_member_cannot_be_split(pictures, tmp_path, fails):
    fails(2, ["--members 1", "--no-split"], eat, *flags(pictures, tmp_path / "x", "--members", "1"))


def test_the_default_folder_is_named_after_the_variant():
    assert eat.parse_args([]).out == "runs/eat-glyphs-convnet-s0"
    assert eat.parse_args(["--no-split", "--seed", "3"]).out == "runs/eat-nosplit-glyphs-convnet-s3"


def test_eval_every_logs_scores_and_does_not_change_the_training(pictures, tmp_path, finished_run):
    train(*flags(pictures, tmp_path / "run", "--eval-every", "2"))
    extra = {"clean_R@1", "clean_mAP@R", "robust_R@1", "robust_mAP@R"}
    assert [extra <= set(line) for line in log(tmp_path / "run")] == [False, True, False, True]
    assert same_training(tmp_path / "run", finished_run)


def test_limited_queries_are_marked(pictures, tmp_path):
    train(*flags(pictures, tmp_path / "run", "--epochs", "1", "--limit-queries", "10"))
    for entry in stored(tmp_path / "run")["robust"]:
        assert entry["limited"] is True and entry["n_queries"] == 10


def test_a_dry_run_prints_shapes_and_writes_nothing(pictures, tmp_path, capsys):
    train(*flags(pictures, tmp_path / "run", "--dry-run"))
    assert "(12, 3, 32, 32)" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_leaves_a_run_that_is_there_alone(finished, pictures):
    before = contents(finished)
    train(*flags(pictures, finished, "--dry-run"))
    assert contents(finished) == before


def test_tensorboard_gets_the_scalars(pictures, tmp_path):
    pytest.importorskip("tensorboard")
    train(*flags(pictures, tmp_path / "run", "--epochs", "1", "--tensorboard"))
    assert any("tfevents" in name for name in contents(tmp_path / "run"))


# ---- (8) user errors: one line, exit code 2, nothing written

@pytest.mark.parametrize("bad, words", [
    ("--eps 8", "8/255"), ("--eps -1", "-1"), ("--eps 8/0", "8/0"), ("--eps nan", "nan"),
    ("--eps inf", "inf"), ("--eval-eps 8", "8/255"), ("--step-size 2", "2/255"),
    ("--attack-steps -1", "-1"), ("--attack-steps 1.5", "1.5"), ("--dataset nope", "nope"),
    ("--arch nope", "nope"), ("--batch-size 100000", "100000"), ("--batch-size 0", "0"),
    ("--embedding-dim 0", "0"), ("--members 0", "0"), ("--members 25", "25"), ("--beta 1.1", "1.1"),
    ("--lr -1", "-1"), ("--lr nan", "nan"), ("--seed -1", "-1"), ("--device nope", "nope"),
    ("--epoch 3", "--epoch"), ("--att 1", "--att"), ("--epochs", "--epochs"),
    ("--val-classes 3", "--val-classes 3"), ("--images-per-class 9", "9"),
    ("--images-per-class 13", "13"), ("--limit-queries 1", "1"),
    ("--attack-loss nope", "nope"), ("--data-root nowhere", "nowhere"),
    ("--arch resnet18 --weights nowhere.pth", "nowhere.pth"), ("--arch convnet --weights imagenet",
                                                               "convnet")])
def test_a_bad_value_is_one_line_and_nothing_is_written(bad, words, pictures, tmp_path, fails):
    fails(2, [words], eat, *flags(pictures, tmp_path / "run", *bad.split()))
    assert not contents(tmp_path), "a refused run leaves nothing behind"


def test_a_missing_gpu_is_one_line(pictures, tmp_path, fails):
    fails(2, ["cuda:99", "--device cpu"], eat, *flags(pictures, tmp_path / "run",
                                                      "--device", "cuda:99"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["other architecture", "web page", "noise", "list", "run"])
def test_weights_that_are_none_are_one_line(content, pictures, tmp_path, finished_run, fails):
    path = tmp_path / "weights.pth"
    if content == "other architecture":
        torch.save(common.build_model("convnet").backbone.state_dict(), path)
    elif content == "list":
        torch.save([torch.zeros(2)], path)
    elif content == "run":
        shutil.copy(finished_run / "last.pt", path)
    else:
        path.write_bytes(b"<!DOCTYPE html>" if content == "web page" else os.urandom(500))
    fails(2, ["weights.pth"], eat, *flags(pictures, tmp_path / "run", "--arch", "resnet18",
                                          "--weights", str(path)))
    assert not (tmp_path / "run").exists()


def test_a_truncated_checkpoint_is_one_line(stopped, fails):
    whole = (stopped / "last.pt").read_bytes()
    for length in (0, 100, len(whole) // 2):
        (stopped / "last.pt").write_bytes(whole[:length])
        before = contents(stopped)
        fails(2, ["last.pt"], eat, "--resume", "--out", stopped)
        fails(2, ["last.pt"], evaluator, stopped)
        assert contents(stopped) == before


def test_a_damaged_args_json_is_one_line(stopped, fails):
    (stopped / "last.pt").unlink()                   # else the flags come from there
    (stopped / "args.json").write_text('{"seed": ')
    fails(2, ["args.json"], eat, "--resume", "--out", stopped)


def test_out_that_is_a_file_is_one_line(pictures, tmp_path, fails):
    (tmp_path / "file").write_text("mine")
    fails(2, ["file", "--out"], eat, *flags(pictures, tmp_path / "file"))
    fails(2, ["file", "--out"], eat, *flags(pictures, tmp_path / "file" / "run"))
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_damaged_picture_is_one_line_that_names_it(pictures, tmp_path, fails):
    broken = shutil.copytree(pictures, tmp_path / "pictures") / "class1" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    fails(2, [str(broken)], eat, *flags(tmp_path / "pictures", tmp_path / "run"))


# ---- (9) a full disk

def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(stopped, tmp_path):
    before = saved(stopped)
    output = tmp_path / "output"
    process = start("eat", ["--resume", "--out", stopped], output, file_limit=20_000)
    process.join()
    error = (output / "stderr").read_text()
    assert process.exitcode == 1, error
    assert error.count("\n") == 1 and str(stopped / "last.pt") in error
    assert same_bits(saved(stopped), before) and set(contents(stopped)) == OUR_FILES - \
        {"results.json"}


@pytest.mark.parametrize("name", ["last.pt", "results.json", "args.json"])
def test_no_space_left_is_one_line(name, pictures, tmp_path, monkeypatch, fails):
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    good = "last.pt" if name == "results.json" else "none"
    fails(1, [name, "No space left", f"{good}"], eat,
          *flags(pictures, tmp_path / "run", "--epochs", "1"))
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert name == "results.json" or not (tmp_path / "run" / "last.pt").exists()


# ---- (10) two files are enough

def test_a_script_and_common_alone_run_to_the_end(pictures, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    program, rows = ["import os, runpy, sys"], {}       # one process: torch is imported once
    for script, method, row in (("eat.py", "eat", "eat vote"), ("baselines.py", "act", "act "),
                                ("panum_at.py", "panum", "panum "),
                                ("hardness_manipulation.py", "hm", "HM[S,g_LGA]")):
        place, rows[method] = tmp_path / method, row
        place.mkdir()
        for name in (script, "common.py"):
            shutil.copy(ROOT / name, place / name)
        argv = [script, *map(str, flags(pictures, "run", "--epochs", "1", method=method))]
        program.append(f"os.chdir({str(place)!r}); sys.path[0], sys.argv = os.getcwd(), {argv!r}; "
                       "sys.modules.pop('common', None)")
        program.append(f"print('### {method}'); runpy.run_path({script!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], cwd=tmp_path, text=True,
                          capture_output=True, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    shown = dict(part.split("\n", 1) for part in done.stdout.split("### ")[1:])
    for method, row in rows.items():
        assert set(contents(tmp_path / method / "run")) == OUR_FILES and row in shown[method]


# ---- (11) eval.py

def test_eval_adds_entries_once_and_reads_them_back(finished, capsys, monkeypatch):
    before, checkpoint = stored(finished), (finished / "last.pt").read_bytes()
    command = [finished, "--protocol", "template", "--attack-steps", "1", "--workers", "0"]
    evaluate(*command)
    shown = capsys.readouterr().out.splitlines()[-8:]
    added = stored(finished)["robust"]
    assert added[:6] == before["robust"] and len(added) == 12
    assert {entry["rule"] for entry in added[6:]} == RULES
    for entry in added[6:]:
        assert entry["protocol"] == "template" and entry["objective"] == "neighbour"
        assert entry["eps"] == 0.01 and entry["NMI"] is None
    with monkeypatch.context() as patch:
        patch.setattr(common, "evaluate_set", must_not_run)
        evaluate(*command)
        assert stored(finished)["robust"] == added
        assert capsys.readouterr().out.splitlines()[-8:] == shown
        with pytest.raises(AssertionError):      # other parameters: another entry
            evaluate(*command, "--eps", "0.02")
        with pytest.raises(AssertionError):
            evaluate(*command, "--overwrite")
    evaluate(*command, "--overwrite")
    after = stored(finished)
    assert without_seconds(after)["robust"] == without_seconds({**after, "robust": added})["robust"]
    assert {k: v for k, v in after.items() if k != "robust"} == \
        {k: v for k, v in before.items() if k != "robust"}
    assert (finished / "last.pt").read_bytes() == checkpoint


def test_eval_agrees_with_the_closing_evaluation(finished, pictures):
    closing = stored(finished)["robust"]
    evaluate(finished, "--overwrite", "--attack-steps", "1", "--eps", "8/255", "--step-size",
             "2/255", "--workers", "0", "--data-root", pictures)
    again = stored(finished)["robust"]
    assert len(again) == len(closing)
    for first, second in zip(closing, again):
        for name in METRICS:
            assert second[name] == pytest.approx(first[name], abs=1e-9), name


def test_eval_shows_two_runs_in_one_table(finished, tmp_path, capsys):
    other = shutil.copytree(finished, tmp_path / "other")
    evaluate(finished, other, "--attack-steps", "1", "--workers", "0")
    output = capsys.readouterr().out
    assert "finished vote" in output and "other vote" in output
    assert output.count("mAP@R") == 2            # one header: clean and attacked


def test_eval_takes_patterns_and_counts_a_run_once(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "final")
    evaluate(tmp_path / "fin*", f"{finished}/", "--attack-steps", "1", "--workers", "0")
    output = capsys.readouterr().out
    assert output.count("final vote") == output.count("finished vote") == 1


def test_eval_of_a_bare_checkpoint_only_prints(finished, tmp_path, capsys):
    bare = shutil.copy(finished / "last.pt", tmp_path / "model.pt")
    before = contents(tmp_path)
    evaluate(bare, "--attack-steps", "1", "--workers", "0")
    evaluate(finished / "last.pt", "--attack-steps", "1", "--workers", "0")
    assert "model vote" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_eval_writes_json(finished, tmp_path, fails):
    evaluate(finished, "--attack-steps", "1", "--workers", "0", "--json", tmp_path / "all.json")
    content = json.loads((tmp_path / "all.json").read_text())
    assert content[0]["run"] == "finished" and len(content[0]["robust"]) == 6
    for _ in range(2):                           # measured, then read back
        evaluate(finished, "--amp", *HERE, "--json", tmp_path / "amp.json")
        content = json.loads((tmp_path / "amp.json").read_text())
        assert [entry["amp"] for entry in content[0]["robust"]] == [True] * 6
    fails(2, ["--json"], evaluator, finished, "--json", tmp_path / "no" / "all.json")


def test_eval_of_a_dry_run_writes_nothing(finished):
    before = contents(finished)
    evaluate(finished, "--attack-steps", "2", "--workers", "0", "--dry-run")
    assert contents(finished) == before


@pytest.mark.parametrize("options, expected", [
    ("--attack fgsm", {"attack": "fgsm", "steps": 1}),
    ("--attack fgsm --protocol template", {"attack": "fgsm", "random_start": False}),
    ("--restarts 2 --attack-steps 1", {"restarts": 2}),
    ("--eps 4/255 --attack-steps 2", {"steps": 2, "eps": 4 / 255, "step": 1 / 255}),
    ("--protocol template --objective shift --attack-steps 1", {"objective": "shift"}),
    ("--protocol template --attack cw --attack-steps 1 --eps 0.01",
     {"attack": "cw", "objective": "neighbour", "step": 0.001, "steps": 1}),
    ("--protocol template --template-target self --attack-steps 1", {"objective": "self"}),
    ("--protocol template --min-eps --attack-steps 1", {"attack": "min-eps", "eps": 32 / 255}),
    ("--protocol template --objective targeted-random --attack-steps 1",
     {"objective": "targeted-random"}),
    ("--limit-queries 10 --attack-steps 1", {"limited": True, "n_queries": 10}),
    ("--amp --attack-steps 1", {"amp": True}), ("--seed 5 --attack-steps 1", {"seed": 5})])
def test_eval_options_stand_in_the_entries(options, expected, finished, monkeypatch):
    clean = stored(finished)["clean"]
    evaluate(finished, "--workers", "0", *options.split())
    results = stored(finished)
    assert len(results["robust"]) == 12 and results["clean"] == clean
    for entry in results["robust"][6:]:
        for name, value in expected.items():
            assert entry[name] == pytest.approx(value) if name in ("eps", "step") else \
                entry[name] == value, name
    monkeypatch.setattr(common, "evaluate_set", must_not_run)
    evaluate(finished, "--workers", "0", *options.split())


def test_a_table_of_a_subset_says_so_and_has_its_clean_scores(finished, tmp_path, capsys):
    for name in ("first", "again"):              # the second one reads everything back
        evaluate(finished, "--workers", "0", "--limit-queries", "10", "--attack-steps", "1",
                 "--rules", "vote", "--table", tmp_path / name)
    first, again = (json.loads((tmp_path / f"{name}.json").read_text())
                    for name in ("first", "again"))
    assert first["rows"] == again["rows"] and "subset of 10 images" in first["title"]
    clean = first["rows"][0]["clean"]["R@1"][0]
    assert clean == stored(finished)["robust"][-6]["clean"]["R@1"]
    assert first["rows"][0]["clean"]["NMI_chance"][0] != stored(finished)["clean"]["NMI_chance"]
    assert "a fixed subset of 10 images" in (tmp_path / "again.md").read_text()


def test_eval_of_more_queries_than_there_are_adds_its_entries_once(finished):
    for _ in range(2):
        evaluate(finished, "--workers", "0", "--attack-steps", "2", "--limit-queries", "100")
    assert len(stored(finished)["robust"]) == 12


def test_eval_of_an_unfinished_run_stores_nothing(stopped, capsys):
    before = contents(stopped)
    evaluate(stopped, "--attack-steps", "1", "--workers", "0")
    assert "2 of 4 epochs" in capsys.readouterr().out
    assert contents(stopped) == before


@pytest.mark.parametrize("bad, words", [
    ("--objective shift --no-random-start", "random start"), ("--objective neighbour", "template"),
    ("--eps 8", "8/255"), ("--attack-steps -1", "-1"), ("--restarts 0", "0"),
    ("--attack cw", "template"), ("--min-eps", "template"), ("--template-target self", "template"),
    ("--protocol template --template-target self --objective shift", "neighbour"),
    ("--protocol template --attack cw --restarts 2", "--restarts 2"),
    ("--protocol ers", "100 images"), ("--protocol ers --attack fgsm", "its own attacks"),
    ("--ers-variant authors", "--protocol ers"),
    ("--objective targeted-nearest", "template"), ("--metrics R@1", "--table"),
    ("--rest 2", "--rest"), ("--protocol nope", "nope"), ("--device nope", "nope"),
    ("--data-root nowhere", "nowhere")])
def test_a_bad_value_for_eval_is_one_line(bad, words, finished, fails):
    before = contents(finished)
    fails(2, [words], evaluator, finished, *bad.split())
    assert contents(finished) == before


def test_eval_of_something_else_is_one_line(tmp_path, fails):
    fails(2, ["nowhere"], evaluator, tmp_path / "nowhere")
    fails(2, ["last.pt"], evaluator, tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    fails(2, ["other.pt"], evaluator, tmp_path / "other.pt")


def test_load_model_gives_the_members_in_eval_mode(finished_run):
    members = common.load_model(finished_run)
    assert len(members) == 2 and not any(member.training for member in members)
    assert members[0](torch.rand(2, 3, 32, 32)).shape == (2, 8)


# ---- (12) a loss that is not finite

def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(stopped, monkeypatch, fails):
    before = (stopped / "last.pt").read_bytes()
    monkeypatch.setattr(eat, "proxy_anchor_loss",
                        lambda embeddings, labels, proxies: embeddings.sum() * float("nan"))
    with pytest.raises(common.RunFailed, match="last.pt"):
        resume(stopped)
    fails(1, ["epoch 3", str(stopped / "last.pt")], eat, "--resume", "--out", stopped)
    assert (stopped / "last.pt").read_bytes() == before


# ---- (13) defaults

def test_the_papers_setting_is_the_default():
    args = eat.parse_args(["--dataset", "cub", "--arch", "mobilenetv2"])
    assert (args.members, args.beta, args.split, args.attack_loss) == (3, 0.5, True, "shift")
    assert (args.eps, args.step_size, args.attack_steps) == (16 / 255, 4 / 255, 10)
    assert (args.eval_eps, args.eval_step_size, args.eval_steps) == (8 / 255, 2 / 255, 10)
    assert (args.lr, args.weight_decay, args.batch_size, args.epochs) == (1e-4, 1e-4, 120, 200)
    assert (args.embedding_dim, args.image_size, args.warmup_epochs) == (128, 224, 1)
    assert (args.weights, args.freeze_bn, args.own_batches) == ("imagenet", True, False)
    assert (args.images_per_class, args.eps_ramp_epochs, args.plain_epochs) == (0, 0, 0)
    assert args.out == "runs/eat-cub-mobilenetv2-s0"


def test_without_pretrained_weights_nothing_is_frozen_or_warmed_up():
    args = eat.parse_args(["--dataset", "cub", "--arch", "mobilenetv2", "--weights", "none"])
    assert args.freeze_bn is False and args.warmup_epochs == 0
    args = eat.parse_args(["--dataset", "cub", "--weights", "none", "--freeze-bn",
                           "--warmup-epochs", "2"])
    assert args.freeze_bn is True and args.warmup_epochs == 2


# ---- (14) who trains on what

@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_are_equal_stratified_and_fixed_by_the_seed(parts):
    labels = torch.arange(7).repeat_interleave(torch.tensor([3, 10, 1, 4, 8, 5, 2]))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    part = common.split_by_image(labels, parts, seed=0)
    sizes = torch.bincount(part, minlength=parts)
    assert len(sizes) == parts and sizes.max() - sizes.min() <= 1
    for label in labels.unique():
        own = torch.bincount(part[labels == label], minlength=parts)
        assert own.max() - own.min() <= 1
    assert torch.equal(part, common.split_by_image(labels, parts, seed=0))
    assert parts == 1 or not torch.equal(part, common.split_by_image(labels, parts, seed=1))


def who_saw_what(monkeypatch):
    """Record every call of member_loss: [(member, numbers of its images)], in order."""
    row_of, calls, members = {}, [], []
    load, loss = eat.load_batches, eat.member_loss

    def load_and_note(*arguments, **options):
        for images, labels, rows in load(*arguments, **options):
            row_of.update((image.numpy().tobytes(), row)
                          for image, row in zip(images, rows.tolist()))
            yield images, labels, rows

    def note_and_compute(member, proxies, images, adversarial, labels, beta):
        if not any(member is known for known in members):
            members.append(member)
        number = next(i for i, known in enumerate(members) if known is member)
        calls.append((number, [row_of[image.numpy().tobytes()] for image in images]))
        assert len(images) == len(adversarial) == len(labels)
        return loss(member, proxies, images, adversarial, labels, beta)

    monkeypatch.setattr(eat, "load_batches", load_and_note)
    monkeypatch.setattr(eat, "member_loss", note_and_compute)
    return calls


@pytest.mark.parametrize("own_batches", [False, True])
def test_member_i_never_trains_on_part_i(own_batches, pictures, tmp_path, monkeypatch):
    calls = who_saw_what(monkeypatch)
    train(*flags(pictures, tmp_path / "run", "--members", "3", "--epochs", "2",
                 *(["--own-batches"] if own_batches else [])))
    labels = torch.arange(3).repeat_interleave(8)
    part = common.split_by_image(labels, 3, seed=0).tolist()
    assert {number for number, _ in calls} == {0, 1, 2}
    for number, rows in calls:
        assert all(part[row] != number for row in rows)


def test_a_batch_is_drawn_so_that_each_member_sees_the_batch_size(pictures, tmp_path,
                                                                  monkeypatch):
    calls = who_saw_what(monkeypatch)
    train(*flags(pictures, tmp_path / "run", "--members", "3", "--epochs", "2"))
    assert len(calls) == 2 * 2 * 3               # epochs, batches of 9 out of 24 images, members
    for step in range(0, len(calls), 3):
        sizes = [len(rows) for _, rows in calls[step:step + 3]]
        assert sum(sizes) == 3 * 6               # --batch-size 6 on average over the members
        drawn = {row for _, rows in calls[step:step + 3] for row in rows}
        assert len(drawn) == 9                   # everything that was drawn and attacked is used


@pytest.mark.parametrize("options", ["--no-split", "--own-batches"])
def test_otherwise_every_member_sees_exactly_the_batch_size(options, pictures, tmp_path,
                                                            monkeypatch):
    calls = who_saw_what(monkeypatch)
    train(*flags(pictures, tmp_path / "run", "--members", "3", "--epochs", "1", options))
    assert {len(rows) for _, rows in calls} == {6}
    same = [calls[0][1] == calls[i][1] for i in (1, 2)]
    assert same == [options == "--no-split"] * 2     # own batches are drawn one by one


def test_members_start_from_different_weights_and_proxies(pictures, tmp_path):
    args = eat.parse_args(flags(pictures, tmp_path / "run"))
    first, second, again = (common.new_member(args, "cpu", i).state_dict() for i in (0, 1, 0))
    assert same_bits(first, again) and not same_bits(first, second)
    first, second, again = (common.new_proxies(args, 3, "cpu", i) for i in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)


# ---- (15) baselines.py: a run's folder

TERMS = {"natural": {"clean"}, "at": {"clean", "adversarial"}, "mixup": {"mixed"},
         "iat": {"mixed", "mixed_adversarial"}, "trades": {"clean", "shift"},
         "ensemble": {"clean", "adversarial"}, "est": {"adversarial"}, "act": {"adversarial"}}
TRIPLET = ("est", "act")
every_method = pytest.mark.parametrize("method", TERMS)


@pytest.fixture
def copied(baseline_run, tmp_path):
    """copied(method): a complete run of it that may be changed."""
    return lambda method: shutil.copytree(baseline_run(method), tmp_path / f"copied-{method}")


@pytest.fixture(scope="session")
def lone_eat_run(pictures, tmp_path_factory):
    """EAT with one member, and its undefended network trained as long; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "lone"
    train(*flags(pictures, out, "--members", "1", "--no-split", "--plain-epochs", "4"))
    return out


def test_every_method_is_tested():
    assert tuple(TERMS) == baselines.METHODS and TRIPLET == baselines.TRIPLET


@every_method
def test_every_method_writes_the_same_four_files(method, baseline_run):
    out, count = baseline_run(method), 2 if method == "ensemble" else 1
    assert set(contents(out)) == OUR_FILES
    assert json.loads((out / "args.json").read_text())["method"] == method
    checkpoint = saved(out)
    assert (checkpoint["method"], checkpoint["epoch"]) == (method, 4)
    sizes = [len(checkpoint[part]) for part in ("members", "proxies", "optimizers", "schedulers")]
    assert sizes == ([1, 0, 1, 1] if method in TRIPLET else [count] * 4)
    assert len(common.load_model(out)) == count


@every_method
def test_every_method_logs_the_terms_of_its_loss(method, baseline_run):
    lines = log(baseline_run(method))
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert set(line) == TERMS[method] | {"epoch", "lr", "seconds", "images_per_second",
                                             "collapse"}
        assert all(line[term] > 0 for term in TERMS[method]) and -1 <= line["collapse"] <= 1
    rates = [1e-5] * 4 if method in TRIPLET else [1e-4, 1e-4, 1e-5, 1e-6]
    assert [line["lr"] for line in lines] == pytest.approx(rates)


@every_method
def test_every_method_reports_on_its_protocols(method, baseline_run):
    results = stored(baseline_run(method))
    rules = RULES if method == "ensemble" else {"member_1"}
    assert set(results) == RESULTS | (set() if method == "natural" else {"undefended"})
    assert (results["method"], results["variant"], results["epoch"]) == (method, "", 4)
    assert SCORES <= set(results["clean"]) and set(results["clean"]["by_rule"]) == rules
    protocols = {"clustering", "template"} if method in TRIPLET else {"clustering"}
    assert {(entry["protocol"], entry["rule"]) for entry in results["robust"]} == \
        set(itertools.product(protocols, rules))
    for entry in results["robust"]:
        assert ENTRY <= set(entry) and entry["steps"] == 1
        assert entry["eps_255"] == pytest.approx(8) and entry["step_255"] == pytest.approx(2)
        assert (entry["NMI"] is None) == (entry["protocol"] == "template")


@pytest.mark.parametrize("options, variant", [
    ("natural --crop square", ""), ("natural --val-classes 1", ""), ("natural --amp", ""),
    ("at --beta 0", "beta0"), ("at --eps-ramp-epochs 2", ""), ("at --eval-every 1", ""),
    ("at --images-per-class 2", ""), ("at --attack-steps 0 --eps 0", ""),
    ("mixup --mixup-target embedding", "embedding"), ("mixup --mixup-alpha 0", "alpha0"),
    ("iat --mixup-alpha 0.2", "alpha0.2"),
    ("trades --trades-start uniform --trades-lambda 1", "lambda1-uniform"),
    ("ensemble --members-method natural", "natural"), ("ensemble --split", "split"),
    ("ensemble --split --batch-size 3 --images-per-class 2", "split"),
    ("est --source semihard --eval-every 1", "semihard"), ("est --source distance", "distance"),
    ("est --crop resized --batch-size 4", ""), ("act --source hardest", "hardest"),
    ("act --source softhard --limit-queries 10", "softhard")])
def test_every_option_of_the_baselines_runs(options, variant, pictures, tmp_path):
    method, *more = options.split()
    train_baseline(method, pictures, tmp_path / "run", "--epochs", "1", *more)
    results = stored(tmp_path / "run")
    assert (results["method"], results["variant"], results["epoch"]) == (method, variant, 1)
    assert results["clean"]["n_queries"] == \
        (8 if "--val-classes" in more else 10 if "--limit-queries" in more else 24)
    extra = {"clean_R@1", "clean_mAP@R", "robust_R@1", "robust_mAP@R"}
    assert (extra <= set(log(tmp_path / "run")[0])) == ("--eval-every" in more)


@every_method
def test_a_dry_run_of_a_method_writes_nothing(method, pictures, tmp_path, capsys):
    train_baseline(method, pictures, tmp_path / "run", "--dry-run")
    shown = capsys.readouterr().out
    assert "one batch of (6, 3, 32, 32)" in shown and "mAP@R" in shown
    assert all(f"{term} " in shown for term in TERMS[method])
    assert not (tmp_path / "run").exists()


# ---- (16) baselines.py: killed and resumed

@every_method
def test_a_method_interrupted_and_resumed_ends_bit_for_bit_the_same(method, baseline_run, pictures,
                                                                    tmp_path):
    out, whole = tmp_path / "run", baseline_run(method)
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        interrupt_after(monkeypatch, 2)
        train_baseline(method, pictures, out)
    assert saved(out)["epoch"] == 2
    resume(out, script=baselines)                # --method comes from the folder too
    assert same_training(out, whole) and without_clock(log(out)) == without_clock(log(whole))
    assert without_seconds(stored(out)) == without_seconds(stored(whole))


def test_a_killed_ensemble_that_is_resumed_ends_bit_for_bit_the_same(pictures, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    twelve = ("--epochs", "12")
    process = start("baselines", flags(pictures, killed, *twelve, method="ensemble"),
                    tmp_path / "output")
    wait_for_log_lines(process, killed, 2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (killed / "results.json").exists()
    resume(killed, script=baselines)
    train_baseline("ensemble", pictures, whole, *twelve)
    assert same_training(killed, whole)
    assert without_seconds(stored(killed)) == without_seconds(stored(whole))


@pytest.mark.parametrize("method", ["ensemble", "est"])
def test_resuming_a_complete_baseline_prints_its_tables_and_changes_nothing(method, copied, capsys,
                                                                            monkeypatch):
    out = copied(method)
    before = contents(out)
    monkeypatch.setattr(common, "evaluate_set", must_not_run)
    monkeypatch.setattr(baselines, "load_batches", must_not_run)
    resume(out, script=baselines)
    shown = capsys.readouterr().out
    assert ("ensemble vote" if method == "ensemble" else "est ") in shown
    assert ("template: neighbour" in shown) == (method == "est") and "clustering: shift" in shown
    assert contents(out) == before


@pytest.mark.parametrize("flag, given, kept", [
    ("--method", "mixup", "at"), ("--method", "est", "at"), ("--beta", "0.1", "0.5"),
    ("--lr", "0.5", "0.0001"), ("--crop", "square", "resized")])
def test_resuming_a_baseline_with_another_value_names_both(flag, given, kept, copied, fails):
    out = copied("at")
    before = contents(out)
    fails(2, [f"{flag} is {given}", kept], baselines, "--resume", "--out", out, flag, given)
    assert contents(out) == before


def test_a_second_baseline_in_the_same_folder_is_refused(copied, pictures, fails):
    out = copied("at")
    before = contents(out)
    for method in ("at", "est"):
        fails(2, ["--resume", "--overwrite", "--out"], baselines,
              *flags(pictures, out, method=method))
    assert contents(out) == before


def test_overwrite_replaces_a_run_by_one_of_another_method(copied, pictures):
    out = copied("at")
    (out / "notes.txt").write_text("mine")
    train_baseline("est", pictures, out, "--overwrite", "--epochs", "1")
    assert set(contents(out)) == OUR_FILES | {"notes.txt"}
    assert stored(out)["method"] == saved(out)["method"] == "est" and len(log(out)) == 1


@pytest.mark.parametrize("has_checkpoint", [True, False])
@pytest.mark.parametrize("script, other", [(baselines, "eat"), (eat, "at")], ids=["eat", "at"])
def test_a_run_of_the_other_script_is_not_continued(script, other, has_checkpoint, finished, copied,
                                                    fails):
    out = finished if other == "eat" else copied(other)
    if not has_checkpoint:                       # killed in its first epoch
        (out / "last.pt").unlink()
    before = contents(out)
    fails(2, [f"a run of {other}:", "--out"], script, "--resume", "--out", out)
    assert contents(out) == before


def test_pairs_of_one_class_alone_are_one_line(pictures, tmp_path, fails):
    out = tmp_path / "run"
    root = shutil.copytree(pictures, tmp_path / "pictures")
    for label in (1, 2):                         # one image each: pairs are of class0 alone
        for picture in sorted((root / f"class{label}").iterdir())[1:]:
            picture.unlink()
    fails(2, ["1 class", "that has two images"], baselines, *flags(root, out, "--batch-size", "4",
                                                         method="act"))
    assert not out.exists()


@pytest.mark.parametrize("method, loss", [("at", "proxy_anchor_loss"), ("est", "triplet_loss")])
def test_a_baselines_loss_that_is_not_finite_names_the_last_good_checkpoint(
        method, loss, pictures, tmp_path, monkeypatch, fails):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 2)
        train_baseline(method, pictures, out)
    before = (out / "last.pt").read_bytes()
    monkeypatch.setattr(baselines, loss, lambda rows, *_: rows.sum() * float("nan"))
    fails(1, ["epoch 3", str(out / "last.pt")], baselines, "--resume", "--out", out)
    assert (out / "last.pt").read_bytes() == before


# ---- (17) baselines.py: user errors: one line, exit code 2, nothing written

@pytest.mark.parametrize("bad, words", [
    ("natural --method nope", "nope"), ("natural --method", "--method"), ("at --beta 2", "2"),
    ("natural --beta 0.1", "at, ensemble"), ("at --members 2", "ensemble"),
    ("at --source hardest", "est, act"), ("est --trades-lambda 1", "trades"),
    ("ensemble --members 1 --split", "drop --split"), ("ensemble --members 25 --split", "25"),
    ("ensemble --members-method natural --beta 0.1", "--members-method"),
    ("est --batch-size 5", "5"), ("act --images-per-class 2", "--images-per-class"),
    ("at --images-per-class 9", "9"), ("at --val-classes 2", "1 class to train on"),
    ("trades --trades-lambda -1", "-1"), ("mixup --mixup-alpha inf", "inf")])
def test_a_bad_value_for_a_baseline_is_one_line_and_nothing_is_written(bad, words, pictures,
                                                                       tmp_path, fails):
    method, *more = bad.split()
    fails(2, [words], baselines, *flags(pictures, tmp_path / "run", *more, method=method))
    assert not contents(tmp_path), "a refused run leaves nothing behind"


def test_a_batch_that_only_a_later_member_cannot_have_fails_before_training(pictures, tmp_path,
                                                                            fails):
    data = tmp_path / "data"                     # class0 has one image, class1 three: the second
    for name, count in (("class0", 1), ("class1", 3), ("class2", 4), ("class3", 4)):
        (data / name).mkdir(parents=True)        # member is left with 1 + 1 of them
        for i in range(count):
            shutil.copy(pictures / name / f"{i}.png", data / name)
    fails(2, ["--images-per-class"], baselines, *flags(
        data, tmp_path / "run", "--split", "--batch-size", "2", "--images-per-class", "2",
        method="ensemble"))
    assert not (tmp_path / "run").exists()


# ---- (18) what the methods share

def test_at_is_eat_with_one_member(baseline_run, lone_eat_run):
    assert same_training(baseline_run("at"), lone_eat_run)
    assert without_clock(log(baseline_run("at"))) == without_clock(log(lone_eat_run))
    assert without_seconds(stored(baseline_run("at"))) == without_seconds(stored(lone_eat_run))


def test_the_undefended_network_of_triplets_is_est_without_an_attack(pictures, tmp_path):
    train_baseline("act", pictures, tmp_path / "act", "--plain-epochs", "4")
    train_baseline("est", pictures, tmp_path / "est", "--eps", "0", "--attack-steps", "0")
    own, undefended = stored(tmp_path / "est"), stored(tmp_path / "act")["undefended"]
    assert undefended["epochs"] == 4 and own["clean"] == undefended["clean"]


@pytest.mark.parametrize("script", [eat, baselines])
def test_natural_is_the_undefended_network_of_the_others(script, baseline_run, lone_eat_run,
                                                         pictures, tmp_path):
    out = lone_eat_run
    if script is baselines:
        out = tmp_path / "run"
        train_baseline("ensemble", pictures, out, "--split", "--plain-epochs", "4")
    own, undefended = stored(baseline_run("natural")), stored(out)["undefended"]
    assert undefended["epochs"] == 4 and own["clean"] == undefended["clean"]
    both = [without_seconds({**own, "robust": r}) for r in (own["robust"], undefended["robust"])]
    assert both[0] == both[1] and not same_members(baseline_run("natural"), baseline_run("at"))


def test_the_first_member_of_an_ensemble_is_the_at_run(baseline_run):
    assert same_members(baseline_run("at"), baseline_run("ensemble"))
    members = saved(baseline_run("ensemble"))["members"]
    assert not same_bits(members[0], members[1])


@pytest.mark.parametrize("count", [1, 3])
def test_members_of_an_ensemble_do_not_influence_each_other(count, baseline_run, pictures,
                                                            tmp_path):
    train_baseline("ensemble", pictures, tmp_path / "run", "--members", count)
    assert same_members(baseline_run("ensemble"), tmp_path / "run", min(count, 2))


@pytest.mark.parametrize("split", [True, False])
def test_member_i_of_a_split_ensemble_never_trains_on_part_i(split, pictures, tmp_path,
                                                             monkeypatch):
    seen, current = {}, []                       # {network: numbers of its images}, in order
    load, loss = baselines.load_batches, baselines.at

    def load_and_note(*arguments, **options):
        for images, labels, rows in load(*arguments, **options):
            current[:] = rows.tolist()
            yield images, labels, rows

    def note_and_compute(member, images, *rest):
        assert len(images) == len(current) == 6
        seen.setdefault(member, []).extend(current)
        return loss(member, images, *rest)

    monkeypatch.setattr(baselines, "load_batches", load_and_note)
    monkeypatch.setattr(baselines, "at", note_and_compute)
    train_baseline("ensemble", pictures, tmp_path / "run", "--members", "3",
                   *(["--split"] if split else []))
    part = common.split_by_image(torch.arange(3).repeat_interleave(8), 3, seed=0).tolist()
    assert len({tuple(rows) for rows in seen.values()}) == 3         # each draws its own batches
    for number, rows in enumerate(seen.values()):
        assert any(part[row] == number for row in rows) is not split
        assert {part[row] for row in rows} | {number} == {0, 1, 2}


@pytest.mark.parametrize("method, options", [
    ("ensemble", "--workers 2"), ("est", "--workers 2"), ("est", "--workers 1 --cache-gb 0")])
def test_baselines_do_not_depend_on_the_workers(method, options, baseline_run, pictures, tmp_path):
    out, usual = tmp_path / "run", baseline_run(method)
    train_baseline(method, pictures, out, *options.split())
    assert same_training(out, usual)
    assert without_seconds(stored(out)) == without_seconds(stored(usual))


def test_every_script_keeps_the_books_in_the_same_order():
    order = ["load_run_data", "claim_folder", "check_same_classes", "pick_device", "restore",
             "cache_images", "begin_run", "check_finite", "closing_evaluation", "log_epoch",
             "save_checkpoint", "closing_evaluation", "run_results", "write_atomic"]
    for script in (eat, baselines, panum_at, hardness_manipulation):
        (main,) = [node for node in ast.parse(Path(script.__file__).read_text()).body
                   if isinstance(node, ast.FunctionDef) and node.name == "main"]
        calls = [node for node in ast.walk(main) if isinstance(node, ast.Call)
                 and isinstance(node.func, ast.Attribute) and node.func.attr in order]
        calls.sort(key=lambda call: (call.lineno, call.col_offset))
        assert {call.func.value.id for call in calls} == {"common"}
        assert [name for name, _ in itertools.groupby(call.func.attr for call in calls)] == order


# ---- (19) eval.py: many runs in one table

HERE = ("--attack-steps", "1", "--workers", "0")


@pytest.fixture
def table_runs(baseline_run, finished_run, monkeypatch):
    """Five runs whose attacks are known already: nothing has to be computed."""
    runs = [*map(baseline_run, ("natural", "at", "ensemble", "est")), finished_run]
    monkeypatch.setattr(common, "evaluate_set", must_not_run)
    return runs


def first_words(output):
    """What the rows of a printed table are called."""
    return [line.split("|")[0].strip() for line in output.splitlines() if line.count("|") == 2][2:]


def test_eval_shows_every_method_in_one_table(table_runs, capsys):
    evaluate(*table_runs, *HERE)
    output = capsys.readouterr().out
    ensemble = ["vote", "member_mean", "member_1", "member_2", "concat", "mean"]
    assert output.count("mAP@R") == 2            # one header: clean and attacked
    assert sorted(first_words(output)) == sorted(
        ["natural", "at", "est", *(f"ensemble {rule}" for rule in ensemble),
         *(f"finished {rule}" for rule in ensemble),
         *(f"{run} not trained" for run in ("at", "est", "ensemble", "finished"))])
    assert "    -" not in output                 # est's other protocol has no NMI


def test_eval_shows_the_rules_that_are_asked_for(table_runs, capsys):
    evaluate(*table_runs, *HERE, "--rules", "vote", "concat")
    assert first_words(capsys.readouterr().out) == [
        "natural", "at", "ensemble vote", "ensemble concat", "est", "finished vote",
        "finished concat"]


@pytest.mark.parametrize("rules", ["best", "vote best", "member_0", "member_9"])
def test_a_rule_that_there_is_not_is_one_line(rules, table_runs, fails):
    fails(2, ["--rules", rules.split()[-1]], evaluator, table_runs[2], *HERE,
          "--rules", *rules.split())


@pytest.fixture
def seed_runs(baseline_run, pictures, tmp_path):
    """Two seeds of at and one of est, in folders that are named like a run's own."""
    for method in ("at", "est"):
        shutil.copytree(baseline_run(method), tmp_path / f"{method}-s0")
    train_baseline("at", pictures, tmp_path / "at-s1", "--seed", "1")
    return [tmp_path / name for name in ("at-s0", "at-s1", "est-s0")]


def test_a_table_has_the_flags_of_every_configuration_and_counts_its_seeds(seed_runs, pictures,
                                                                           tmp_path):
    evaluate(*seed_runs, *HERE, "--table", tmp_path / "table", "--rules", "vote")
    content = json.loads((tmp_path / "table.json").read_text())
    own, rows = content["flags"], content["rows"]
    assert [(row["name"], row["seeds"]) for row in rows] == [("at", [0, 1]), ("est", [0])]
    assert list(own) == ["at", "est"] and "flags_of_first_run" not in content
    assert [(own[name]["method"], own[name]["seed"]) for name in own] == [("at", 0), ("est", 0)]
    assert own["est"]["crop"] == "square" and own["at"]["data_root"] == pictures.name
    assert not any("/" in str(value) for flags in own.values() for value in flags.values())
    text = (tmp_path / "table.md").read_text()
    assert "| at | " in text and "| est (seeds: 1) | " in text and "; 2 seeds, mean ± std" in text
    at, est = (line for line in text.splitlines() if line.startswith(("| at ", "| est ")))
    assert "±" in at and "±" not in est


def test_a_table_of_equally_many_seeds_does_not_count_them(seed_runs, tmp_path):
    evaluate(seed_runs[0], seed_runs[2], *HERE, "--table", tmp_path / "table")
    text = (tmp_path / "table.md").read_text()
    assert "| at | " in text and "| est | " in text and "; 1 seed;" in text and "±" not in text


def test_a_table_is_put_between_its_marks(table_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = "# Mine\n\n<!-- other.md -->\n| other ± |\n<!-- end -->\n\n"
    after = "\n\nNext <!-- third.md -->\n| third |\n<!-- end -->\nno newline at the end"
    for old in ("", "| old |\n\n| older |\n"):
        Path("page.md").write_text(f"{before}<!-- own.md -->\n{old}<!-- end -->{after}")
        evaluate(*table_runs, *HERE, "--table", "own", "--into", "page.md")
        table = Path("own.md").read_text()
        assert "| ensemble vote | " in table
        assert Path("page.md").read_text() == \
            f"{before}<!-- own.md -->\n{table}<!-- end -->{after}"
    assert {path.name for path in tmp_path.iterdir()} == {"page.md", "own.md", "own.json"}


@pytest.mark.parametrize("page, words", [
    ("no marks", "own.md"), ("<!-- own.md -->\nno end", "end"), (None, "page.md"),
    ("<!-- end -->\n<!-- own.md -->\n", "end"), ("<!-- other.md -->\n<!-- end -->\n", "own.md"),
    ("<!-- own.md -->\n\n<!-- other.md -->\n| other |\n<!-- end -->\n", "own.md")])
def test_a_page_without_the_marks_is_refused_before_any_attack(page, words, table_runs, tmp_path,
                                                               monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    if page is not None:
        Path("page.md").write_text(page)
    before = contents(tmp_path)
    fails(2, [words], evaluator, *table_runs, "--attack-steps", "2", "--workers", "0",
          "--table", "own", "--into", "page.md")
    assert contents(tmp_path) == before


def test_into_without_a_table_is_one_line(tmp_path, fails):
    fails(2, ["--into", "--table"], evaluator, tmp_path, "--into", "page.md")


# ---- (20) panum_at.py

@pytest.fixture(scope="session")
def panum_run(pictures, tmp_path_factory):
    """A complete run, evaluated after every second epoch; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "panum-folder-convnet-s0"
    train(*flags(pictures, out, "--eval-every", "2", method="panum"), script=panum_at)
    return out


def test_a_panum_run_writes_the_same_four_files(panum_run):
    assert set(contents(panum_run)) == OUR_FILES
    assert json.loads((panum_run / "args.json").read_text())["method"] == "panum"
    checkpoint = saved(panum_run)
    assert (checkpoint["method"], checkpoint["epoch"], checkpoint["proxies"]) == ("panum", 4, [])
    assert len(common.load_model(panum_run)) == 1


def test_a_panum_run_logs_its_terms_and_scores(panum_run):
    for line in log(panum_run):
        scores = {"clean_R@1", "clean_mAP@R", "robust_R@1", "robust_mAP@R"}
        assert set(line) == {"epoch", "loss", "clean", "attacked", "lr", "seconds", "collapse",
                             "images_per_second", *(scores if line["epoch"] % 2 == 0 else ())}
        assert line["lr"] == 1e-5 and 0 <= line["attacked"] <= 1 and line["loss"] > 0
    assert 0 < sum(line["attacked"] for line in log(panum_run)) < 4


def test_a_panum_run_closes_with_algorithm_1_and_an_undefended_row(panum_run, capsys):
    results = stored(panum_run)
    assert set(results) == RESULTS | {"undefended"}
    (entry,) = results["robust"]
    assert ENTRY <= set(entry) and (entry["protocol"], entry["objective"]) == \
        ("template", "neighbour")
    assert entry["eps"] == 0.01 and entry["step"] == 0.004 and entry["R@1"] <= \
        results["clean"]["R@1"]
    train("--resume", "--out", panum_run, script=panum_at)
    assert first_words(capsys.readouterr().out) == ["not trained", "panum"]


def test_curves_do_not_change_the_training(panum_run, pictures, tmp_path):
    train(*flags(pictures, tmp_path / "run", method="panum"), script=panum_at)
    assert same_training(panum_run, tmp_path / "run")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_panum_run_interrupted_and_resumed_ends_bit_for_bit_the_same(workers, panum_run, pictures,
                                                                       tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        interrupt_after(monkeypatch, 3)
        train(*flags(pictures, out, "--eval-every", "2", method="panum"), script=panum_at)
    train("--resume", "--out", out, "--workers", workers, script=panum_at)
    assert same_training(out, panum_run) and without_clock(log(out)) == \
        without_clock(log(panum_run))
    assert without_seconds(stored(out)) == without_seconds(stored(panum_run))


def test_the_undefended_network_of_panum_is_its_run_at_rate_0(pictures, tmp_path):
    train(*flags(pictures, tmp_path / "run", "--plain-epochs", "4", method="panum"),
          script=panum_at)
    train(*flags(pictures, tmp_path / "rate0", "--attack-rate", "0", method="panum"),
          script=panum_at)
    undefended, rate0 = stored(tmp_path / "run")["undefended"], stored(tmp_path / "rate0")
    assert undefended["epochs"] == 4 and "undefended" not in rate0
    assert undefended["clean"] == rate0["clean"]
    assert without_seconds({**undefended, "warnings": []}) == \
        {**without_seconds(rate0), "warnings": []}


@pytest.mark.parametrize("options, variant", [
    ("--loss triplet", "triplet"), ("--perturb anchor", "anchor"),
    ("--loss triplet --perturb negative --attack-rate 1", "triplet-rate1-negative"),
    ("--formulation 2", "formulation2"), ("--attack fgsm", "fgsm"),
    ("--formulation 3 --reg-weight 2", "formulation3-lambda2"),
    ("--loss triplet --reduction mean --squared", "triplet-mean-squared"),
    ("--cutoff-high none --cutoff-low none", "cutoffs-none-none"), ("--images-per-class 0", ""),
    ("--benign-epochs 1 --eps-ramp-epochs 2", ""), ("--amp --val-classes 1 --batch-size 4", ""),
    ("--eval-every 1 --limit-queries 10", ""), ("--weights none --freeze-bn", ""),
    ("--dataset gaussian --images-per-class 3 --limit-queries 20 --image-size 16", "")])
def test_every_option_of_panum_runs(options, variant, pictures, tmp_path):
    train(*flags(pictures, tmp_path / "run", "--epochs", "1", *options.split(), method="panum"),
          script=panum_at)
    results = stored(tmp_path / "run")
    assert (results["method"], results["variant"], results["epoch"]) == ("panum", variant, 1)
    ball = [json.loads((tmp_path / "run" / "args.json").read_text())[name]
            for name in ("eps", "step_size", "attack_steps")]
    assert ball == [0.01, 0.01 if "fgsm" in options else 0.02, 1]


def test_a_dry_run_of_panum_writes_nothing(pictures, tmp_path, capsys):
    train(*flags(pictures, tmp_path / "run", "--dry-run", method="panum"), script=panum_at)
    shown = capsys.readouterr().out
    assert "one batch of (6, 3, 32, 32)" in shown and "attacked" in shown and "mAP@R" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad, words", [
    ("--loss nope", "nope"), ("--attack-rate 2", "2"), ("--perturb nope", "nope"),
    ("--reg-weight 2", "--formulation 3"), ("--squared", "--loss triplet"),
    ("--formulation 2 --perturb negative", "negative"), ("--attack fgsm --step-size 1/255", "fgsm"),
    ("--attack fgsm --attack-steps 3", "--eps"), ("--cutoff-low 1.5", "1.4"),
    ("--cutoff-high 3", "3"), ("--images-per-class 1", "--images-per-class"),
    ("--batch-size 8", "4 classes"), ("--val-classes 2", "1 class")])
def test_a_bad_value_for_panum_is_one_line_and_nothing_is_written(bad, words, pictures, tmp_path,
                                                                  fails):
    fails(2, [words], panum_at, *flags(pictures, tmp_path / "run", *bad.split(), method="panum"))
    assert not contents(tmp_path), "a refused run leaves nothing behind"


def test_panum_stops_when_its_loss_is_not_finite(pictures, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(panum_at, "tuple_loss", lambda embeddings, *_: embeddings.sum() * torch.nan)
    fails(1, ["nan", "none"], panum_at, *flags(pictures, tmp_path / "run", method="panum"))


@pytest.mark.parametrize("script, run", [(panum_at, "finished"), (eat, "panum")],
                         ids=["panum", "eat"])
def test_panum_and_the_others_do_not_continue_each_other(script, run, finished, panum_run, fails):
    out = finished if run == "finished" else panum_run
    fails(2, ["resume it with the script"], script, "--resume", "--out", out)


# ---- (21) eval.py: several attacks and seeds, figures

@pytest.fixture
def copied_panum(panum_run, tmp_path):
    return shutil.copytree(panum_run, tmp_path / panum_run.name)


def test_eval_measures_only_what_is_missing_of_several_attacks(copied_panum, monkeypatch):
    several = [copied_panum, "--protocol", "template", *HERE]
    evaluate(*several, "--attack", "fgsm")
    evaluated = []
    whole = common.evaluate_set

    def watched(members, test, attacks, **options):
        evaluated.extend((attack.attack, attack.eps, attack.seed) for attack in attacks)
        return whole(members, test, attacks, **options)

    monkeypatch.setattr(common, "evaluate_set", watched)
    evaluate(*several, "--attack", "pgd", "fgsm", "--eps", "0.01", "0.05", "--seed", "0", "1")
    assert evaluated == [("pgd", 0.01, 0), ("pgd", 0.01, 1), ("pgd", 0.05, 0), ("pgd", 0.05, 1),
                         ("fgsm", 0.01, 1), ("fgsm", 0.05, 0), ("fgsm", 0.05, 1)]
    assert len(stored(copied_panum)["robust"]) == 1 + 8     # the closing evaluation is another


def test_a_table_of_several_attacks_has_them_side_by_side(copied_panum, tmp_path):
    evaluate(copied_panum, "--protocol", "template", *HERE, "--attack", "pgd", "fgsm", "--eps",
             "0.01", "0.05", "--seed", "0", "1", "2", "--table", tmp_path / "table", "--metrics",
             "R@1", "mAP@R")
    content = json.loads((tmp_path / "table.json").read_text())
    header, _, line = [row for row in (tmp_path / "table.md").read_text().splitlines()
                       if row.startswith("|")]
    assert [cell.strip() for cell in header.strip("|").split("|")][1:5] == [
        "clean R@1", "clean mAP@R", "PGD-1 eps 2.55/255 R@1", "PGD-1 eps 2.55/255 mAP@R"]
    assert len(header.split("|")) == len(line.split("|")) == 2 + 1 + 2 + 8
    entries = [entry for entry in stored(copied_panum)["robust"]
               if (entry["attack"], entry["eps"]) == ("pgd", 0.05)]
    scores = torch.tensor([entry["R@1"] for entry in entries], dtype=torch.float64)
    row = next(row for row in content["rows"] if row["attack"] == "PGD-1 eps 12.8/255")
    assert len(scores) == 3 == row["attack_seeds"] and row["seeds"] == [0]
    assert row["attacked"]["R@1"][0] == pytest.approx(float(scores.mean()))
    assert row["attack_std"]["R@1"] == pytest.approx(float(scores.std()))
    assert f"{100 * scores.mean():.1f} ± {100 * scores.std():.1f}" in line


def test_figures_are_drawn(copied_panum, pictures, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    flat = tmp_path / "flat"
    train(*flags(pictures, flat, "--epochs", "1", "--embedding-dim", "2", method="panum"),
          script=panum_at)
    evaluate(copied_panum, flat, "--protocol", "template", *HERE, "--figures",
             tmp_path / "figures")
    shown = capsys.readouterr().out
    for name in ("embeddings.png", "training.png"):
        assert f"wrote {tmp_path / 'figures' / name}" in shown
        with Image.open(tmp_path / "figures" / name) as picture:
            assert picture.size[0] > 500 and len(picture.convert("RGB").getcolors(2**20)) > 20
    (curve,) = json.loads((tmp_path / "figures" / "training.json").read_text())[
        "panum-folder-convnet"]
    assert curve == {name: [line[name] for line in log(copied_panum) if line["epoch"] % 2 == 0]
                     for name in ("epoch", "clean_R@1", "robust_R@1")}


def test_figures_without_matplotlib_are_one_line(copied_panum, tmp_path, monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(2, ["pip install matplotlib"], evaluator, copied_panum, "--protocol", "template", *HERE,
          "--figures", tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


# ---- (22) hardness_manipulation.py

def train_hm(pictures, out, *more):
    train(*flags(pictures, out, *more, method="hm"), script=hardness_manipulation)


@pytest.fixture(scope="session")
def hm_run(pictures, tmp_path_factory):
    """A complete run; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "hm"
    train_hm(pictures, out, "--ics")
    return out


def test_an_hm_run_writes_the_same_four_files(hm_run):
    assert set(contents(hm_run)) == OUR_FILES
    checkpoint, lines = saved(hm_run), log(hm_run)
    assert (checkpoint["method"], checkpoint["epoch"], checkpoint["proxies"]) == ("hm", 4, [])
    assert set(checkpoint["state"]) == {"previous_loss"} and len(common.load_model(hm_run)) == 1
    for line in lines:
        assert set(line) == {"epoch", "loss", "ics", "H_source", "H_wanted", "H_moved", "lr",
                             "seconds", "images_per_second", "collapse"}
        assert -0.2 <= line["H_wanted"] <= 0 and line["loss"] > 0


def test_an_hm_run_closes_with_both_protocols_and_its_notation(hm_run, capsys):
    results = stored(hm_run)
    assert (results["notation"], results["eta"]) == ("HM[S,g_LGA]&ICS", 1)
    assert results["variant"] == "softhard-lga-ics-eta1"
    assert {entry["protocol"] for entry in results["robust"]} == {"clustering", "template"}
    assert set(results) == RESULTS | {"undefended", "notation", "eta"}
    train("--resume", "--out", hm_run, script=hardness_manipulation)
    assert first_words(capsys.readouterr().out)[:2] == ["not trained", "HM[S,g_LGA]&ICS"]


def test_an_hm_run_interrupted_and_resumed_ends_bit_for_bit_the_same(hm_run, pictures, tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        interrupt_after(monkeypatch, 2)
        train_hm(pictures, out, "--ics")
    train("--resume", "--out", out, "--workers", "2", script=hardness_manipulation)
    assert same_training(out, hm_run) and without_clock(log(out)) == without_clock(log(hm_run))
    assert without_seconds(stored(out)) == without_seconds(stored(hm_run))


def test_the_undefended_network_of_hm_is_its_plain_run(pictures, tmp_path):
    train_hm(pictures, tmp_path / "run", "--plain-epochs", "4")
    train_hm(pictures, tmp_path / "plain", "--destination", "softhard")
    undefended, plain = stored(tmp_path / "run")["undefended"], stored(tmp_path / "plain")
    assert undefended["epochs"] == 4 and "undefended" not in plain
    assert undefended["clean"] == plain["clean"] and plain["notation"] == "HM[S,S]"


@pytest.mark.parametrize("options, variant, notation", [
    ("--source random --destination semihard", "random-semihard", "HM[R,M]"),
    ("--destination constant --destination-hardness -0.2", "softhard-constant-0.2", "HM[S,-0.2]"),
    ("--destination g-b --destination-sampler hardest", "softhard-g-b-hardest", "HM[S,g_B(H)]"),
    ("--destination g-sqrt --softhard-self", "softhard-g-sqrt-self", "HM[S,g_1/2]"),
    ("--source distance --destination g-square", "distance-g-square", "HM[D,g_2]"),
    ("--ics 0.1 --benign-epochs 1 --eps-ramp-epochs 1 --epochs 2", "softhard-lga-ics-0.1",
     "HM[S,g_LGA]&ICS"),
    ("--amp --eval-every 1 --crop resized", "softhard-lga", "HM[S,g_LGA]")])
def test_every_option_of_hm_runs(options, variant, notation, pictures, tmp_path):
    train_hm(pictures, tmp_path / "run", "--epochs", "1", "--attack-steps", "8", *options.split())
    results = stored(tmp_path / "run")
    assert (results["variant"], results["notation"]) == (variant, notation)


def test_a_dry_run_of_hm_writes_nothing(pictures, tmp_path, capsys):
    train_hm(pictures, tmp_path / "run", "--dry-run")
    shown = capsys.readouterr().out
    assert "one batch of (6, 3, 32, 32)" in shown and "H_moved" in shown and "mAP@R" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad, words", [
    ("--source nope", "nope"), ("--destination-hardness 1", "--destination constant"),
    ("--destination-sampler random", "--destination g-b"), ("--ics -1", "-1"),
    ("--source random --softhard-self", "neither"), ("--ics --destination softhard", "--ics"),
    ("--batch-size 5", "5"),
    ("--images-per-class 2", "--images-per-class"), ("--val-classes 2", "1 class")])
def test_a_bad_value_for_hm_is_one_line_and_nothing_is_written(bad, words, pictures, tmp_path,
                                                               fails):
    fails(2, [words], hardness_manipulation,
          *flags(pictures, tmp_path / "run", *bad.split(), method="hm"))
    assert not contents(tmp_path), "a refused run leaves nothing behind"


def test_hm_stops_when_its_loss_is_not_finite(pictures, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(hardness_manipulation, "triplet_loss",
                        lambda a, *_, **__: a.sum() * torch.nan)
    fails(1, ["nan", "none"], hardness_manipulation,
          *flags(pictures, tmp_path / "run", method="hm"))


# ---- (23) eval.py --protocol ers

@pytest.fixture(scope="session")
def scored_run(tmp_path_factory):
    """A run on 120 images with its ERS."""
    out = tmp_path_factory.mktemp("runs") / "hm-random-lga-gaussian-convnet-s0"
    train("--dataset", "gaussian", "--image-size", "16", "--embedding-dim", "4", "--epochs", "1",
          "--source", "random", "--benign-epochs", "0", "--plain-epochs", "0", "--attack-steps",
          "1", "--eval-steps", "1", "--limit-queries", "120", "--workers", "0", "--device", "cpu",
          "--out", out, script=hardness_manipulation)
    evaluate(out, "--protocol", "ers", "--attack-steps", "1", "--limit-queries", "120",
             "--workers", "0")
    return out


def test_ers_is_stored_once_with_its_ten_figures(scored_run, monkeypatch, capsys):
    (entry,) = [entry for entry in stored(scored_run)["robust"] if entry["protocol"] == "ers"]
    assert {"rule", "eps", "step", "steps", "seed", "n_queries", "limited", "R@1_clean",
            *common.ERS_FIGURES} <= set(entry)
    assert entry["ERS"] == pytest.approx(evaluator.ers(entry)) and entry["limited"]
    monkeypatch.setattr(common, "evaluate_set", must_not_run)
    evaluate(scored_run, "--protocol", "ers", "--attack-steps", "1", "--limit-queries", "120")
    output = capsys.readouterr().out
    assert f"{entry['ERS']:.1f}" in output and "a fixed subset of 120 images" in output
    assert all(name in output for name in (*common.ERS_FIGURES, "R@1"))


def test_a_table_of_ers_is_on_its_own_scales(scored_run, tmp_path):
    evaluate(scored_run, "--protocol", "ers", "--attack-steps", "1", "--limit-queries", "120",
             "--table", tmp_path / "table", "--metrics", "R@1", "TMA", "ERS")
    (entry,) = [entry for entry in stored(scored_run)["robust"] if entry["protocol"] == "ers"]
    header, line = (row for row in (tmp_path / "table.md").read_text().splitlines()
                    if row.startswith("| "))
    assert header == "| in % | clean R@1 | attacked TMA | attacked ERS |"
    assert line.endswith(f"| {entry['TMA']:.2f} | {entry['ERS']:.1f} |")


# ---- (24) eval.py --beside

def test_published_figures_stand_beside_their_rows(seed_runs, tmp_path):
    (tmp_path / "paper.csv").write_text(
        "row,paper R@1,paper ERS,paper NMI,words\nest,37.1,collapse,46.4,-\nother,1,2,3,4\n")
    evaluate(*seed_runs, *HERE, "--table", tmp_path / "table", "--rules", "vote", "--metrics",
             "R@1", "R@1_low", "ERS", "--beside", tmp_path / "paper.csv")
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["beside"] for row in rows] == [
        {}, {"paper R@1": "37.1", "paper ERS": "collapse", "words": "-"}]      # NMI: no column here
    head, at, est = (line for line in (tmp_path / "table.md").read_text().splitlines()
                     if line.startswith("| "))
    assert head == "| in % | clean R@1 | clean R@1 low | attacked R@1 | attacked R@1 low " \
                   "| paper R@1 | paper ERS | words |"
    assert at.endswith(" | - | - | - |") and est.endswith(" | 37.1 | collapse | - |")


@pytest.mark.parametrize("text, words", [
    (None, "paper.csv"), ("", "column names"), ("row,R@1\nat\n", "1 columns"),
    ("row,R@1\nother,1\n", "none of these rows"), (b"\xff\xfe\xff", "paper.csv")])
def test_a_bad_file_beside_is_one_line_and_writes_no_table(text, words, seed_runs, tmp_path, fails):
    path = tmp_path / "paper.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(2, [words], evaluator, *seed_runs, *HERE, "--table", tmp_path / "table", "--beside", path)
    assert not (tmp_path / "table.md").exists()


def test_beside_without_a_table_is_one_line(tmp_path, fails):
    fails(2, ["--beside", "--table"], evaluator, tmp_path, "--beside", "paper.csv")
