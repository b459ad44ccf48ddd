"""The four training scripts from end to end on 48 tiny pictures: one set of tests for all.

Most tests run a script inside this process. Those that kill a run or need a full disk start it with
`start`, in a process forked from a server that has imported torch already: an import takes seconds.
"""

import atexit
import errno
import functools
import gc
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image

import baselines
import common
import eat
import hardness_manipulation
import panum_at

OUR_FILES = {"args.json", "log.jsonl", "last.pt", "results.json"}
RULES = {"vote", "member_mean", "concat", "mean", "member_1", "member_2"}
HM = "hm-softhard-lga-ics-eta1"
PROXY, CLUSTERING, BOTH = ("clean", "adversarial"), ("clustering",), ("clustering", "template")
# A run: script and flags, the terms in its log, the protocols of its closing table.
Case = namedtuple("Case", "script flags terms protocols members triplets",
                  defaults=(CLUSTERING, 1, False))
CASES = {                                        # by the name of the run, which its folder has
    "eat-x2": Case(eat, "--members 2", PROXY, members=2),
    "natural": Case(baselines, "--method natural", ("clean",)),
    "at": Case(baselines, "--method at", PROXY),
    "at-x2": Case(baselines, "--method at --members 2", PROXY, members=2),
    "at-x2-split": Case(baselines, "--method at --members 2 --split", PROXY, members=2),
    "mixup": Case(baselines, "--method mixup", ("mixed",)),
    "iat": Case(baselines, "--method iat", ("mixed", "mixed_adversarial")),
    "trades": Case(baselines, "--method trades", ("clean", "shift")),
    "fast": Case(baselines, "--method fast", ("adversarial",)),
    "fare-x2": Case(baselines, "--method fare --members 2 --teacher", ("distance",), members=2),
    "est": Case(baselines, "--method est", ("adversarial",), BOTH, triplets=True),
    "act": Case(baselines, "--method act", ("adversarial",), BOTH, triplets=True),
    "panum": Case(panum_at, "", ("loss", "clean", "attacked"), ("template",), triplets=True),
    "panum-triplet-lambda0.5": Case(panum_at, "--loss triplet --reg-weight 0.5", (
        "loss", "clean", "attacked"), ("template",), triplets=True),
    HM: Case(hardness_manipulation, "--ics", (
        "loss", "ics", "H_source", "H_wanted", "H_moved"), BOTH, triplets=True),
}
every_case = pytest.mark.parametrize("name", CASES)
every_script = pytest.mark.parametrize("name", ["eat-x2", "at", "panum", HM])


# ---- helpers

@functools.cache
def pictures():
    """Six classes of eight 32 x 32 pictures; "folder" trains on the first three classes."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    generator = torch.Generator().manual_seed(0)
    ramp = torch.arange(32) / 31
    for label in range(6):
        (root / f"class{label}").mkdir()
        stripes = torch.stack([ramp, ramp.flip(0), (ramp * (label + 2) * 4).sin().abs()])
        pattern = stripes.roll(label, 0)[:, None, :].expand(3, 32, 32)
        for i in range(8):
            image = (pattern + 0.3 * torch.rand(3, 32, 32, generator=generator)).clamp(0, 1)
            pixels = (image * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i}.png")
    return root


@functools.cache
def teacher():
    """A run of two networks for --teacher."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    return run("natural", root / "teacher", "--epochs 2 --members 2")


def flags(out, name="eat-x2", more="", data=None):
    """The flags of a tiny run; argparse takes the last value of a flag given twice."""
    own = CASES[name].flags.split() + ([str(teacher())] if name.startswith("fare") else [])
    return ["--dataset", "folder", "--data-root", str(data or pictures()), "--out", str(out),
            *("--arch convnet --image-size 32 --embedding-dim 8 --epochs 4 --batch-size 6 --lr "
              "0.001 --attack-steps 1 --workers 0 --device cpu").split(),
            *own, *more.split()]


def run(name, out, more="", data=None):
    script = CASES[name].script
    script.main(script.parse_args(flags(out, name, more, data)))
    return out


def saved(out):
    return torch.load(Path(out) / "last.pt")     # at its default, weights_only=True


def stored(out, file="results.json"):
    return json.loads((Path(out) / file).read_text())


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


def without_seconds(content):
    """The same nest of dicts and lists without what the clock and the machine's load decide."""
    if isinstance(content, dict):
        return {name: without_seconds(value) for name, value in content.items()
                if name not in ("seconds", "peak_gb")}
    return [without_seconds(part) for part in content] if isinstance(content, list) else content


def same_training(first, second):
    """Whether two runs ended with the same networks, proxies, optimisers, state and log."""
    parts = ("epoch", "members", "proxies", "optimizers", "state", "classes")
    for out in (first, second):
        assert log(out) == saved(out)["state"]["log"]
    first, second = (without_seconds(saved(out)) for out in (first, second))
    return all(same_bits(first[part], second[part]) for part in parts)


def same_run(first, second):
    return same_training(first, second) and \
        without_seconds(stored(first)) == without_seconds(stored(second))


def must_not_run(*_, **__):
    raise AssertionError("this must not be computed again")


