"""Networks: against torchvision, the published numbers of BN-Inception, and files users have."""

import os
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_losses import seeded
from torch import nn
from torchvision.transforms import functional as TF

import common
from common import TORCHVISION, BNInception, UserError, build_model, frozen, load_model, train_mode

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BLOCKS = ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b")


def random_images(count=2, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=seeded(seed))


def network(arch="convnet", dim=8, seed=0, **options):
    torch.manual_seed(seed)
    return build_model(arch, dim, **options)


def with_random_statistics(net, seed=0):
    """The network, its BatchNorm statistics no longer 0 and 1, in evaluation mode."""
    for name, value in net.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1, generator=seeded(seed))
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=seeded(seed))
    return net.eval()


def saved(path, content):
    torch.save(content, path)
    return str(path)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def inputs_and_outputs(model, names, images):
    """What goes into and comes out of the named modules of a backbone."""
    seen = {}

    def record(name):
        return lambda module, args, output: seen.update({name: (args[0].clone(), output.clone())})

    hooks = [model.backbone.get_submodule(name).register_forward_hook(record(name))
             for name in names]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


# ---- embeddings
@pytest.mark.parametrize("arch", common.ARCHS)
def test_embeddings_are_unit_float32_rows_of_any_image_size(arch):
    model = network(arch, dim=5).eval()
    for size in (33, 64):
        with torch.no_grad():
            embeddings = model(random_images(2, size))
        assert embeddings.shape == (2, 5) and embeddings.dtype == torch.float32
        assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-5)
    assert all(name.startswith(("backbone.", "head.")) for name in model.state_dict())


@pytest.mark.parametrize("arch", ["mobilenetv2", "resnet18"])
def test_the_model_is_normalise_then_torchvision_then_mean_then_head(arch, tmp_path):
    torch.manual_seed(1)
    raw = with_random_statistics(torchvision.models.get_model(TORCHVISION[arch]))
    model = network(arch, weights=saved(tmp_path / "w.pth", raw.state_dict())).eval()
    images = random_images(2, 64)
    features = nn.Sequential(*list(raw.children())[:1 if arch == "mobilenetv2" else -2])
    with torch.no_grad():
        pooled = features(TF.normalize(images, MEAN, STD)).mean((2, 3))
        expected = F.normalize(model.head(pooled), dim=1)
        assert torch.allclose(model(images), expected, atol=1e-5)


def test_convnet_pools_the_sum_of_mean_and_maximum():
    model, images = network().eval(), random_images()
    with torch.no_grad():
        maps = model.backbone(TF.normalize(images, MEAN, STD))
        pooled = maps.mean((2, 3)) + maps.amax((2, 3))
        assert torch.allclose(model(images), F.normalize(model.head(pooled), dim=1), atol=1e-6)


@pytest.mark.parametrize("arch, dim, parameters", [
    ("mobilenetv2", 128, 2_387_840), ("bninception", 64, 10_335_840),
    ("bninception", 512, 10_795_040)])
def test_a_network_has_the_published_number_of_parameters(arch, dim, parameters):
    assert sum(p.numel() for p in network(arch, dim).parameters()) == parameters


def test_amp_runs_the_backbone_in_bfloat16_and_returns_float32_unit_rows():
    model, images = network().eval(), random_images()
    with torch.no_grad():
        exact = model(images)
        model.amp = True
        (_, inside), = inputs_and_outputs(model, ["0"], images).values()
        embeddings = model(images)
    assert inside.dtype == torch.bfloat16 and embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.allclose(embeddings, exact, atol=0.05) and not torch.equal(embeddings, exact)


# ---- BN-Inception
def test_bninception_has_the_published_counts_names_and_strides():
    net = BNInception()
    convolutions = {name for name, part in net.named_modules() if isinstance(part, nn.Conv2d)}
    assert len(convolutions) == 69
    assert {name + "_bn" for name in convolutions} == {
        name for name, part in net.named_modules() if isinstance(part, nn.BatchNorm2d)}
    assert sum(p.numel() for p in net.parameters()) == 10_270_240
    names = set(net.state_dict())
    assert len(names) + 2 == 485                           # with last_linear's weight and bias
    assert {"conv1_7x7_s2.bias", "conv2_3x3_reduce_bn.running_var",
            "inception_5b_pool_proj_bn.weight", "inception_4e_double_3x3_1.weight"} <= names
    assert {name for name in convolutions if net.get_submodule(name).stride == (2, 2)} == {
        "conv1_7x7_s2", "inception_3c_3x3", "inception_3c_double_3x3_2",
        "inception_4e_3x3", "inception_4e_double_3x3_2"}
    with torch.no_grad():
        assert net.eval()(random_images(1, 224)).shape == (1, 1024, 7, 7)


