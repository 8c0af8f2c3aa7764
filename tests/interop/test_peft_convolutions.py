"""DoRA, LoHa and LoKr on convolutions: against a base with its kernel changed, and against HF PEFT's files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adapterlab as al
from adapterlab.errors import FormatError
from adapterlab.methods.low_rank.dora import DoRA
from adapterlab.methods.structured.loha import LoHa
from adapterlab.methods.structured.lokr import LoKr

TOLERANCE = 1e-5


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (3, 2), padding=1, stride=(2, 1), **options)
        self.point = nn.Conv2d(6, 6, 1, bias=False)
        self.line = nn.Conv1d(6, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.line(self.point(self.conv(x)).flatten(2))
        return y


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options).eval()


def perturb(parameters: Any) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=draw) * 0.3)


@pytest.fixture
def fresh_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT passes `torch.kron` a w2 whose stride along an axis of size one stops some versions of torch."""
    theirs = peft.tuners.lokr.layer
    build = theirs.make_weight_cp
    monkeypatch.setattr(theirs, "make_weight_cp", lambda *a: build(*a).clone(memory_format=torch.contiguous_format))


X = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(1))
BOTH, ALL = ("conv", "point"), ("conv", "point", "line")
OURS = {
    "dora": DoRA(r=2, alpha=3, targets=ALL),
    "dora, square root": DoRA(r=3, scale="sqrt", rank_pattern={"line": 2}, targets=ALL),
    "loha": LoHa(r=2, alpha=3, targets=ALL),
    "loha, cores": LoHa(r=2, alpha=3, targets=ALL, effective_conv=True),
    "lokr, whole": LoKr(r=9, targets=BOTH),
    "lokr, thin": LoKr(r=1, alpha=2, targets=ALL, factor=1),
    "lokr, both thin": LoKr(r=1, targets=ALL, factor=4, decompose_both=True, rank_pattern={"point": 2}),
    "lokr, cores in the plane": LoKr(r=1, targets=["conv"], factor=2, start="lycoris", effective_conv=True),
    "lokr, cores": LoKr(r=1, alpha=2, targets=ALL, factor=2, effective_conv=True),
}
THEIRS = {
    "dora": peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=list(ALL), init_lora_weights=False),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=list(ALL), init_weights=False),
    "loha, cores": peft.LoHaConfig(r=2, target_modules=list(ALL), use_effective_conv2d=True, init_weights=False),
    "lokr, whole": peft.LoKrConfig(r=9, target_modules=list(BOTH), init_weights=False),
    "lokr, thin": peft.LoKrConfig(r=1, alpha=3, target_modules=list(ALL), decompose_factor=1, init_weights=False),
    "lokr, cores": peft.LoKrConfig(
        r=1, target_modules=list(ALL), decompose_factor=2, use_effective_conv2d=True, init_weights=False
    ),
}


def attached(method: Any, **options: Any) -> tuple[Net, Any]:
    model = net(**options)
    base = model(X)
    host = al.attach(model, method)
    assert torch.allclose(model(X), base, atol=1e-6)
    perturb(host.parameters("default"))
    assert (model(X) - base).abs().max() > 1e-2
    return model, host


@pytest.mark.usefixtures("fresh_strides")
@pytest.mark.parametrize("case", OURS)
def test_peft_reads_what_we_write(case: str, tmp_path: Path) -> None:
    model, host = attached(OURS[case])
    live = model(X)
    host.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "a").eval()
    assert torch.allclose(theirs(X), live, atol=TOLERANCE)
    assert torch.equal(al.load(net(), tmp_path / "a").model(X), live)
    (tmp_path / "a" / "method.json").unlink()
    assert torch.allclose(al.load(net(), tmp_path / "a").model(X), live, atol=TOLERANCE)
    host.merge()
    assert torch.allclose(model(X), live, atol=TOLERANCE)


@pytest.mark.usefixtures("fresh_strides")
@pytest.mark.parametrize("case", THEIRS)
def test_we_read_what_peft_writes(case: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(), THEIRS[case]).eval()
    perturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    host = al.load(net(), tmp_path / "a")
    assert host.methods["default"].id == case.partition(",")[0]
    live = theirs(X)
    assert (live - net()(X)).abs().max() > 1e-2
    assert torch.allclose(host.model(X), live, atol=TOLERANCE)
    host.merge()
    assert torch.allclose(host.model(X), theirs.merge_and_unload()(X), atol=1e-4)


