"""Networks: against torchvision, the published numbers of BN-Inception, and files users have.

    DML_TEST_WEIGHTS=FILE pytest tests/test_models.py    # also loads real ImageNet weights
"""

import os
from argparse import Namespace
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms import functional as TF

import common
import eat
from common import (
    ARCHS,
    BNInception,
    UserError,
    build_model,
    eval_mode,
    frozen,
    load_checkpoint,
    load_model,
    save_checkpoint,
    train_mode,
)

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BLOCKS = ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


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
    """The message of a UserError; it is one line."""
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


@pytest.mark.parametrize("pool", ["avg", "avgmax"])
@pytest.mark.parametrize("arch", ARCHS)
def test_embeddings_are_unit_float32_rows(arch, pool):
    model = network(arch, dim=5, pool=pool).eval()
    for size in (33, 64):
        with torch.no_grad():
            embeddings = model(random_images(2, size))
        assert embeddings.shape == (2, 5) and embeddings.dtype == torch.float32
        assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("arch", ["mobilenetv2", "resnet18"])
def test_the_model_is_normalize_then_torchvision_then_mean_then_head(arch, tmp_path):
    torch.manual_seed(1)
    raw = with_random_statistics(torchvision.models.get_model(common.TORCHVISION[arch]))
    model = network(arch, weights=saved(tmp_path / "w.pth", raw.state_dict())).eval()
    images = random_images(2, 64)
    features = nn.Sequential(*list(raw.children())[:1 if arch == "mobilenetv2" else -2])
    with torch.no_grad():
        pooled = features(TF.normalize(images, MEAN, STD)).mean((2, 3))
        expected = F.normalize(model.head(pooled), dim=1)
        assert torch.allclose(model(images), expected, atol=1e-5)


def test_avgmax_pools_the_sum_of_mean_and_maximum():
    model = network(pool="avgmax").eval()
    images = random_images()
    with torch.no_grad():
        maps = model.backbone(model.normalize(images))
        pooled = maps.mean((2, 3)) + maps.amax((2, 3))
        assert torch.allclose(model(images), F.normalize(model.head(pooled), dim=1), atol=1e-6)


def test_average_pooling_is_the_default_except_for_bninception():
    assert {arch: network(arch).pool for arch in ("convnet", "mobilenetv2", "bninception")} == {
        "convnet": "avg", "mobilenetv2": "avg", "bninception": "avgmax"}


def test_the_normalisation_is_not_part_of_the_state_dict():
    assert all(name.startswith(("backbone.", "head.")) for name in network().state_dict())


def test_an_unknown_arch_is_a_user_error():
    with pytest.raises(UserError, match="vgg16.*mobilenetv2") as error:
        build_model("vgg16")
    one_line(error)


def test_mobilenetv2_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in network("mobilenetv2", 128).parameters()) == 2_387_840


def test_amp_runs_the_backbone_in_bfloat16_and_returns_float32_unit_rows():
    model = network().eval()
    images = random_images()
    with torch.no_grad():
        exact = model(images)
        model.amp = True
        (_, inside), = inputs_and_outputs(model, ["0"], images).values()
        embeddings = model(images)
    assert inside.dtype == torch.bfloat16
    assert embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.allclose(embeddings, exact, atol=0.05) and not torch.equal(embeddings, exact)


# ---- BN-Inception


def test_bninception_has_the_published_counts():
    net = BNInception()
    modules = list(net.modules())
    assert sum(isinstance(module, nn.Conv2d) for module in modules) == 69
    assert sum(isinstance(module, nn.BatchNorm2d) for module in modules) == 69
    assert sum(p.numel() for p in net.parameters()) == 10_270_240
    names = set(net.state_dict())
    assert len(names | {"last_linear.weight", "last_linear.bias"}) == 485
    assert sum(not name.endswith("num_batches_tracked") for name in names) + 2 == 416
    assert {"conv1_7x7_s2.bias", "conv2_3x3_reduce_bn.running_var",
            "inception_5b_pool_proj_bn.weight", "inception_4e_double_3x3_1.weight"} <= names