def test_bninception_concatenates_and_pools_as_the_published_table_says():
    model, images = with_random_statistics(network("bninception")), random_images(1, 96)
    names = [name for name, module in model.backbone.named_modules()
             if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    seen = inputs_and_outputs(model, names, images)
    caffe = images.flip(1) * 255 - torch.tensor([104.0, 117.0, 128.0]).view(3, 1, 1)   # BGR
    assert torch.allclose(seen["conv1_7x7_s2"][0], caffe, atol=1e-3)
    for block, following in zip(BLOCKS, [*BLOCKS[1:], None]):
        name = f"inception_{block}_"
        entering = seen[name + "3x3_reduce"][0]
        if block in ("3c", "4e"):
            last = F.max_pool2d(entering, 3, 2, ceil_mode=True)
        else:
            pooling = F.max_pool2d if block == "5b" else F.avg_pool2d
            pooled = pooling(entering, 3, 1, 1)
            assert torch.allclose(seen[name + "pool_proj"][0], pooled, atol=1e-5), block
            last = F.relu(seen[name + "pool_proj_bn"][1])
        parts = [F.relu(seen[name + branch + "_bn"][1]) for branch in
                 ("1x1", "3x3", "double_3x3_2") if name + branch in seen]
        joined = torch.cat([*parts, last], 1)
        if following:
            assert torch.equal(seen[f"inception_{following}_3x3_reduce"][0], joined), block
    pooled = joined.mean((2, 3)) + joined.amax((2, 3))
    with torch.no_grad():
        expected = F.normalize(model.head(pooled), dim=1)
        assert torch.allclose(model(images), expected, atol=1e-6)


# ---- weights files
def unpacked(form, state):
    """A state dict in one of the forms that people keep it in."""
    if form in ("state_dict", "model_state_dict", "model"):
        return {form: state, "epoch": 90}
    if form.startswith("without"):
        ends = {"without classifier": ("classifier", "fc", "last_linear"),
                "without counters": "num_batches_tracked"}[form]
        return {name: value for name, value in state.items()
                if not name.startswith(ends) and not name.endswith(ends)}
    if form == "batch norm (1, C)":
        return {name: value[None] if "_bn." in name and value.dim() == 1 else value
                for name, value in state.items()}
    return {form + name: value for name, value in state.items()}


@pytest.mark.parametrize("arch, form", [
    ("mobilenetv2", ""), ("resnet18", ""), ("bninception", ""),
    ("mobilenetv2", "without classifier"), ("resnet18", "without classifier"),
    ("bninception", "without classifier"), ("resnet18", "state_dict"),
    ("resnet18", "model_state_dict"), ("mobilenetv2", "model"), ("mobilenetv2", "module."),
    ("resnet18", "_orig_mod."), ("resnet18", "model."), ("resnet18", "module.model."),
    ("resnet18", "without counters"), ("bninception", "without counters"),
    ("bninception", "batch norm (1, C)")])
def test_a_weights_file_loads_in_every_form_that_people_have(arch, form, tmp_path):
    torch.manual_seed(3)
    if arch == "bninception":
        whole = {**BNInception().state_dict(), "last_linear.weight": torch.rand(1000, 1024),
                 "last_linear.bias": torch.rand(1000)}
    else:
        whole = torchvision.models.get_model(TORCHVISION[arch]).state_dict()
    for value in whole.values():
        if value.dim() == 1:
            value.copy_(torch.randn(value.shape))
    loaded = build_model(arch, 8, saved(tmp_path / "w.pth", unpacked(form, whole)))
    loaded = loaded.backbone.state_dict()
    assert loaded and all(torch.equal(loaded[name], whole[name]) for name in loaded)


@pytest.mark.parametrize("arch, other", [("mobilenetv2", "resnet18"), ("resnet18", "resnet50"),
                                         ("resnet18", "resnet18")])
def test_weights_that_do_not_fit_are_a_user_error(arch, other, tmp_path):
    content = torchvision.models.get_model(TORCHVISION.get(other, other)).state_dict()
    if arch == other:                                      # one tensor of another shape
        content["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    path = saved(tmp_path / "w.pth", content)
    with pytest.raises(UserError, match=f"does not fit --arch {arch}") as error:
        build_model(arch, 8, path)
    assert path in one_line(error)
    assert arch != other or "first: conv1.weight" in one_line(error)


@pytest.mark.parametrize("content, word", [
    (b"<html>Not found</html>", "web page"), (b"PK\x03\x04 cut off", "damaged"),
    (b"", "damaged"), (None, "No such file"), ("a run", "does not fit")])
def test_a_file_that_holds_no_weights_is_a_user_error(content, word, tmp_path):
    path = tmp_path / "w.pth"
    if content == "a run":
        saved(path, checkpoint([network()]))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=word) as error:
        build_model("mobilenetv2", 8, str(path))
    assert str(path) in one_line(error)


def test_imagenet_weights_that_cannot_be_had_name_the_file_and_the_flag(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for arch in ("mobilenetv2", "resnet50", "bninception", "convnet"):
        with pytest.raises(UserError, match="--weights FILE") as error:
            build_model(arch, 8, "imagenet")
        if arch in TORCHVISION:
            weights = torchvision.models.get_model_weights(TORCHVISION[arch])
            url = weights["IMAGENET1K_V1"].url
            assert url in one_line(error)
        else:
            assert arch in one_line(error)
    cached = tmp_path / "checkpoints" / os.path.basename(url)              # resnet50's, cut off
    cached.parent.mkdir()
    cached.write_bytes(b"PK")
    with pytest.raises(UserError, match=f"{cached} is damaged"):
        build_model("resnet50", 8, "imagenet")


# ---- modes and gradients
def mixed_network():
    """A model half of which is in training mode and half of whose parameters are frozen."""
    model = network()
    train_mode(model, freeze_bn=True)
    model.backbone[0].weight.requires_grad_(False)
    model.head.bias.grad = torch.ones_like(model.head.bias)
    return model


def condition(model):
    """Modes, requires_grad, gradients and tensors, to compare before and after."""
    return ([module.training for module in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            {name: value.tolist() for name, value in model.state_dict().items()})


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_restores_every_module_and_parameter_even_after_an_exception(fails):
    first, second = mixed_network(), mixed_network().eval()
    before = condition(first), condition(second)
    try:
        with frozen(first, torch.sin, second):             # a plain function has nothing to freeze
            assert not any(module.training for module in first.modules())
            assert not any(p.requires_grad for p in (*first.parameters(), *second.parameters()))
            with frozen(first):                            # one within another
                pass
            assert not any(p.requires_grad for p in first.parameters())
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert (condition(first), condition(second)) == before


@pytest.mark.parametrize("freeze_bn", [False, True])
def test_train_mode_trains_batchnorms_weights_and_may_freeze_its_statistics(freeze_bn):
    model = network().eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    train_mode(model, freeze_bn)
    assert model.training and model.head.training
    model(random_images(4))[:, 0].sum().backward()
    changed = {name for name, value in model.named_buffers() if not value.equal(before[name])}
    norms = {f"backbone.{name}." for name, module in model.backbone.named_modules()
             if isinstance(module, nn.BatchNorm2d)}
    assert changed == (set() if freeze_bn else {name + statistic for name in norms for statistic in
                       ("running_mean", "running_var", "num_batches_tracked")})
    norm = model.backbone[1]
    assert norm.weight.grad.abs().sum() > 0 and norm.bias.grad.abs().sum() > 0


# ---- a run's members
def checkpoint(members):
    return {"format": common.FORMAT, "method": "eat", "args": {"arch": "convnet",
            "embedding_dim": 8, "dataset": "glyphs", "epochs": 1}, "epoch": 1, "proxies": [],
            "members": [m.state_dict() for m in members], "optimizers": [], "versions": {},
            "state": {"log": []}, "classes": {"train": [], "test": []}}


def test_a_loaded_model_gives_the_same_embeddings_to_the_bit(tmp_path):
    members = [with_random_statistics(network(seed=seed), seed) for seed in (0, 1)]
    content, images = checkpoint(members), random_images(3)
    saved(tmp_path / "last.pt", content)
    for run in (tmp_path, tmp_path / "last.pt", content):
        loaded = load_model(run)
        assert len(loaded) == 2 and not any(module.training for module in loaded)
        for member, again in zip(members, loaded):
            with torch.no_grad():
                assert torch.equal(again(images), member(images))
    content["members"][1].popitem()
    with pytest.raises(UserError, match="damaged"):
        load_model(content)