@pytest.mark.parametrize(("case", "effective"), [("loha", False), ("loha, cores", True), ("lokr, cores", True)])
def test_the_files_say_which_form(case: str, effective: bool, tmp_path: Path) -> None:
    attached(OURS[case])[1].save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["use_effective_conv2d"] is effective


@pytest.mark.parametrize("case", ["dora", "loha, cores", "lokr, cores"])
def test_rows_of_a_batch_have_their_own_kernel(case: str) -> None:
    model, host = attached(OURS[case])
    live = model(X)
    with host.using():
        base = model(X)
    with host.rows([None, "default"]):
        mixed = model(X)
    assert torch.allclose(mixed, torch.stack([base[0], live[1]]), atol=TOLERANCE)


def test_dropout_of_dora_is_on_the_directions_alone() -> None:
    """With the update at zero and m doubled, y = W x + b + W drop(x): the bias is neither dropped nor scaled."""
    model = net()
    base = model.conv(X)
    host = al.attach(model, DoRA(targets=["conv"], dropout=0.5))
    layer = host.adapters("default")["conv"]
    with torch.no_grad():
        layer.m.mul_(2)
    model.train()
    plain = net().conv
    torch.manual_seed(5)
    found = model.conv(X)
    torch.manual_seed(5)
    wanted = base + plain._conv_forward(nn.functional.dropout(X, 0.5), plain.weight, None)
    assert torch.allclose(found, wanted, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("case", "count"),
    [
        ("dora", 2 * (24 + 6) + 6),
        ("loha", 2 * 2 * (24 + 6)),
        ("loha, cores", 2 * 2 * (4 + 6 + 2 * 6)),
        ("lokr, whole", 2 * 2 + 3 * 2 * 6),
        ("lokr, thin", 1 + 1 * (6 + 4 * 6)),
        ("lokr, cores", 2 * 2 + (3 + 2 + 6)),
    ],
)
def test_the_count_follows_the_formula(case: str, count: int) -> None:
    host = al.attach(net(), OURS[case])
    assert sum(p.numel() for p in host.adapters("default")["conv"].parameters()) == count


def changed(conv: Any, layer: Any, method: Any) -> Any:
    """The kernel that the method defines, by formulas on `[out, in, h, w]` in float64."""
    made, p = copy.deepcopy(conv).double(), {k: v.double() for k, v in layer.state_dict().items()}
    weight, s = made.weight.detach(), layer.scale
    if method.id == "dora":
        direction = weight + s * (p["B"] @ p["A"]).view_as(weight)
        new = p["m"].view(-1, 1, 1, 1) * direction / direction.pow(2).sum((1, 2, 3), keepdim=True).sqrt()
    elif method.id == "loha":
        a, b = (torch.einsum("abhw,ao,bi->oihw", p[f"t{i}"], p[f"w{i}_a"], p[f"w{i}_b"]) for i in (1, 2))
        new = weight + s * a * b
    else:
        new = weight + s * torch.einsum("ab,cdhw->acbdhw", p["w1"], p["w2"]).reshape(weight.shape)
    made.weight.data.copy_(new)
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 2}, {"dilation": 2, "bias": False}, {"padding": 1, "padding_mode": "circular"}],
    ids=str,
)
@pytest.mark.parametrize("case", ["dora", "loha, cores", "lokr, whole"])
def test_a_convolution_computes_with_its_kernel_changed(case: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **options)
    original, model = copy.deepcopy(conv), nn.Sequential(conv)
    host = al.attach(model, OURS[case].replace(targets=("0",)))
    perturb(host.parameters("default"))
    layer, method = host.adapters("default")["0"], OURS[case]
    live = model(X)
    expected = changed(original, layer, method)
    assert torch.allclose(live.double(), expected(X.double()), atol=1e-4)
    assert torch.allclose(model(X[0]).double(), expected(X[0].double()), atol=1e-4)
    host.merge()
    assert torch.allclose(conv.weight.double(), expected.weight, atol=1e-5)
    assert torch.allclose(model(X), live, atol=1e-4)