def interrupted(name, out, file, count=1, before=False, more="", full=False):
    """A run with Ctrl-C (or a full disk) after or before it writes this file the count-th time."""
    replace, seen = os.replace, []

    def stop(source, target):
        seen.append(Path(target).name)
        now = seen[-1] == file and seen.count(file) == count
        if not (now and before):
            replace(source, target)
        if now:
            raise OSError(errno.ENOSPC, "No space left") if full else KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises((KeyboardInterrupt,
                                                               common.UserError)) as caught:
        patch.setattr(os, "replace", stop)
        run(name, out, more)
    if full:
        assert caught.value.code == 1 and f"{file} (No space left)" in str(caught.value)
    del caught
    gc.collect()                                 # the dead run's frame holds its lock
    return out


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """whole(name): a complete run of four epochs, made once; tests must not change it."""
    root = tmp_path_factory.mktemp("whole")

    @functools.cache
    def make(name):
        run(name, root / name)
        return root / name

    return make


@pytest.fixture(scope="session")
def half(tmp_path_factory):
    """half(name): the same run, interrupted after two of its epochs; not to be changed either."""
    root = tmp_path_factory.mktemp("half")
    return functools.cache(
        lambda name: interrupted(name, root / name, "log.jsonl", 3))


@pytest.fixture
def stopped(half, tmp_path):
    return shutil.copytree(half("eat-x2"), tmp_path / "stopped")


@pytest.fixture
def fails(capsys, monkeypatch):
    """fails(code, words, name, out, more flags): the exit code, and one line with these words."""
    def check(code, words, name, out, more="", data=None):
        script, given = CASES[name].script, flags(out, name, more, data)
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)   # restored later
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            common.run_script(lambda: script.parse_args(given), script.main)
        error, code_found = capsys.readouterr().err, stop.value.code
        del stop
        gc.collect()                             # the lock again
        assert code_found == code, error
        assert error.count("\n") == 1 and error.endswith("\n") and "error: " in error, error
        for word in words:
            assert word in error, error
    return check


def in_child(script, arguments, folder, file_limit, nobody_reads):
    """What `start` runs: a script as on a command line; stdout and stderr go to files."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = open(Path(folder) / "stdout", "w", buffering=1)
    sys.stderr = open(Path(folder) / "stderr", "w", buffering=1)
    if nobody_reads:                             # what `python eat.py | true` does
        reader, writer = os.pipe()
        sys.stdout = os.fdopen(writer, "w")
        os.close(reader)
    if file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [f"{script}.py", *arguments]
    module = importlib.import_module(script)
    common.run_script(module.parse_args, module.main)


def start(name, arguments, folder, file_limit=None, nobody_reads=False):
    """The script of a case in a process of its own. file_limit: a file's largest size in bytes."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "torchvision", "pytest"])
    folder.mkdir(exist_ok=True)
    process = server.Process(target=in_child, args=(
        CASES[name].script.__name__, arguments, folder, file_limit, nobody_reads))
    process.start()
    atexit.register(process.kill)                # should its test fail
    return process


def wait_for_epochs(process, out, count):
    """Until log.jsonl has so many lines; the process must still be running then."""
    for _ in range(6000):
        if (out / "log.jsonl").exists() and \
                (out / "log.jsonl").read_bytes().count(b"\n") >= count:
            break
        assert process.exitcode is None, "the run ended too early"
        time.sleep(0.005)
    assert process.exitcode is None, "the run ended too early"


# ---- a run's folder

@every_case
def test_a_run_writes_four_files_and_args_json_has_every_flag(name, whole):
    out, script = whole(name), CASES[name].script
    assert set(contents(out)) == OUR_FILES
    record, method = stored(out, "args.json"), saved(out)["method"]
    args = vars(script.parse_args(flags(out, name)))
    assert {key: record[key] for key in args} == args and record["method"] == method
    assert set(record) == {*args, "method", "versions", "commit", "dirty", "device_name", "threads"}
    assert set(record["versions"]) == {"python", "torch", "torchvision", "numpy"}


@every_case
def test_log_jsonl_has_one_line_per_epoch(name, whole):
    case, lines = CASES[name], log(whole(name))
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert set(line) == {*case.terms, "epoch", "lr", "seconds", "collapse"}
        assert line["seconds"] > 0 and -1 <= line["collapse"] <= 1
        assert all(line[term] >= 0 for term in case.terms if not term.startswith("H_"))
    drops = [1, 1, 1, 1] if case.triplets else [1, 1, 0.1, 0.01]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * drop for drop in drops])


def test_collapse_in_the_log_is_that_of_the_worst_member(tmp_path, monkeypatch):
    cosines = [0.5, 0.75] * 9                       # of the members, from the end
    monkeypatch.setattr(common, "mean_cosine", lambda embeddings: cosines.pop())
    assert log(run("eat-x2", tmp_path / "run", "--epochs 1"))[0]["collapse"] == 0.75


@every_case
def test_last_pt_has_the_documented_keys_and_loads_as_networks(name, whole):
    case, checkpoint = CASES[name], saved(whole(name))
    assert set(checkpoint) == {"format", "method", "args", "epoch", "members", "proxies",
                               "optimizers", "state", "classes", "versions"}
    assert (checkpoint["format"], checkpoint["epoch"]) == (2, 4)
    assert checkpoint["method"] == checkpoint["args"].get("method", name.split("-")[0])
    assert checkpoint["classes"] == {
        "train": [["class0", 8], ["class1", 8], ["class2", 8]],
        "test": [["class3", 8], ["class4", 8], ["class5", 8]]}
    assert len(checkpoint["members"]) == len(checkpoint["optimizers"]) == case.members
    assert [tuple(p.shape) for p in checkpoint["proxies"]] == \
        ([] if case.triplets or name.startswith("fare") else [(3, 8)] * case.members)
    more = {"hm": ["previous"], "fare": ["teacher"]}.get(name.split("-")[0], [])
    assert checkpoint["state"].keys() == {"log", *more}
    members = common.load_model(whole(name))
    assert len(members) == case.members and not any(member.training for member in members)
    assert members[0](torch.rand(2, 3, 32, 32)).norm(dim=1).tolist() == pytest.approx([1, 1])