@pytest.mark.parametrize("dim, parameters", [(64, 10_335_840), (512, 10_795_040)])
def test_bninception_with_its_head_has_the_published_number_of_parameters(dim, parameters):
    model = build_model("bninception", dim)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_bninception_maps_224_pixels_to_1024_maps_of_7_by_7():
    with torch.no_grad():
        assert BNInception().eval()(random_images(1, 224)).shape == (1, 1024, 7, 7)


def test_bninception_has_its_strides_where_caffe_has_them():
    strided = {name for name, module in BNInception().named_modules()
               if isinstance(module, nn.Conv2d) and module.stride == (2, 2)}
    assert strided == {"conv1_7x7_s2",
                       "inception_3c_3x3", "inception_3c_double_3x3_2",
                       "inception_4e_3x3", "inception_4e_double_3x3_2"}


def test_bninception_concatenates_and_pools_as_the_published_table_says():
    model = with_random_statistics(network("bninception"))
    names = [name for name, module in model.backbone.named_modules()
             if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    seen = inputs_and_outputs(model, names, random_images(1, 96))
    for block, following in zip(BLOCKS, BLOCKS[1:]):
        name = f"inception_{block}_"
        entering = seen[name + "3x3_reduce"][0]
        parts = [F.relu(seen[name + branch + "_bn"][1]) for branch in
                 ("1x1", "3x3", "double_3x3_2", "pool_proj") if name + branch in seen]
        if block in ("3c", "4e"):
            parts.append(F.max_pool2d(entering, 3, 2, ceil_mode=True))
        assert torch.equal(seen[f"inception_{following}_3x3_reduce"][0], torch.cat(parts, 1)), block
    for block in set(BLOCKS) - {"3c", "4e"}:
        entering = seen[f"inception_{block}_1x1"][0]
        pooling = F.max_pool2d if block == "5b" else F.avg_pool2d
        pooled = seen[f"inception_{block}_pool_proj"][0]
        assert torch.allclose(pooled, pooling(entering, 3, 1, 1), atol=1e-5), block


def test_bninception_sees_bgr_times_255_minus_the_caffe_mean():
    images = random_images(1)
    (entering, _), = inputs_and_outputs(network("bninception").eval(), ["conv1_7x7_s2"],
                                        images).values()
    caffe = images.flip(1) * 255 - torch.tensor([104.0, 117.0, 128.0]).view(3, 1, 1)
    assert torch.allclose(entering, caffe, atol=1e-3)


@pytest.mark.parametrize("form", ["with classifier", "batch norm [1, C]", "without counters"])
def test_bninception_files_of_every_known_form_load(form, tmp_path):
    torch.manual_seed(3)
    wanted = with_random_statistics(BNInception()).state_dict()
    for value in wanted.values():
        if value.dim() == 1:
            value.normal_()
    content = {**wanted, "last_linear.weight": torch.rand(1000, 1024),
               "last_linear.bias": torch.rand(1000)}
    if form == "batch norm [1, C]":
        content = {name: value[None] if "_bn." in name and value.dim() == 1 else value
                   for name, value in content.items()}
    if form == "without counters":
        content = {name: value for name, value in content.items()
                   if not name.endswith("num_batches_tracked")}
    model = build_model("bninception", 8, saved(tmp_path / "bn.pth", content))
    loaded = model.backbone.state_dict()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


# ---- weights files


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("arch", ["mobilenetv2", "resnet18"])
def test_a_weights_file_loads_with_or_without_classifier_and_wrapper(arch, classifier, wrapped,
                                                                     tmp_path):
    wanted = torchvision.models.get_model(common.TORCHVISION[arch]).state_dict()
    content = {name: value for name, value in wanted.items()
               if classifier or not name.startswith(("classifier.", "fc."))}
    content = {"state_dict": content, "epoch": 90} if wrapped else content
    model = build_model(arch, 8, saved(tmp_path / "w.pth", content))
    loaded = model.backbone.state_dict()
    assert loaded and all(torch.equal(loaded[name], wanted[name]) for name in loaded)


@pytest.mark.parametrize("arch, other", [("mobilenetv2", "resnet18"), ("resnet18", "resnet50")])
def test_weights_of_another_arch_are_a_user_error(arch, other, tmp_path):
    path = saved(tmp_path / "w.pth", torchvision.models.get_model(other).state_dict())
    with pytest.raises(UserError, match=f"does not fit --arch {arch}") as error:
        build_model(arch, 8, path)
    assert path in one_line(error)


def test_a_tensor_of_another_shape_is_a_user_error(tmp_path):
    content = torchvision.models.resnet18().state_dict()
    content["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    with pytest.raises(UserError, match="1 of another shape .first: conv1.weight") as error:
        build_model("resnet18", 8, saved(tmp_path / "w.pth", content))
    one_line(error)


def test_a_run_given_as_weights_is_a_user_error(tmp_path):
    save_run(tmp_path, [network()])
    with pytest.raises(UserError, match="--resume") as error:
        build_model("convnet", 8, str(tmp_path / "last.pt"))
    assert "last.pt" in one_line(error)


@pytest.mark.parametrize("content, word", [
    (b"<!DOCTYPE html><html>Not found</html>", "web page"),
    (b"\n\n <html>", "web page"),
    (b"PK\x03\x04 cut off", "damaged"),
    (b"", "damaged"),
    (None, "No such file"),
])
def test_a_file_that_holds_no_weights_is_a_user_error(content, word, tmp_path):
    path = tmp_path / "w.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=word) as error:
        build_model("mobilenetv2", 8, str(path))
    assert str(path) in one_line(error)


@pytest.mark.parametrize("arch", ["mobilenetv2", "resnet18", "resnet50"])
def test_imagenet_weights_that_cannot_be_fetched_name_the_file_and_the_flag(arch, monkeypatch):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", offline)
    url = torchvision.models.get_model_weights(common.TORCHVISION[arch])["IMAGENET1K_V1"].url
    with pytest.raises(UserError, match="--weights FILE") as error:
        build_model(arch, 8, "imagenet")
    assert os.path.basename(url) in one_line(error) and url in one_line(error)


@pytest.mark.parametrize("arch", ["bninception", "convnet"])
def test_imagenet_weights_that_do_not_exist_are_a_user_error(arch):
    with pytest.raises(UserError, match="--weights") as error:
        build_model(arch, 8, "imagenet")
    assert arch in one_line(error)


@pytest.mark.skipif("DML_TEST_WEIGHTS" not in os.environ, reason="DML_TEST_WEIGHTS is not set")
def test_the_real_weights_load():
    path = os.environ["DML_TEST_WEIGHTS"]
    content = torch.load(path, weights_only=True)
    content = content.get("state_dict", content)
    arch = next(arch for name, arch in {
        "conv1_7x7_s2.weight": "bninception", "features.0.0.weight": "mobilenetv2",
        "layer4.0.conv3.weight": "resnet50", "layer4.0.conv2.weight": "resnet18",
    }.items() if name in content)
    loaded = build_model(arch, 8, path).backbone.state_dict()
    assert all(torch.equal(value, content[name].view_as(value)) for name, value in loaded.items()
               if name in content or not name.endswith("num_batches_tracked"))


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


@pytest.mark.parametrize("context", [eval_mode, frozen])
@pytest.mark.parametrize("fails", [False, True])
def test_a_context_restores_every_module_even_after_an_exception(context, fails):
    first, second = mixed_network(), mixed_network().eval()
    before = condition(first), condition(second)
    try:
        with context(first, second):
            assert not any(module.training for module in first.modules())
            assert any(p.requires_grad for p in first.parameters()) == (context is eval_mode)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert (condition(first), condition(second)) == before


def test_the_contexts_accept_plain_functions():
    with eval_mode(torch.sin), frozen(torch.sin):
        pass


def test_train_mode_with_frozen_batchnorm_keeps_statistics_and_trains_weight_and_bias():
    model = network()
    before = {name: value.clone() for name, value in model.named_buffers()}
    train_mode(model, freeze_bn=True)
    assert model.training and model.head.training
    model(random_images(4))[:, 0].sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    norm = model.backbone[1]
    assert norm.weight.grad.abs().sum() > 0 and norm.bias.grad.abs().sum() > 0


def test_train_mode_with_live_batchnorm_updates_statistics():
    model = network()
    train_mode(model, freeze_bn=False)
    model(random_images(4))
    assert model.backbone[1].running_mean.abs().sum() > 0


@pytest.mark.parametrize("loss", ["shift", "pal-label", "pal-pseudo", "pal-batch"])
def test_crafting_for_training_leaves_no_trace(loss):
    members = [mixed_network(), mixed_network()]
    proxies = [nn.Parameter(torch.randn(3, 8, generator=seeded(i))) for i in range(2)]
    before = [condition(member) for member in members]
    eat.attack(members, proxies, random_images(4), torch.tensor([0, 1, 2, 0]), loss, 0.1, 0.05, 2)
    assert [condition(member) for member in members] == before
    assert all(own.grad is None and own.requires_grad for own in proxies)


def test_attacking_for_evaluation_leaves_no_trace():
    model = mixed_network()
    before = condition(model)
    images = random_images(4)
    clean = common.embed([model], [(images, None, None)])[0]
    assert condition(model) == before
    common.attack_embeddings([model], [(images, None, torch.arange(4))],
                             lambda rows: common.shift_objective([model], [clean[rows]]),
                             eps=0.1, step_size=0.05, steps=2)
    assert condition(model) == before


# ---- checkpoints and initialisation


def save_run(folder, members, **changes):
    args = Namespace(out=str(folder), arch="convnet", embedding_dim=8, pool="avg", **changes)
    save_checkpoint(args, method="eat", epoch=1, members=members, proxies=[], optimizers=[],
                    schedulers=[], classes=["a"])


@pytest.mark.parametrize("name", ["", "last.pt"])
def test_a_loaded_model_gives_the_same_embeddings_to_the_bit(name, tmp_path):
    members = [with_random_statistics(network(seed=seed), seed) for seed in (0, 1)]
    save_run(tmp_path, members)
    loaded = load_model(tmp_path / name)
    images = random_images(3)
    with torch.no_grad():
        for member, copy in zip(members, loaded):
            assert not copy.training
            assert torch.equal(copy(images), member(images))
    assert len(loaded) == 2


@pytest.mark.parametrize("change", [{"format": 99}, {"format": None}, {"members": None}])
def test_a_checkpoint_of_another_format_is_refused(change, tmp_path):
    save_run(tmp_path, [network()])
    content = {**load_checkpoint(tmp_path), **change}
    content = {name: value for name, value in content.items() if value is not None}
    path = saved(tmp_path / "last.pt", content)
    with pytest.raises(UserError, match="not a checkpoint of these scripts") as error:
        load_model(tmp_path)
    assert path in one_line(error)


def test_members_start_differently_and_the_same_seed_starts_the_same():
    def start(seed, member):
        args = Namespace(seed=seed, arch="convnet", embedding_dim=8, pool="avg")
        model = common.new_member(args, torch.device("cpu"), member, "none")
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])

    assert torch.equal(start(0, 1), start(0, 1))
    for other in (start(0, 0), start(0, 2), start(1, 1)):
        assert (start(0, 1) == other).float().mean() < 0.01