@pytest.mark.parametrize("case", ["loha", "lokr, whole", "dora"])
def test_gradients_are_those_of_the_changed_kernel(case: str) -> None:
    model, host = attached(OURS[case].replace(targets=("conv",)))
    layer, base = host.adapters("default")["conv"], net().conv
    found = torch.autograd.grad(model.conv(X).square().sum(), list(layer.parameters()))
    if case == "dora":  # no gradient flows through the norms
        gain = layer.m / layer.norms()
        kernel = (gain[:, None] * (base.weight.flatten(1) + layer.delta())).view_as(base.weight)
    else:
        kernel = base.weight + layer.delta().view_as(base.weight)
    wanted = torch.autograd.grad(base._conv_forward(X, kernel, base.bias).square().sum(), list(layer.parameters()))
    for ours, plain in zip(found, wanted, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-3, atol=1e-3)


def test_dropped_rows_are_output_channels() -> None:
    model, host = attached(LoHa(r=2, targets=["conv"], rank_dropout=0.5))
    model.train()
    torch.manual_seed(1)
    added = host.adapters("default")["conv"].added(X)
    dropped = (added == 0).flatten(2).all(2).all(0)
    assert 0 < int(dropped.sum()) < 6
    assert bool((added[:, ~dropped] != 0).any())


@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        ("dora", {"groups": 2}, "groups, a dilation or a padding"),
        ("dora", {"dilation": (2, 1)}, "groups, a dilation or a padding"),
        ("loha", {"padding_mode": "circular"}, "a padding that PEFT"),
        ("lokr, whole", {"padding_mode": "reflect"}, "a padding that PEFT"),
    ],
)
def test_what_peft_computes_otherwise_stays_ours(
    case: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model, host = attached(OURS[case].replace(targets=("conv",)), **options)
    live = model(X)
    host.save(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    assert torch.equal(al.load(net(**options), tmp_path / "a").model(X), live)
    config = copy.deepcopy(THEIRS[case])
    config.target_modules = {"conv"}
    peft.get_peft_model(net(**options), config).save_pretrained(tmp_path / "b")
    with pytest.raises(FormatError, match=f"conv has .*{reason}"):
        al.load(net(**options), tmp_path / "b")


@pytest.mark.parametrize("case", ["loha", "loha, cores", "lokr, thin", "lokr, whole"])
@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}], ids=str)
def test_groups_and_dilation_mean_the_same_in_peft(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, host = attached(OURS[case].replace(targets=("conv",)), **options)
    host.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] in ("LOHA", "LOKR")
    theirs = peft.PeftModel.from_pretrained(net(**options), tmp_path / "a").eval()
    assert torch.allclose(theirs(X), model(X), atol=TOLERANCE)


def test_a_whole_w2_of_one_axis_is_another_product_in_peft(tmp_path: Path) -> None:
    model, host = attached(LoKr(r=9, targets=["line"]))
    live = model(X)
    host.save(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    theirs = peft.get_peft_model(net(), peft.LoKrConfig(r=9, alpha=8, target_modules=["line"])).eval()
    with torch.no_grad():
        for key in ("w1", "w2"):
            getattr(theirs.base_model.model.line, f"lokr_{key}")["default"].copy_(
                getattr(host.adapters("default")["line"], key)
            )
    assert (theirs(X) - live).abs().max() > 1e-2
    theirs.save_pretrained(tmp_path / "b")
    with pytest.raises(FormatError, match=r"line has one axis and a whole w2.*Train the adapter"):
        al.load(net(), tmp_path / "b")


def test_kernels_of_three_axes_work_and_are_not_pefts(tmp_path: Path) -> None:
    x = torch.randn(1, 2, 4, 4, 4)
    for method in (LoHa(r=2, targets=["0"], effective_conv=True), LoKr(r=1, targets=["0"], effective_conv=True)):
        model = nn.Sequential(nn.Conv3d(2, 4, 2))
        host = al.attach(model, method)
        perturb(host.parameters("default"))
        live = model(x)
        host.save(tmp_path / method.id)
        assert not (tmp_path / method.id / "adapter_config.json").exists()
        host.merge()
        assert torch.allclose(model(x), live, atol=1e-4)