@every_case
def test_results_json_has_the_documented_keys_and_fractions(name, whole):
    case, out = CASES[name], whole(name)
    results, args = stored(out), saved(out)["args"]
    assert set(results) == {"method", "variant", "dataset", "arch", "seed", "epoch", "clean",
                            "robust", "warnings", "seconds", "peak_gb", "env"}
    method = args.get("method", name.split("-")[0])
    assert (results["method"], results["dataset"], results["arch"], results["seed"],
            results["epoch"]) == (method, "folder", "convnet", 0, 4)
    assert results["variant"] == name.removeprefix(method).removeprefix("-")
    assert {"device", "versions", "commit"} <= set(results["env"])
    assert [record["protocol"] for record in results["robust"]] == list(case.protocols)
    rules = RULES if case.members > 1 else {"member_1"}
    for record in (results["clean"], *results["robust"]):
        assert record["rule"] == ("vote" if case.members > 1 else "member_1")
        assert set(record["scores"]) == rules and record["n_queries"] == 24
        for rule, scores in record["scores"].items():
            hits = {"hits"} if rule != "member_mean" else set()
            clusters = {"NMI", "AMI", "F1"} if record.get("protocol") != "template" else set()
            assert set(scores) == {"R@1", "R@2", "R@4", "R@8", "mAP@R"} | clusters | hits
            for metric in set(scores) - hits:    # AMI is adjusted for chance
                assert (-1 if metric == "AMI" else 0) <= scores[metric] <= 1 + 1e-9, metric
            assert not hits or common.unpack(scores["hits"], 24).mean() == pytest.approx(
                scores["R@1"])
        headline = record["scores"][record["rule"]]
        assert {metric: record[metric] for metric in headline} == headline
    for record in results["robust"]:
        eps = 0.01 if name.startswith("panum") else 8 / 255
        template = record["protocol"] == "template"
        assert (record["objective"], record["attack"], record["against"], record["restarts"],
                record["seed"], record["limited"]) == (
            "neighbour" if template else "shift", "pgd", "sum", 1, 0, False)
        assert (record["steps"], record["step"]) == (
            (5, pytest.approx(2 * eps / 5)) if template else (10, pytest.approx(eps / 4)))
        assert (record["eps"], record["eps_255"]) == pytest.approx((eps, 255 * eps))
        assert record["seconds"] > 0 and record["R@1"] <= results["clean"]["R@1"]


# ---- the same command continues

@every_case
def test_an_interrupted_run_continued_ends_bit_for_bit_the_same(name, whole, half, tmp_path):
    out = shutil.copytree(half(name), tmp_path / "run")
    assert saved(out)["epoch"] == len(log(out)) == 2 and not (out / "results.json").exists()
    run(name, out)
    assert same_run(out, whole(name))


@pytest.mark.parametrize("file, count", [
    ("args.json", 1), ("log.jsonl", 1), ("last.pt", 1), ("log.jsonl", 2), ("last.pt", 4),
    ("results.json", 1)])
@pytest.mark.parametrize("how", ["before", "after", "full disk"])
def test_stopped_at_any_of_its_writes_a_run_ends_the_same(file, count, how, whole, tmp_path):
    out = interrupted(HM, tmp_path / "run", file, count, how != "after", full=how == "full disk")
    assert not list(out.glob("*.tmp"))
    run(HM, out)
    assert same_run(out, whole(HM)) and set(contents(out)) == OUR_FILES


@pytest.mark.parametrize("script", [eat, baselines, panum_at, hardness_manipulation])
def test_the_flags_of_args_json_are_those_of_the_same_command(script):
    for dataset in ("glyphs", "gaussian", "cub"):    # they are compared when a run goes on
        args = vars(script.parse_args(["--dataset", dataset]))
        assert json.loads(json.dumps(args)) == args


@every_script
def test_a_run_killed_again_and_again_ends_bit_for_bit_where_the_whole_one_ends(name, tmp_path):
    out, more, whole_run = tmp_path / "killed", "--epochs 16", tmp_path / "whole"
    run(name, whole_run, more)
    epoch = sum(line["seconds"] for line in log(whole_run)) / 16
    for saved_epochs in (0, 4, 8):               # the first may die before any epoch ends
        process = start(name, flags(out, name, more), tmp_path / "output")
        wait_for_epochs(process, out, saved_epochs)
        delay = random.SystemRandom().uniform(0, 3 * epoch)
        print(f"killed {delay:.4f} s after {saved_epochs} epochs of {epoch:.4f} s")
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not (out / "results.json").exists()
    run(name, out, more)
    assert same_run(out, whole_run) and set(contents(out)) == OUR_FILES


@every_script
def test_a_complete_run_prints_its_table_and_changes_nothing(name, whole, tmp_path, capsys,
                                                             monkeypatch):
    out = shutil.copytree(whole(name), tmp_path / "run")
    before = contents(out)
    monkeypatch.setattr(common, "evaluate", must_not_run)
    monkeypatch.setattr(common, "load_batches", must_not_run)
    run(name, out)
    shown = capsys.readouterr().out              # no SystemExit: exit code 0
    for protocol in BOTH:
        assert (f"; {protocol}: " in shown) == (protocol in CASES[name].protocols)
    for rule in RULES if CASES[name].members > 1 else ("member_1",):
        assert f"{name} {rule} clean" in shown and f"{name} {rule} attacked" in shown
    assert f"{out} is complete" in shown and "mAP@R" in shown and contents(out) == before


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: text[:len(text) // 2], lambda text: text + '{"epoch": 3, "cl',
    lambda text: text + text.splitlines()[-1].replace('"epoch": 2', '"epoch": 3') + "\n", None])
