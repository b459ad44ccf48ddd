"""Trials in the field that went wrong once, and that no other file here repeats: hostile pickles,
odd weights, trees of another layout, models and data of other people, and bad output targets."""

import hashlib
import os
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_evaluation import network, noisy_classes, picked
from torch import nn
from torch.utils.data import TensorDataset

import common
import eat
import eval as evaluator
import panum_at
from eval import check_robustness, evaluate_robustness

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = ("--dataset folder --arch convnet --image-size 16 --embedding-dim 4 --epochs 1 --members 2 "
        "--batch-size 4 --attack-steps 1 --workers 0 --device cpu").split()
HERE = ("--workers", "0", "--device", "cpu", "--attack-steps", "1")
WEIGHTS = torchvision.models.ResNet18_Weights.IMAGENET1K_V1


def make_tree(root, names, each=4):
    """Noise pictures, `each` in every folder of these names."""
    stream = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = stream.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("pictures"), "abcdef")


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    eat.main(eat.parse_args([*TINY, "--data-root", str(pictures), "--out", str(out)]))
    return out


class Hostile:
    """Unpickled, it creates a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


# ---- nothing in a file is executed
@pytest.mark.parametrize("where", ["weights", "resumed", "evaluated", "cache", "cache, its hash"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_refused_and_not_executed(where, legacy, trained, pictures, tmp_path,
                                                      monkeypatch, fails):
    trace, out = tmp_path / "executed", tmp_path / "run"
    command = [eat, *TINY, "--data-root", pictures, "--out", out]
    resnet = [*command, "--arch", "resnet18", "--weights"]
    path, command = {
        "weights": (tmp_path / "w.pth", [*resnet, tmp_path / "w.pth"]),
        "resumed": (out / "last.pt", command),
        "evaluated": (out / "last.pt", [evaluator, out, *HERE])}.get(where, (
            tmp_path / "checkpoints" / os.path.basename(WEIGHTS.url), [*resnet, "imagenet"]))
    content = {}
    if path.name == "last.pt":
        shutil.copytree(trained, out)
        content = torch.load(path)
    path.parent.mkdir(exist_ok=True)
    torch.save({**content, "args": Hostile(trace)}, path,
               _use_new_zipfile_serialization=not legacy)
    before = path.read_bytes()
    torch.load(path, weights_only=False)                    # it would be executed
    trace.unlink()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    if where == "cache, its hash":                          # as if it were the right file
        whole, right = hashlib.sha256, path.stem.rpartition("-")[2]
        monkeypatch.setattr(common, "sha256", lambda data: type(
            "Right", (), {"hexdigest": lambda self: right + whole(data).hexdigest()[8:]})())
    assert fails([path.name], *command) == 2
    assert not trace.exists() and path.read_bytes() == before


ODD = {"sparse": lambda value: value.to_sparse() if value.dim() > 1 else value,
       "complex": lambda value: value.to(torch.complex64),
       "quantised": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)}


@pytest.mark.parametrize("kind", [*ODD, "TorchScript", "tensor", "list", "network"])
def test_weights_of_an_odd_kind_are_one_line(kind, pictures, tmp_path, fails):
    path, content = tmp_path / "w.pth", common.build_model("resnet18", 4).backbone
    if kind in ODD:
        content = {name: ODD[kind](value) if value.is_floating_point() else value
                   for name, value in content.state_dict().items()}
    elif kind == "TorchScript":
        torch.jit.script(nn.Linear(2, 2)).save(str(path))
    if not path.exists():
        torch.save({"tensor": torch.zeros(2), "list": [1]}.get(kind, content), path)
    word = "does not fit --arch resnet18" if kind in ODD else "or a pickled network"
    assert fails([str(path), word], eat, *TINY, "--data-root", pictures, "--out", tmp_path / "run",
                 "--arch", "resnet18", "--weights", path) == 2
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == []


# ---- data
@pytest.mark.parametrize("names, each, words", [            # the first as Market-1501 unpacks
    (["bounding_box_train", "bounding_box_test", "query"], 4, "2 classes to train on and 1 to"),
    (["train/a", "train/b", "test/c"], 4, "2 classes to train on and 1 to report on"),
    (["train/a", "test/b", "test/c"], 4, "1 classes to train on and 2 to report on"),
    (["train/a", "train/b", "test/c", "test/d"], 1, "two images of one")])
def test_a_tree_of_another_layout_or_of_one_class_is_refused(names, each, words, tmp_path, fails):
    root, out = make_tree(tmp_path / "data", names, each), tmp_path / "run"
    assert fails([words], eat, *TINY, "--data-root", root, "--out", out) == 2
    assert not out.exists()


def test_a_class_folder_with_a_digit_that_is_no_number_is_left_out(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "images", ["001.Hawk", "100.Owl", "101.Wren", "102.Tit", "²5.Bird"])
    monkeypatch.setitem(common.OFFICIAL, "cub2010", ("CUB_200_2010", "images", 8, 8))
    for path in [*root.glob("*/*.png")]:                    # names of that edition's length
        path.rename(path.with_name(f"Bird_{path.stem}_1234567890.png"))
    train, test = common.load_dataset("cub2010", tmp_path, image_size=16)
    assert (train.classes, test.classes) == (["001.Hawk", "100.Owl"], ["101.Wren", "102.Tit"])


@pytest.mark.parametrize("shape", [(20000, 3), (3, 20000)])
def test_of_a_long_strip_only_the_middle_is_resized(shape, tmp_path):
    root = make_tree(tmp_path, "abcd")
    Image.new("RGB", shape, (0, 200, 0)).save(root / "a" / "0.png")
    train, _ = common.load_dataset("folder", root, image_size=224)
    assert max(train.pixels(0).shape) <= 8 * 256 and train[0][0].shape == (3, 224, 224)


# ---- models and data of other people
@pytest.mark.parametrize("change", [
    lambda net: torch.jit.freeze(torch.jit.script(net)), torch.jit.script,
    lambda net: lambda x: net(x).half(), lambda net: lambda x: net(x).double()])
def test_compiled_models_and_other_precisions_score_as_the_model_does(change):
    data, options = noisy_classes(), {"steps": 1, "objective": "shift"}
    wanted, found = (evaluate_robustness(model, *data, **options)
                     for model in (network(), change(network())))
    for side in (lambda result: result["clean"], lambda result: result["robust"][0]):
        assert picked(side(found)) == pytest.approx(picked(side(wanted)), abs=0.05)
    assert found["warnings"] == wanted["warnings"] == []
    outcome = {check["name"]: check["passed"]
               for check in check_robustness(change(network()), *data, **options)}
    assert len(outcome) == 16 and all(outcome[name] for name in (
        "input unchanged", "finite", "deterministic", "batch dependence", "unit norm"))


@pytest.mark.parametrize("given", [
    TensorDataset(*noisy_classes()), list(zip(*noisy_classes())), [noisy_classes()[0]],
    [{"pixels": 1}]])
def test_what_is_no_loader_is_told_what_to_give(given):
    with pytest.raises(ValueError, match=r"give images \(n, 3, H, W\).* or a loader of both"):
        evaluate_robustness(network(), given)


def test_batchnorm_without_statistics_is_found_to_depend_on_the_batch():
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(192, 8)).eval()
    result = evaluate_robustness(model, *noisy_classes(), steps=1)
    assert any("scores depend on the other images" in text for text in result["warnings"])


# ---- the command line
@pytest.mark.parametrize("target", [os.devnull, "missing/a.npz", "folder", "fifo"])
def test_saved_embeddings_without_a_place_are_refused_before_any_work(target, trained, tmp_path,
                                                                      monkeypatch, fails):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(common, "load_checkpoint", None)
    assert fails(["--save-embeddings", target.split("/")[-1], "not a file in a folder"], evaluator,
                 trained, *HERE, "--save-embeddings", tmp_path / target) == 2


@pytest.mark.parametrize("flag", ["--lr", "--epochs", "--weight-decay", "--seed"])
def test_a_number_beyond_all_use_is_one_line(flag, fails):
    assert fails([flag, "is not between"], eat, *TINY, flag, 10**22) == 2


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("can't start new thread")])
def test_too_little_memory_or_too_few_threads_are_one_line(error, monkeypatch, fails):
    monkeypatch.setattr(eat, "main", lambda args: (_ for _ in ()).throw(error))
    assert fails(["--batch-size", "--workers", str(error)], eat) == 1


def test_the_closing_step_scales_with_its_radius():
    args = panum_at.parse_args(["--eval-eps", "0.05"])
    for protocol, share in (("template", 2 / 5), ("clustering", 1 / 4)):
        for eps in (0.01, args.eval_eps):
            attack = common.protocol_attack(protocol, eps)
            assert (attack.eps, attack.step) == (eps, pytest.approx(share * eps))


def test_a_dollar_in_the_name_of_a_class_is_drawn_as_it_stands(tmp_path):
    pytest.importorskip("matplotlib")
    import figures
    plt = figures.pyplot()
    for name in ("a $5 coin", "$x", r"$\frac{$", "US$ and C$"):
        figure, axis = plt.subplots()
        axis.set_title(figures.plain(name))
        figure.savefig(tmp_path / "a.png")
        plt.close(figure)
        assert figures.plain(name).replace(r"\$", "$") == name


@pytest.mark.parametrize("name", ["inshop", "inshop-gallery"])
@pytest.mark.parametrize("left_out, words", [
    ("train", "leaves 0 classes to train on"), ("query", "3 classes to train on and 0 to")])
def test_an_inshop_list_without_a_side_is_refused(name, left_out, words, tmp_path, monkeypatch,
                                                  fails):
    root = make_tree(tmp_path, [f"img/{i}" for i in range(6)])
    rows = [f"img/{i}/{j}.png id_{i:08d} {side}" for i in range(6) for j, side in enumerate(
        ["train"] * 4 if i < 3 else ["query", "query", "gallery", "gallery"]) if side != left_out]
    (root / "list_eval_partition.txt").write_text("\n".join([f"{len(rows)}", "names", *rows]))
    for kind, sizes in (("inshop", (6, 6)), ("inshop-gallery", (6, 6, 6))):
        monkeypatch.setitem(common.OFFICIAL, kind, (*common.OFFICIAL[kind][:2], *sizes))
    run = tmp_path / "run"
    assert fails([words], eat, *TINY, "--dataset", name, "--data-root", root, "--out", run) == 2
    assert not run.exists()


@pytest.mark.parametrize("content", [
    {1: torch.zeros(1)}, {"conv1.weight": torch.zeros(64, 3, 7, 7, device="meta")}])
def test_weights_without_names_or_without_numbers(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(common.UserError, match="does not fit"):
        common.build_model("resnet18", 4, str(tmp_path / "w.pth"))


def test_a_link_stays_a_link_and_a_tmp_file_of_others_is_kept(pictures, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    common.write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"
    for name in ("notes.tmp", "last.pt.123.tmp"):
        (tmp_path / name).touch()
    eat.main(eat.parse_args([*TINY, "--data-root", str(pictures), "--out", str(tmp_path)]))
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["notes.tmp"]


@pytest.mark.parametrize("flags, words", [
    ("--arch bninception --weights none", "too small"),
    ("--arch mobilenetv2 --weights none --batch-size 1", "more than 1 value")])
def test_images_too_small_or_a_batch_of_one(flags, words, pictures, tmp_path, fails):
    assert fails([words, "--image-size"], eat, *TINY, "--data-root", pictures, "--out",
                 tmp_path / "run", *flags.split()) == 1


@pytest.mark.parametrize("part, value", [
    ("members", []), ("args", {}), ("classes", {}), ("state", {"log": "abc"}),
    ("state", {"log": [{}]})])
def test_a_checkpoint_whose_inside_is_wrong(part, value, trained, pictures, tmp_path, fails):
    run = shutil.copytree(trained, tmp_path / "run")
    torch.save({**torch.load(run / "last.pt"), part: value}, run / "last.pt")
    if value != {"log": [{}]}:
        assert fails(["last.pt"], evaluator, run, *HERE) == 2
    assert fails(["last.pt"], eat, *TINY, "--data-root", pictures, "--out", run) == 2


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_a_complete_run_whose_results_are_empty(content, trained, pictures, tmp_path, fails):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "results.json").write_text(content)
    assert fails(["results.json"], eat, *TINY, "--data-root", pictures, "--out", run) == 2