def test_the_log_is_written_again_from_the_checkpoint(damage, stopped, whole):
    path = stopped / "log.jsonl"
    text = path.read_text()
    path.unlink()
    if damage:
        path.write_text(damage(text))
    (stopped / "last.pt.123.tmp").write_bytes(b"of a process that was killed")
    run("eat-x2", stopped)
    assert same_run(stopped, whole("eat-x2")) and set(contents(stopped)) == OUR_FILES


# ---- other flags, other data

@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("more, words", [
    ("--lr 0.5", "--lr 0.001, not 0.5"), ("--epochs 9", "--epochs 4, not 9"),
    ("--members 3", "--members 2, not 3"), ("--no-split", "--split True, not False"),
    ("--attack-loss label", "--attack-loss shift, not label"), ("--seed 1", "--seed 0, not 1"),
    ("--dataset gaussian --image-size 32", "--dataset folder, not gaussian"),
    ("--eps 8/255 --eps-ramp 1 2", "--eps "), ("--eps-ramp 1 2", "--eps-ramp [0, 0], not [1, 2]")])
def test_another_flag_in_the_folder_of_a_run_names_both_values(more, words, record, stopped, fails):
    if not record:
        (stopped / "args.json").unlink()         # last.pt knows the flags, too
    before = contents(stopped)
    fails(2, [words, "delete the folder"], "eat-x2", stopped, more)
    assert contents(stopped) == before


def test_without_a_checkpoint_there_is_nothing_to_lose_and_any_flags_start(stopped):
    (stopped / "last.pt").unlink()
    (stopped / "args.json").write_text('{"seed": ')
    run("eat-x2", stopped, "--epochs 1 --beta 0.25")
    assert [line["epoch"] for line in log(stopped)] == [1]
    assert stored(stopped, "args.json")["beta"] == saved(stopped)["args"]["beta"] == 0.25


@pytest.mark.parametrize("name, other", [("eat-x2", "at"), ("at", "est"), ("panum", "eat-x2")])
def test_another_method_in_the_folder_of_a_run_is_refused(name, other, whole, fails):
    before, words = contents(whole(name)), "--method {}, not {}".format(
        *(part.removesuffix("-x2") for part in (name, other)))
    fails(2, [words], other, whole(name))
    assert contents(whole(name)) == before


def test_a_run_that_was_moved_goes_on_on_another_machine(stopped, whole, tmp_path):
    moved = stopped.rename(tmp_path / "moved")
    photos = shutil.copytree(pictures(), tmp_path / "photos")
    run("eat-x2", moved, "--device auto --workers 1 --cache-gb 5", photos)
    assert set(contents(moved)) == OUR_FILES and not stopped.exists()
    assert torch.cuda.is_available() or same_run(moved, whole("eat-x2"))


@pytest.mark.parametrize("change, side, first", [
    (lambda root: (root / "class2").rename(root / "class35"), "train", "class2"),    # 3 moves sides
    (lambda root: (root / "class0").rename(root / "class00"), "train", "class0"),
    (lambda root: shutil.copy(root / "class1" / "0.png", root / "class1" / "8.png"), "train",
     "class1"),
    (lambda root: (root / "class5" / "7.png").unlink(), "test", "class5")])
def test_data_that_has_changed_is_refused(change, side, first, stopped, tmp_path, fails):
    root, before = shutil.copytree(pictures(), tmp_path / "changed"), contents(stopped)
    change(root)
    fails(2, [f"the data has changed since this run was trained: its {side} side had 3 "
              f"classes, now 3, first difference {first};"], "eat-x2", stopped, data=root)
    assert contents(stopped) == before


# ---- damaged files, a second process

@pytest.mark.parametrize("text", ["", '{"seed": ', "1", "\xff"])
def test_a_damaged_args_json_is_one_line(text, stopped, fails):
    (stopped / "args.json").write_bytes(text.encode("latin-1"))
    before = contents(stopped)
    fails(2, ["args.json"], "eat-x2", stopped)
    assert contents(stopped) == before


def test_a_damaged_checkpoint_is_one_line(stopped, fails):
    content = (stopped / "last.pt").read_bytes()
    flipped = [content[:k] + bytes([content[k] ^ 1]) + content[k + 1:]
               for k in (len(content) // 4, len(content) // 2, 3 * len(content) // 4)]
    for damaged in (b"", content[:100], content[:len(content) // 2], content[:-1], *flipped):
        (stopped / "last.pt").write_bytes(damaged)
        before = contents(stopped)
        fails(2, ["last.pt"], "eat-x2", stopped)
        assert contents(stopped) == before


@pytest.mark.parametrize("part, value", [
    ("format", 1), ("members", []), ("members", [{"weight": torch.zeros(1)}] * 2),
    ("proxies", [torch.zeros(2, 2)] * 2), ("optimizers", [{}, {}]), ("state", {}),
    ("state", {"log": []}), ("epoch", "two"), ("classes", None)])
def test_a_checkpoint_with_another_content_is_one_line(part, value, stopped, fails):
    torch.save(saved(stopped) | {part: value}, stopped / "last.pt")
    before = contents(stopped)
    fails(2, ["last.pt"], "eat-x2", stopped)
    assert contents(stopped) == before


def test_results_without_their_checkpoint_are_not_trained_over(whole, tmp_path, fails):
    shutil.copy(whole("at") / "results.json", tmp_path)
    fails(2, ["last.pt is gone"], "at", tmp_path)
    assert set(contents(tmp_path)) == {"results.json"}


def test_a_second_process_on_a_folder_is_refused_and_ctrl_c_ends_the_first(tmp_path, fails):
    out, more = tmp_path / "run", "--epochs 400"
    process = start("eat-x2", flags(out, more=more), tmp_path / "output")
    wait_for_epochs(process, out, 1)
    os.kill(process.pid, signal.SIGSTOP)
    before = contents(out)
    for other in (more, "--epochs 5 --lr 0.1"):
        fails(2, ["another process works on", "--out"], "eat-x2", out, other)
    assert contents(out) == before
    os.kill(process.pid, signal.SIGCONT)
    wait_for_epochs(process, out, before["log.jsonl"].count(b"\n") + 2)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    error = (tmp_path / "output" / "stderr").read_text()
    assert process.exitcode == 130 and "interrupted" in error and error.count("\n") == 1, error
    assert 3 <= saved(out)["epoch"] < 400 and not list(out.glob("*.tmp"))


# ---- runs that fail

NAN = {"eat-x2": "proxy_anchor_loss", "at": "proxy_anchor_loss", "est": "triplet_loss",
       "panum": "contrastive_loss", HM: "triplet_loss"}


@pytest.mark.parametrize("name", NAN)
def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(name, half, tmp_path, monkeypatch,
                                                                  fails):
    out = shutil.copytree(half(name), tmp_path / "run")
    before = contents(out)
    monkeypatch.setattr(CASES[name].script, NAN[name],
                        lambda rows, *_, **__: rows.sum() * torch.nan)
    fails(1, ["epoch 3 is not finite", str(out / "last.pt"), "2 epochs"], name, out)
    assert contents(out) == before


@pytest.mark.parametrize("trouble, words", [
    (dict(file_limit=20_000), "last.pt (File too"), (dict(nobody_reads=True), "nobody reads")])
def test_a_full_disk_or_a_closed_pipe_is_one_line_and_nothing_is_lost(trouble, words, stopped,
                                                                      whole, tmp_path):
    before, output = saved(stopped), tmp_path / "output"
    process = start("eat-x2", flags(stopped), output, **trouble)
    process.join()
    error = (output / "stderr").read_text()
    assert process.exitcode == 1 and error.count("\n") == 1 and words in error, error
    assert same_bits(saved(stopped), before)
    assert set(contents(stopped)) == OUR_FILES - {"results.json"}
    run("eat-x2", stopped)
    assert same_run(stopped, whole("eat-x2"))


# ---- flags that change nothing, and flags that do

@every_script
@pytest.mark.parametrize("cache_gb", [4, 0])
def test_results_do_not_depend_on_the_workers(cache_gb, name, tmp_path):
    for workers in (0, 3):
        run(name, tmp_path / str(workers),
            f"--epochs 2 --workers {workers} --cache-gb {cache_gb}")
    assert same_run(tmp_path / "0", tmp_path / "3")


@every_script
def test_eval_every_logs_scores_and_does_not_change_the_training(name, whole, tmp_path):
    out, scores = tmp_path / "run", {"clean_R@1", "clean_mAP@R", "robust_R@1", "robust_mAP@R"}
    interrupted(name, out, "last.pt", 3, more="--eval-every 2")
    run(name, out, "--eval-every 2")
    assert [scores <= set(line) for line in log(out)] == [False, True, False, True]
    assert same_bits(saved(out)["members"], saved(whole(name))["members"])
    results, last = stored(out), log(out)[-1]
    for side, part in (("clean", results["clean"]), ("robust", results["robust"][0])):
        assert last[f"{side}_R@1"] == part["R@1"] and last[f"{side}_mAP@R"] == part["mAP@R"]


@pytest.mark.parametrize("name, more", [
    ("eat-x2", "--attack-loss label"), ("eat-x2", "--attack-loss batch"),
    ("eat-x2", "--members 1 --no-split"), ("eat-x2", "--beta 1"), ("eat-x2", "--amp"),
    ("eat-x2", "--batch-size 3 --images-per-class 2"), ("natural", "--crop square --flip"),
    ("at", "--attack-loss label"), ("at", "--eps-ramp 1 2"), ("at-x2-split", "--freeze-bn"),
    ("mixup", "--mixup-target embedding"), ("iat", "--mixup-target embedding"),
    ("trades", "--trades-lambda 0"), ("est", "--source distance --crop resized"),
    ("act", "--source softhard"), ("panum", "--perturb anchor --images-per-class 2"),
    ("panum", "--loss triplet --perturb negative --attack-rate 1"), ("panum", "--attack-rate 0"),
    (HM, "--source random --destination semihard"), (HM, "--destination -0.1 --ics 0.1"),
    (HM, "--destination g-b --eps-ramp 1 2")])
def test_a_flag_of_the_method_changes_the_training(name, more, whole, tmp_path):
    run(name, tmp_path / "run", more)
    first, second = (saved(out)["members"] for out in (tmp_path / "run", whole(name)))
    assert not same_bits(first[0], second[0])
    networks = 1 if "--members 1" in more else CASES[name].members
    assert len(stored(tmp_path / "run")["clean"]["scores"]) == (1 if networks == 1 else 6)


@every_script
def test_a_part_of_the_data_is_held_out_or_reported_on(name, tmp_path, capsys):
    root = tmp_path / "pictures"
    for label in range(6):                       # four classes for training
        (root / ("train" if label < 4 else "test")).mkdir(parents=True, exist_ok=True)
        (root / ("train" if label < 4 else "test") / str(label)).symlink_to(
            pictures() / f"class{label}")
    run(name, tmp_path / "val", "--val-classes 2 --epochs 1 --batch-size 4", root)
    run(name, tmp_path / "limited", "--limit-queries 10 --epochs 1", root)
    shown = capsys.readouterr().out
    assert "16 images of 2 validation classes" in shown and "10 images of 2 unseen" in shown
    assert "16 training images of 2 classes" in shown and "a fixed subset" in shown
    for out, count in (("val", 16), ("limited", 10)):
        for record in stored(tmp_path / out)["robust"]:
            assert record["n_queries"] == count and record["limited"] == (out == "limited")


@pytest.mark.parametrize("name, radii", [
    ("eat-x2", 2), ("at", 2), ("iat", 2), ("trades", 1), ("fast", 1), ("fare-x2", 2), ("est", 1),
    ("act", 1), ("panum", 2), (HM, 1)])
def test_an_attack_that_cannot_cross_the_ball_is_said_in_one_line(name, radii, tmp_path, capsys):
    for step, enough in ((8 * radii / 2, True), (8 * radii / 2 - 0.5, False)):
        run(name, tmp_path / str(enough), "--epochs 1 --eps 8/255 --attack-steps 2 "
            f"--step-size {step}/255")
        notes = [line for line in capsys.readouterr().out.splitlines() if "note" in line]
        assert len(notes) == (not enough)
        assert enough or f"2 steps of {step:g}/255 do not reach {radii} x eps 8/255" in notes[0]
    run(name, tmp_path / "ramp", "--epochs 2 --eps-ramp 1 1")
    assert "note: no attack in training" in capsys.readouterr().out


# ---- ensembles of baselines.py

def same_networks(first, second, pairs):
    """Whether network i of one run and network j of another, with all their books, are the same."""
    first, second = saved(first), saved(second)
    return all(same_bits(first[part][i], second[part][j]) for i, j in pairs
               for part in ("members", "proxies", "optimizers"))


@pytest.mark.parametrize("method", ["natural", "at", "mixup", "iat", "trades", "fast"])
def test_every_network_of_an_ensemble_is_trained_as_if_alone(method, whole, tmp_path, monkeypatch):
    run(method, tmp_path / "quiet", "--members 3")
    assert same_networks(whole(method), tmp_path / "quiet", [(0, 0)])
    step, seen = baselines.METHODS[method], []

    def draws_more(model, *args, **options):
        seen.append(model)
        torch.rand(7 * (model is seen[0]))       # the first network uses up random numbers
        return step(model, *args, **options)

    monkeypatch.setitem(baselines.METHODS, method, draws_more)
    run(method, tmp_path / "loud", "--members 3")
    assert same_networks(tmp_path / "quiet", tmp_path / "loud", [(1, 1), (2, 2)])
    assert not same_networks(tmp_path / "quiet", tmp_path / "quiet", [(0, 1), (1, 2)])


def test_at_is_eat_with_one_network(whole, tmp_path):
    run("eat-x2", tmp_path / "run", "--members 1 --no-split")
    assert same_training(tmp_path / "run", whole("at"))
    assert stored(tmp_path / "run")["robust"][0]["scores"] == \
        stored(whole("at"))["robust"][0]["scores"]


# ---- defaults, names, errors

ALL = dict(image_size=224, weights="imagenet", freeze_bn=True, flip=True, eps_ramp=[0, 0])
KE = ALL | dict(arch="mobilenetv2", embedding_dim=128, crop="resized", epochs=200, batch_size=120,
                images_per_class=0, lr=1e-4, weight_decay=1e-4, warmup_epochs=1, eps=16 / 255,
                step_size=4 / 255, attack_steps=10, eval_eps=8 / 255, beta=0.5, attack_loss="shift")
ZHOU = ALL | dict(arch="resnet18", embedding_dim=512, crop="square", epochs=75, batch_size=112,
                  images_per_class=0, lr=1e-5, weight_decay=4e-4, warmup_epochs=0, eps=8 / 255,
                  step_size=1 / 255, attack_steps=8, eval_eps=8 / 255)
PANUM = ALL | dict(arch="resnet50", embedding_dim=128, crop="resized", epochs=150, batch_size=112,
                   images_per_class=2, lr=1e-5, weight_decay=4e-4, warmup_epochs=0, eps=0.01,
                   step_size=0.004, attack_steps=5, eval_eps=0.01, loss="contrastive",
                   attack_rate=0.5, perturb="positive", reg_weight=0)
OWN = dict(members=1, split=False, mixup_target="label", trades_lambda=6, source="random")
FAST = KE | OWN | dict(attack_steps=1, step_size=20 / 255, eps_ramp=[0, 150])
FARE = KE | OWN | dict(weights="teacher", warmup_epochs=0, lr=1e-5)
RECIPES = {"fast": FAST, "fare": FARE, "est": ZHOU | OWN, "act": ZHOU | OWN}
PAPERS = [(eat, "", KE | dict(members=3, split=True)), (panum_at, "", PANUM),
          (hardness_manipulation, "", ZHOU | dict(source="softhard", destination="lga", ics=0)),
          *((baselines, f"--method {method}", RECIPES.get(method, KE | OWN))
            for method in baselines.METHODS)]


FOLLOW = [                                       # defaults that other flags decide
    (eat, "--weights none", dict(freeze_bn=False, warmup_epochs=0)),
    (eat, "--weights none --freeze-bn --warmup-epochs 2", dict(freeze_bn=True, warmup_epochs=2)),
    (eat, "--arch convnet", dict(weights="none", freeze_bn=False)),
    (eat, "--dataset glyphs --lr 0.5 --eps-ramp 5 6", dict(lr=0.5, eps_ramp=[5, 6], epochs=12)),
    (baselines, "--method fast --eps 0.1", dict(step_size=0.125, eps_ramp=[0, 150], eps=0.1)),
    (baselines, "--epochs 9 --method=fast", dict(eps_ramp=[0, 6], step_size=20 / 255)),
    (baselines, "--dataset glyphs --method fast --epochs 10 --eps 0.2", dict(
        eps_ramp=[0, 7], step_size=0.25, lr=4e-3)),
    (baselines, "--method fast --step-size 0 --eps-ramp 0 0", dict(step_size=0, eps_ramp=[0, 0])),
    (baselines, "--method fare --dataset glyphs", baselines.SMALL | dict(
        eps_ramp=[0, 0], freeze_bn=True, warmup_epochs=0, weights="teacher")),
    (panum_at, "--dataset sop", dict(epochs=100)),
    (panum_at, "--dataset=sop --epochs 7", dict(epochs=7)),
    (panum_at, "--eps 0.05", dict(step_size=pytest.approx(0.02), eval_eps=0.01)),
    (panum_at, "--attack-steps 10", dict(step_size=pytest.approx(0.002))),
    (panum_at, "--eps 8/255 --step-size 0.001", dict(step_size=0.001)),
    (panum_at, "--loss triplet --reg-weight 2", PANUM | dict(
        loss="triplet", reg_weight=2, attack_rate=1)),
    (hardness_manipulation, "--ics --destination 0.1", dict(ics=0.5, destination=0.1)),
    (hardness_manipulation, "--dataset=sop --ics", dict(ics=0.05))]


@pytest.mark.parametrize("script, words, expected", PAPERS + FOLLOW)
def test_the_defaults_are_the_papers(script, words, expected):
    args = vars(script.parse_args(["--dataset", "cub", *words.split()]))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("script, words, small", [
    (eat, "", eat.SMALL), (panum_at, "", panum_at.SMALL), (hardness_manipulation, "",
                                                           hardness_manipulation.SMALL),
    (panum_at, "--loss triplet", panum_at.SMALL_TRIPLET),
    (panum_at, "--dataset gaussian", panum_at.GAUSSIAN),
    (baselines, "--method fast", baselines.SMALL | dict(
        epochs=54, lr=4e-3, attack_steps=1, step_size=10 / 255, eps_ramp=[0, 40])),
    *((baselines, f"--method {method}", baselines.SMALL_TRIPLET if method in ("est", "act") else
       baselines.SMALL) for method in baselines.METHODS if method not in ("fast", "fare"))])
def test_generated_data_brings_small_defaults_that_reach_the_ball(script, words, small):
    args = vars(script.parse_args(words.split()))
    assert args["dataset"] == ("gaussian" if "gaussian" in words else "glyphs")
    assert {name: args[name] for name in small} == small and eat.SMALL == baselines.SMALL
    assert (args["arch"], args["weights"], args["flip"]) == ("convnet", "none", False)
    radii = 1 if script is hardness_manipulation or words.endswith(("act", "est", "fast")) else 2
    assert args["attack_steps"] * args["step_size"] >= radii * args["eps"] * (1 - 1e-9)


@pytest.mark.parametrize("script, words, name", [
    (eat, "", "eat"), (eat, "--members 5", "eat-x5"), (eat, "--no-split", "eat-nosplit"),
    (eat, "--beta 0", "eat-beta0"), (eat, "--attack-loss label --members 2", "eat-x2-label"),
    (baselines, "", "natural"), (baselines, "--method at --members 3", "at-x3"),
    (baselines, "--method at --members 3 --split", "at-x3-split"),
    (baselines, "--method at --beta 0 --attack-loss label", "at-beta0-label"),
    (baselines, "--method trades --trades-lambda 1", "trades-lambda1"),
    (baselines, "--method iat --mixup-target embedding", "iat-embedding"),
    (baselines, "--method fast", "fast"), (baselines, "--method fast --members 3", "fast-x3"),
    (baselines, "--method fare --teacher run", "fare"),
    (baselines, "--method est --source softhard", "est-softhard"),
    (panum_at, "", "panum"), (panum_at, "--loss triplet", "panum-triplet"),
    (panum_at, "--attack-rate 0 --perturb negative", "panum-rate0-negative"),
    (panum_at, "--reg-weight 0.5", "panum-lambda0.5"),
    (hardness_manipulation, "", "hm-softhard-lga"),
    (hardness_manipulation, "--ics", "hm-softhard-lga-ics"),
    (hardness_manipulation, "--ics 0.1", "hm-softhard-lga-ics-0.1"),
    (hardness_manipulation, "--source random --destination semihard", "hm-random-semihard"),
    (hardness_manipulation, "--destination -0.1", "hm-softhard--0.1"),
    (hardness_manipulation, "--destination g-b --attack-steps 32", "hm-softhard-g-b-eta32")])
def test_the_name_of_a_run_says_what_is_not_the_default(script, words, name, tmp_path, monkeypatch):
    args = script.parse_args(["--dataset", "cub", "--seed", "3", *words.split()])
    assert script.run_name(args) == name and args.out is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_run_data", lambda args: (None, None))
    common.Run(args, name.split("-")[0], name).lock.__exit__(None, None, None)
    assert [str(path) for path in Path("runs").iterdir()] == [f"runs/{name}-cub-{args.arch}-s3"]


REFUSED = [(name, *pair) for name, pairs in {
    "eat-x2": [
        ("--eps 8", "did you mean 8/255?"), ("--eps=-1/255", "-1/255"), ("--eps 8/0", "8/0"),
        ("--eps nan", "nan"), ("--attack-steps 1.5", "1.5"), ("--dataset nope", "nope"),
        ("--arch nope", "nope"), ("--batch-size 0", "0"), ("--members 0", "0"), ("--seed -1", "-1"),
        ("--members 1", "--no-split"), ("--beta 1.1", "1.1"), ("--lr nan", "nan"),
        ("--epoch 3", "--epoch"), ("--epochs", "--epochs"), ("--limit-queries 1", "1 to report on"),
        ("--val-classes 2", "1 classes to train on"), ("--images-per-class 13", "13"),
        ("--data-root nowhere", "nowhere"), ("--device nope", "nope"), ("--device cuda:99", "cuda"),
        ("--weights imagenet", "convnet"), ("--arch resnet18 --weights no.pth", "no.pth")],
    "natural": [
        ("--method nope", "nope"), ("--method", "--method"), ("--method at --beta 2", "2"),
        ("--beta 0.1", "--beta belongs to --method at, not to natural"),
        ("--split", "drop --split"), ("--attack-loss label", "belongs to --method at"),
        ("--mixup-target embedding", "belongs to --method mixup, iat"),
        ("--method est --trades-lambda 1", "belongs to --method trades"),
        ("--method at --source hardest", "belongs to --method est, act"),
        ("--method at --teacher run", "--teacher belongs to --method fare, not to at"),
        ("--method fare", "give their run, --teacher RUN"),
        ("--method est --batch-size 5", "even"), ("--method act --images-per-class 2", "drop"),
        ("--method est --members 2", "--members")],
    "panum": [
        ("--loss nope", "nope"), ("--attack-rate 2", "2"), ("--perturb nope", "nope"),
        ("--reg-weight 1 --perturb negative", "drop --perturb"), ("--reg-weight -1", "-1"),
        ("--reg-weight 1 --attack-rate 0.2", "--attack-rate"), ("--batch-size 8", "4 classes of 2"),
        ("--images-per-class 1", "positives")],
    HM: [("--source nope", "nope"), ("--destination nope", "nope"), ("--destination 2.5", "2.5"),
         ("--ics -1", "-1"), ("--destination softhard", "--ics"), ("--batch-size 5", "even"),
         ("--images-per-class 2", "--images-per-class")]}.items() for pair in pairs]


@pytest.mark.parametrize("name, bad, words", REFUSED)
def test_a_bad_value_is_one_line_and_no_run_begins(name, bad, words, tmp_path, fails):
    fails(2, [words], name, tmp_path / "run", bad)
    assert not {"run/last.pt", "run/results.json"} & set(contents(tmp_path))


@pytest.mark.parametrize("more, words", [
    ("--weights none", "drop --weights"), ("--weights file.pth", "drop --weights"),
    ("--teacher nowhere", "cannot read nowhere"),
    ("--arch resnet18", "--arch resnet18 does not fit"), ("--members 3", "which has 2"),
    ("--embedding-dim 4", "which has 8"), ("--image-size 64", "which has 32"),
    ("--crop square", "--crop square does not"), ("--val-classes 1", "--val-classes 1 does not"),
    ("--dataset gaussian --image-size 32", "--dataset gaussian does not")])
def test_a_teacher_that_does_not_fit_is_one_line_and_makes_no_folder(more, words, tmp_path, fails):
    fails(2, [words], "fare-x2", tmp_path / "run", more)
    assert not (tmp_path / "run").exists()


def test_a_teacher_has_the_same_images_and_a_folder_of_its_own(tmp_path, fails):
    root, own = shutil.copytree(pictures(), tmp_path / "changed"), tmp_path / "teacher"
    (root / "class0").rename(root / "class00")
    fails(2, ["on other classes or images"], "fare-x2", tmp_path / "run", data=root)
    shutil.copytree(teacher(), own)
    for path in (own, own / "last.pt"):
        fails(2, ["teacher's own folder"], "fare-x2", own, f"--teacher {path}")
    assert contents(own) == contents(teacher()) and not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_teacher_that_it_began_with(tmp_path, fails):
    own, out = shutil.copytree(teacher(), tmp_path / "teacher"), tmp_path / "run"
    words, changed = f"--teacher {own}", saved(own)
    before = contents(interrupted("fare-x2", out, "log.jsonl", 3, more=words))
    changed["members"][1]["head.bias"][0] += 1e-3
    torch.save(changed, own / "last.pt")
    fails(2, [f"the teacher {own} has changed"], "fare-x2", out, words)
    (own / "last.pt").unlink()
    fails(2, [f"cannot read {own}"], "fare-x2", out, words)
    assert contents(out) == before


def test_training_data_without_pairs_is_one_line(tmp_path, fails):
    root = shutil.copytree(pictures(), tmp_path / "pictures")
    for picture in [*root.glob("class[12]/[1-7].png")]:
        picture.unlink()                         # class0 alone has pairs
    for name in ("act", HM):
        fails(2, ["fewer than 2 training classes with two images"], name, tmp_path / name,
              data=root)


def test_an_out_that_is_a_file_is_one_line(tmp_path, fails):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        fails(2, ["file"], "eat-x2", out)
    assert contents(tmp_path) == {"file": b"mine"}
