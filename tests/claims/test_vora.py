"""VoRA: what an image becomes, who sees whom, what is learnt from the teacher, and what is left after merging."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import adapterlab as al
from adapterlab.convert.merging import merge_into_base
from adapterlab.data import Collator, PackingCollator
from adapterlab.engine.attention import fast_attention
from adapterlab.engine.loss import Loss
from adapterlab.errors import AttachError, ConfigError, DataError
from adapterlab.hosts import Host
from adapterlab.methods.composite._vision import PatchEmbedding, Tower
from adapterlab.methods.composite.vora import BothWays, Eyes, Pupil, VoRA
from adapterlab.train import Training
from adapterlab.train.loop import Listener, Loop

IMAGE, PATCH, SIDE, COUNT, LAYERS, DEPTH = 31, 8, 16, 4, 3, 2
SIZES: dict[str, Any] = {"image_token": IMAGE, "r": 4, "patch_size": PATCH, "image_size": SIDE, "width": 8}
TAUGHT: dict[str, Any] = {"image_token": IMAGE, "r": 8, "teacher": "tower"}
QUIET: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "suppress_tokens": [IMAGE]}


def small(implementation: str = "sdpa", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(implementation)
    return model


@pytest.fixture(autouse=True)
def tower() -> Any:
    """A tiny tower that never trained, with a token for the class before those of the patches."""
    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=DEPTH, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, initializer_range=0.3,
    )  # fmt: skip
    made = CLIPVisionModel(config).eval()
    VoRA.hold("tower", made)
    yield made
    VoRA.release("tower")


def mixed(side: str = "right", images: int = 1, seed: int = 3) -> dict[str, Tensor]:
    """Two rows of other lengths with `images` images each, at other places, two of them next to each other."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(3, IMAGE, (2, 12), generator=draw).tolist()
    rows = [
        [*words[0][:3], *[IMAGE] * COUNT * images, *words[0][3:7]],
        [words[1][0], *[IMAGE] * COUNT * images, *words[1][1:4]],
    ]
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    put = (lambda a, b: [*b, *a]) if side == "left" else (lambda a, b: [*a, *b])
    ids = torch.tensor([put(row, pad) for row, pad in zip(rows, fill, strict=True)])
    mask = torch.tensor([put([1] * len(row), pad) for row, pad in zip(rows, fill, strict=True)])
    pixels = torch.randn(2, images, 3, SIDE, SIDE, generator=draw)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    pixels = pixels[:, 0] if images == 1 else pixels
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "pixel_values": pixels}


def labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with every word a label."""
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE)
    return {**batch, "labels": batch["input_ids"].masked_fill(hidden, -100)}


def seeing(model: Any, randomise: Any = None, **fields: Any) -> Host:
    torch.manual_seed(2)
    host = al.attach(model, VoRA(**{**SIZES, **fields}))
    if randomise is not None:
        randomise(host, size=0.2)
    model.eval()
    return host


@torch.no_grad()
def answer(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).logits
    return found


# ---------------------------------------------------------------------- the embedding


def embedded(image: PatchEmbedding, pixels: Tensor, table: Tensor | None = None) -> Tensor:
    """W_out (norm(P patch) + position), patch by patch in float64."""
    image = copy.deepcopy(image).double()
    weight, bias = image.patches.weight.flatten(1), image.patches.bias
    table = image.positions if table is None else table
    rows = []
    for picture in pixels.double():
        for n, (y, x) in enumerate((y, x) for y in range(0, picture.shape[1], PATCH)
                                   for x in range(0, picture.shape[2], PATCH)):  # fmt: skip
            v = weight @ picture[:, y : y + PATCH, x : x + PATCH].flatten() + bias
            v = v / (v.square().mean() + 1e-5).sqrt() * image.norm.weight + table[n]
            rows.append(image.out.weight @ v)
    return torch.stack(rows).view(len(pixels), -1, image.out.out_features)


def first_input(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the first block gets."""
    seen: list[Tensor] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    answer(model, batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("images", [1, 2])
def test_patches_stand_in_the_places_of_their_tokens(randomise: Any, images: int) -> None:
    model, batch = small(), mixed(images=images)
    image = host_image(seeing(model, randomise))
    wanted = model.model.embed_tokens(batch["input_ids"]).double()
    patches = embedded(image, batch["pixel_values"].view(-1, 3, SIDE, SIDE)).flatten(0, 1)
    wanted[batch["input_ids"] == IMAGE] = patches.view(-1, wanted.shape[-1])
    assert (first_input(model, batch) - wanted).abs().max() < 1e-5


def host_image(host: Host) -> Any:
    return host.adapters("default")[""].image  # type: ignore[attr-defined]


def test_positions_are_resized_for_images_of_another_shape(randomise: Any) -> None:
    image = host_image(seeing(small(), randomise))
    pixels = torch.randn(1, 3, 16, 32)
    table = F.interpolate(image.positions.double().T.view(1, -1, 2, 2), (2, 4), mode="bilinear", align_corners=False)
    wanted = embedded(image, pixels, table[0].flatten(1).T)
    assert (image(pixels) - wanted).abs().max() < 1e-5


def test_it_begins_with_the_patches_and_positions_of_the_teacher(tower: Any) -> None:
    image = host_image(al.attach(small(), VoRA(**TAUGHT)))
    names = {name: p for name, p in tower.named_parameters() if "embedding" in name}
    patches, table = (next(p for n, p in names.items() if key in n) for key in ("patch_embedding", "position"))
    assert torch.equal(image.patches.weight, patches)
    assert torch.equal(image.positions, table[1:])  # the first is of the class
    assert not image.patches.bias.any() or image.patches.bias.shape == (16,)


SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
BOTH: dict[str, Any] = {"text_config": {**SMALL, "vocab_size": 16}, "vision_config": SMALL}
TOWERS: dict[str, Callable[[], Any]] = {
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL)),
    "siglip with text": lambda: SiglipModel(SiglipConfig(**BOTH)),
    "aimv2": lambda: Aimv2VisionModel(Aimv2VisionConfig(**SMALL)),
    "vit": lambda: ViTModel(ViTConfig(**SMALL)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4)),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_of_every_kind_can_teach(kind: str) -> None:
    torch.manual_seed(0)
    model = TOWERS[kind]().eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    VoRA.hold("tower", model)
    _, host = taught()
    with host.state.collect() as losses:
        host.model(**mixed())
    assert [bool(loss > 0) for loss in losses] == [True] * 2
    named = {name: p for name, p in model.named_parameters() if not name.startswith("text_model")}
    table = next(p for name, p in named.items() if "position" in name)
    assert torch.equal(host_image(host).positions, table.reshape(-1, 16)[-COUNT:])
    norms = [p for name, p in named.items() if name.endswith("embeddings.rms_norm.weight")]
    assert all(torch.equal(host_image(host).norm.weight, p) for p in norms)
    assert bool(norms) == (kind == "aimv2")


# ---------------------------------------------------------------------- who sees whom


def allowed(ids: Tensor, mask: Tensor) -> Tensor:
    """(j ≤ i) or image(i) = image(j), for real tokens; filling sees itself."""
    rows, tokens = ids.shape
    seen = torch.zeros(rows, 1, tokens, tokens, dtype=torch.bool)
    for b in range(rows):
        image, count = [-1] * tokens, 0
        for i in range(tokens):
            if ids[b, i] == IMAGE and mask[b, i]:
                image[i], count = count // COUNT, count + 1
        for i in range(tokens):
            for j in range(tokens):
                both = image[i] >= 0 and image[i] == image[j]
                seen[b, 0, i, j] = (bool(mask[b, j]) and j <= i) or both or i == j
    return seen


def explicit(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The plain model on the embedded input, with the mask given whole."""
    x, seen = first_input(model, batch), allowed(batch["input_ids"], batch["attention_mask"])
    if model.config._attn_implementation == "eager":
        seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(x.dtype).min)
    given = {"inputs_embeds": x, "attention_mask": seen, "position_ids": batch["position_ids"]}
    with al.host(model).using():
        return answer(model, given)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("images", [1, 2])
def test_patches_of_an_image_see_each_other_and_nothing_else_looks_ahead(
    side: str, images: int, implementation: str
) -> None:
    model, batch = small(implementation), mixed(side, images)
    seeing(model)  # B = 0, so that the plain model is the reference
    real = batch["attention_mask"] == 1
    assert (answer(model, batch) - explicit(model, batch))[real].abs().max() < 1e-4
    with fast_attention(model):
        assert (answer(model, batch) - explicit(model, batch))[real].abs().max() < 1e-4


def _masks() -> None:
    for side in ("right", "left"):
        test_patches_of_an_image_see_each_other_and_nothing_else_looks_ahead(side, 2, "sdpa")


def test_without_a_mask_and_in_other_families_it_is_the_same(tiny: Any) -> None:
    for family in ("gpt2", "qwen2", "mixtral"):
        model = tiny(family)
        ids = mixed()["input_ids"][:1]
        pixels = mixed()["pixel_values"][:1]
        seeing(model)
        other = pixels.clone()
        other[0, :, -PATCH:, -PATCH:] += 1  # the last patch
        moved = (answer(model, {"input_ids": ids, "pixel_values": pixels})
                 - answer(model, {"input_ids": ids, "pixel_values": other})).abs().amax(-1)[0]  # fmt: skip
        assert moved[:3].max() == 0  # the words before
        assert (moved[3:] > 0).all()


def test_text_alone_is_answered_as_the_base_does() -> None:
    for fields in (SIZES, TAUGHT):
        model = small()
        batch = {k: v for k, v in mixed().items() if k != "pixel_values"}
        batch["input_ids"] = batch["input_ids"] % IMAGE
        base, loss = answer(model, batch), model(**labelled(batch)).loss
        host = al.attach(model, VoRA(**fields))
        assert torch.equal(answer(model, batch), base)
        assert Loss(model).path == "chunked"
        assert torch.allclose(Loss(model)(labelled(batch)), loss, rtol=1e-5)
        host.detach("default")
        assert torch.equal(answer(model, batch), base)


# ---------------------------------------------------------------------- generation


@torch.no_grad()
def continued(model: Any, batch: dict[str, Tensor], cache: str) -> None:
    """Scores of each cached step against a whole pass over all tokens so far."""
    given = {k: v for k, v in batch.items() if k != "position_ids"}
    made = model.generate(
        **given, max_new_tokens=4, cache_implementation=cache, output_logits=True, return_dict_in_generate=True, **QUIET
    )
    for step, scores in enumerate(made.logits):
        ids = made.sequences[:, : batch["input_ids"].shape[1] + step]
        mask = torch.cat([batch["attention_mask"], torch.ones(2, step, dtype=torch.long)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        wanted = answer(model, {**whole, "pixel_values": batch["pixel_values"]})[:, -1]
        assert (scores - wanted).abs().max() < 1e-4
        if step == 0:
            assert (
                scores - answer(model, {**whole, "pixel_values": batch["pixel_values"] + 1})[:, -1]
            ).abs().max() > 0.1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_generation_is_a_whole_pass(randomise: Any, cache: str) -> None:
    for images in (1, 2):
        model = small()
        seeing(model, randomise)
        continued(model, mixed("left", images), cache)


def test_beams_keep_their_images(randomise: Any) -> None:
    for images in (1, 2):
        model, batch = small(), mixed("left", images)
        seeing(model, randomise)
        del batch["position_ids"]
        cached, plain = (
            model.generate(**batch, max_new_tokens=4, num_beams=3, use_cache=use, **QUIET) for use in (True, False)
        )
        assert torch.equal(cached, plain)


@torch.no_grad()
def test_an_image_may_follow_what_is_in_the_cache(randomise: Any) -> None:
    model = small()
    seeing(model, randomise)
    first, then = torch.tensor([[5, 6, 7]]), torch.tensor([[8, *[IMAGE] * COUNT, 9, 10]])
    pixels = mixed()["pixel_values"][:1]
    past = model(first, use_cache=True)
    held = past.get("cache") or past.get("past_key_values")
    name = "cache" if "cache" in past else "past_key_values"
    found = model(then, pixel_values=pixels, **{name: held}).logits
    wanted = model(torch.cat([first, then], 1), pixel_values=pixels).logits[:, 3:]
    assert (found - wanted).abs().max() < 1e-4
    last = torch.tensor([[11]])  # with the images shown again
    found = model(last, pixel_values=pixels, **{name: held}).logits
    wanted = model(torch.cat([first, then, last], 1), pixel_values=pixels).logits[:, -1:]
    assert (found - wanted).abs().max() < 1e-4


# ---------------------------------------------------------------------- what is learnt


def taught(randomise: Any = None, **fields: Any) -> tuple[Any, Host]:
    """A model in a run with the teacher."""
    model = small()
    torch.manual_seed(2)
    host = al.attach(model, VoRA(**{**TAUGHT, **fields}))
    host.methods["default"].begin(host, "default", 10)
    if randomise is not None:
        randomise(host, size=0.2)
    return model.train(), host


def states_of(blocks: Any, run: Callable[[], Any]) -> list[Tensor]:
    """What blocks return in float64."""
    seen: list[Tensor] = []
    first: Any = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    hooks = [block.register_forward_hook(lambda _m, _a, out: seen.append(first(out).double())) for block in blocks]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def test_blocks_learn_what_the_blocks_of_the_teacher_return(randomise: Any, tower: Any) -> None:
    model, host = taught(randomise, distill=0.5)
    batch = mixed(images=2)
    with torch.no_grad(), host.state.collect() as losses:
        found = states_of(model.model.layers, lambda: model(**batch))
    pixels = batch["pixel_values"].flatten(0, 1)
    told = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]  # the first is the embedding
    total = 0.0
    for i in range(DEPTH):
        norm, head = (m.double() for m in copy.deepcopy(pupils(host)[i].auxiliary))
        z = found[i][batch["input_ids"] == IMAGE]
        h = (z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight) @ head.weight.T
        t = told[i][:, 1:].flatten(0, 1).double()
        total += (1 - (h * t).sum(-1) / (h.norm(dim=-1) * t.norm(dim=-1))).mean().item()
    assert len(losses) == DEPTH
    assert float(sum(losses)) == pytest.approx(0.5 * total / DEPTH, rel=1e-4)


def pupils(host: Host) -> list[Any]:
    return [part for part in host.adapters("default").values() if isinstance(part, Pupil)]


def test_the_first_blocks_alone_have_updates_of_scale_one(randomise: Any) -> None:
    _, host = taught(randomise)
    parts = host.adapters("default/lora")
    linear = {path for path, module in small().named_modules() if isinstance(module, nn.Linear)}
    assert set(parts) == {path for path in linear if path.startswith(("model.layers.0.", "model.layers.1."))}
    for part in parts.values():
        assert torch.equal(part.delta(), part.B @ part.A)  # type: ignore[attr-defined]
    one = al.attach(small(), VoRA(**SIZES, blocks=1))
    assert {path.split(".")[2] for path in one.adapters("default/lora")} == {"0"}


def test_the_loss_is_of_words_alone(randomise: Any) -> None:
    model = small()
    seeing(model, randomise)
    batch = labelled(mixed())
    logits = answer(model, batch).double()[:, :-1]
    labels = batch["labels"][:, 1:]
    words = labels != -100
    wanted = float(F.cross_entropy(logits[words], labels[words]))
    loss = Loss(model)
    assert loss.path == "chunked"
    with torch.no_grad():
        assert float(loss(batch)) == pytest.approx(wanted, rel=1e-5)
        assert float(model(**batch).loss) == pytest.approx(wanted, rel=1e-5)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for compute in (loss, lambda b: model(**b)):
        assert "8 positions of images bear labels" in refusal(lambda: compute(batch))  # noqa: B023


def refusal(call: Callable[[], Any]) -> str:
    """What a call says against the batch."""
    try:
        call()
    except DataError as error:
        return str(error)
    return ""


def pictures(count: int, seed: int) -> list[dict[str, Any]]:
    """Noise with one bright patch, and a caption: where, and of which of three colours."""
    draw = torch.Generator().manual_seed(seed)
    places, colours = (torch.randint(0, n, (count,), generator=draw).tolist() for n in (4, 3))
    rows = []
    for place, colour in zip(places, colours, strict=True):
        pixels = torch.randn(3, SIDE, SIDE, generator=draw) * 0.3
        y, x = (PATCH * n for n in divmod(place, 2))
        pixels[colour, y : y + PATCH, x : x + PATCH] += 1.5
        caption = [10 + place, 20 + colour]
        ids = [1, *[IMAGE] * COUNT, 5]
        rows.append({"input_ids": [*ids, *caption], "labels": [*[-100] * len(ids), *caption], "pixel_values": pixels})
    return rows


class Watch(Listener):
    """Looks at the distance when training has ended and the maps are still there."""

    far = 1.0

    def trained(self, loop: Loop) -> None:
        self.far = distance(loop.host)


def captioned(model: Any, roll: int = 0) -> float:
    """Share of new pictures whose whole caption is generated; rolled, each has the caption of another one."""
    rows = pictures(100, 99)
    ids = torch.tensor([row["input_ids"][:-2] for row in rows])
    pixels = torch.stack([row["pixel_values"] for row in rows]).roll(roll, 0)
    made = model.eval().generate(
        ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=2, **QUIET
    )
    return float((made[:, -2:] == torch.tensor([row["input_ids"][-2:] for row in rows])).all(1).float().mean())


@torch.no_grad()
def distance(host: Host) -> float:
    """How far the blocks are from the teacher's on new pictures, by what a run would add to its loss."""
    with host.state.collect() as losses:
        host.model.train()(**Collator(0)(pictures(100, 50)))
    return float(sum(losses))


@pytest.mark.slow
def test_it_learns_to_caption_pictures_and_what_the_teacher_sees(tmp_path: Path) -> None:
    model = small()
    torch.manual_seed(1)
    host = al.attach(model, VoRA(**TAUGHT))
    training = Training(steps=150, batch_size=32, lr=5e-3, warmup=0, schedule="constant")
    watch, unseen = Watch(), captioned(model)
    loop = Loop(host, "default", pictures(1024, 0), training, listeners=[watch])
    began = distance(host)
    loop.run()
    assert began > 0.8 > 0.4 > watch.far
    assert unseen < 0.3  # by chance 1 / 12
    assert captioned(model) > 0.85
    assert captioned(model, roll=1) < 0.3
    # Merged, in memory: the same on pictures and text; from a folder: the language model, on which the eyes are put.
    batch = Collator(0)(pictures(8, 7))
    live = answer(model, batch)
    merged_folder(model, host, live, batch, tmp_path)
    host.merge()
    assert (answer(model, batch) - live).abs().max() < 1e-4
    assert captioned(model) > 0.85


def merged_folder(model: Any, host: Host, live: Tensor, batch: dict[str, Tensor], folder: Path) -> None:
    rows = [{"input_ids": [1, 4, 5, 6, 7], "labels": [1, 4, 5, 6, 7]}]
    report = merge_into_base(host, None, folder / "merged", samples=rows)
    assert report.verification.max_difference < 1e-4
    alone = LlamaForCausalLM.from_pretrained(folder / "merged").eval()
    assert alone.state_dict().keys() == small().state_dict().keys()
    again = VoRA.carry(host, "default", alone)
    assert (answer(alone, batch) - live).abs().max() < 1e-4
    again.save(folder / "eyes")
    other = LlamaForCausalLM.from_pretrained(folder / "merged").eval()
    al.load(other, folder / "eyes")
    assert torch.equal(answer(other, batch), answer(alone, batch))


def test_merged_it_computes_what_it_computed(randomise: Any) -> None:
    model = small()
    host = seeing(model, randomise)
    text = {k: v for k, v in mixed().items() if k != "pixel_values"}
    text["input_ids"] = text["input_ids"] % IMAGE
    live = [answer(model, batch) for batch in (mixed(), text)]
    host.merge()
    for batch, wanted in zip((mixed(), text), live, strict=True):
        assert (answer(model, batch) - wanted).abs().max() < 1e-4
    continued(model, mixed("left"), "dynamic")
    host.restore()
    assert torch.equal(answer(model, mixed()), live[0])


# ---------------------------------------------------------------------- runs, folders, refusals


@pytest.mark.parametrize("mode", ["full", "cheap"])
def test_computing_activations_again_changes_no_gradient(randomise: Any, mode: str) -> None:
    model, host = taught(randomise)
    batch, found = labelled(mixed()), []
    for recompute in ("none", mode):
        host.recompute(recompute)  # type: ignore[arg-type]
        with host.state.collect() as losses:
            (model(**batch).loss + sum(losses)).backward()
        found.append({key: p.grad.clone() for key, p in host.named_parameters("default").items()})
        model.zero_grad()
    assert any("auxiliary" in key for key in found[0])
    assert all(bool(grad.any()) for grad in found[0].values())
    for key, grad in found[0].items():
        assert torch.allclose(found[1][key], grad, atol=1e-6), key


def test_a_run_goes_on_exactly_and_leaves_neither_teacher_nor_maps(tmp_path: Path, tower: Any) -> None:
    def loop(saved: Any = None) -> Loop:
        model = small()
        torch.manual_seed(1)
        host = Host(model)
        host.attach(VoRA(**TAUGHT), "default", saved=saved)
        return Loop(host, "default", pictures(16, 0), Training(steps=4, batch_size=8, lr=1e-2), prepare=saved is None)

    whole = loop()
    for step in range(4):
        if step == 2:
            state = pickle.dumps(whole.state_dict())
            whole.host.save(tmp_path / "between")
        whole.step()
    torch.manual_seed(77)
    rest = loop(pickle.loads(state)["adapter"])
    rest.load_state_dict(pickle.loads(state))
    rest.step()
    rest.step()
    ended, again = whole.host.state_dict("default"), rest.host.state_dict("default")
    assert sum("auxiliary" in key for key in ended) == 2 * DEPTH
    assert all(torch.equal(again[key], value) for key, value in ended.items())
    whole.method.finish(whole.host, "default")
    whole.host.save(tmp_path / "last")
    VoRA.release("tower")  # loading asks for no teacher
    for folder in ("between", "last"):
        host = al.load(small(), tmp_path / folder)
        assert not any("auxiliary" in key for key in host.state_dict("default"))
        assert not any(isinstance(m, CLIPVisionModel) for m in host.model.modules())
    batch = Collator(0)(pictures(4, 7))
    assert torch.equal(answer(host.model.eval(), batch), answer(whole.host.model.eval(), batch))
    VoRA.hold("tower", tower)


def test_a_teacher_may_lie_in_a_folder(tmp_path: Path, tower: Any) -> None:
    tower.save_pretrained(tmp_path / "tower")
    _, host = taught(teacher=str(tmp_path / "tower"))
    with host.state.collect() as losses:
        host.model(**mixed())
    _, held = taught()
    with held.state.collect() as again:
        held.model(**mixed())
    assert [float(v) for v in losses] == [float(v) for v in again]


def test_the_number_of_trained_values_is_the_documented_one() -> None:
    host = seeing(small())
    lora = LAYERS * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    assert host.summary().trainable == lora + 8 * (3 * PATCH**2 + 2 + COUNT + 32)
    assert VoRA.hf is None


def test_batches_that_do_not_fit_are_refused(randomise: Any) -> None:
    model, batch = small(), mixed()
    seeing(model, randomise)
    pixels = batch["pixel_values"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"pixel_values": None}, "has no pixel_values"),
        ({"pixel_values": pixels[:1]}, r"image token 31 \[4, 4\] times"),
        ({"pixel_values": pixels[:, None].repeat(1, 2, 1, 1, 1)}, r"image token 31 \[4, 4\] times"),
        ({"pixel_values": pixels[:, :1]}, "1 channels"),
        ({"pixel_values": pixels[..., :15]}, "16 x 15 pixels do not divide.*16 x 8"),
        ({"pixel_values": pixels[0]}, r"\[3, 16, 16\] was given"),
        ({"input_ids": batch["input_ids"] % IMAGE}, r"image token 31 \[0, 0\] times"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 11, 32)}, "there are no input_ids"),
    ]
    for change, said in wrong:
        with pytest.raises(DataError, match=said):
            answer(model, {**batch, **change})
    assert not al.host(model).state.taps
    alone = {"input_ids": torch.tensor([[3, IMAGE, 4]])}  # the token by itself is a word
    assert answer(model, alone).isfinite().all()
    loop = Loop(al.host(model), "default", pictures(4, 0), Training(steps=1))
    assert "may mix positions" in loop.batching
    with pytest.raises(DataError, match="further columns"):
        PackingCollator()(pictures(2, 0))


def test_models_and_teachers_that_do_not_fit_are_refused(tiny: Any, tower: Any) -> None:
    fields = {**SIZES, "image_token": 2}
    for family, said in (("t5", "decoder-only"), ("vit", "decoder-only"), ("bert-masked", "no attention of .* causal")):
        with pytest.raises(AttachError, match=said):
            al.attach(tiny(family), VoRA(**fields))
    with pytest.raises(ConfigError, match="ids are 0 to 31"):
        al.attach(small(), VoRA(**{**SIZES, "image_token": 32}))
    with pytest.raises(ConfigError, match="patch_size and image_size and width must be given"):
        VoRA(image_token=3)
    with pytest.raises(AttachError, match="neither the folder of a model nor a name"):
        al.attach(small(), VoRA(**{**TAUGHT, "teacher": "nowhere"}))
    with pytest.raises(AttachError, match=r"for a teacher of 2\. Set blocks between 2 and 3"):
        al.attach(small(), VoRA(**TAUGHT, blocks=1))
    VoRA.hold("linear", nn.Linear(2, 2))
    with pytest.raises(AttachError, match="no convolution"):
        al.attach(small(), VoRA(**{**TAUGHT, "teacher": "linear"}))
    VoRA.release("linear")
    _, host = taught()
    wide = {"input_ids": torch.tensor([[1, *[IMAGE] * 8, 3]]), "pixel_values": torch.randn(1, 3, 16, 32)}
    with host.state.collect(), pytest.raises(DataError, match="does not take images"):
        host.model(**wide)
    model = small()
    seeing(model).attach(VoRA(**SIZES), "second")
    with pytest.raises(AttachError, match="both live"):
        answer(model, mixed())


# ---------------------------------------------------------------------- each line matters


OPENED, PLACE, EMBEDDED, STUDY = BothWays.opened, PatchEmbedding.place, Eyes.embedded, Pupil.study
DEPTH_OF, TABLE = VoRA._depth, Eyes.same


def _opened(change: Callable[[Any, Tensor], Any]) -> Mutation:
    def opened(self: Any, mask: Any, sight: Any, queries: int, keys: int) -> Tensor:
        other = SimpleNamespace(same=sight.same, before=sight.before)
        change(other, sight.same)
        return OPENED(self, mask, other, queries, keys)  # type: ignore[arg-type]

    return (BothWays, "opened", opened)


def _sees_all(self: Any, *given: Any) -> Tensor:
    return torch.ones_like(OPENED(self, *given), dtype=torch.bool)


def _from_the_input(self: Any, run: Any, *args: Any, **kwargs: Any) -> Any:
    sight = self.state.taps.get(self.key)
    if sight is not None and sight.targets is not None and self.auxiliary is not None:
        self.state.emit(self.weight * self.distance(args[0][sight.places], sight.targets[self.index]))
    return run(*args, **kwargs)


def _twice(self: VoRA, depth: int) -> Any:
    made: Any = UPDATES(self, depth)
    return made.replace(alpha=2 * self.r)


UPDATES, STATES = VoRA.updates, Tower.states
BROKEN: dict[str, Mutation] = {
    "no norm of patches": (PatchEmbedding, "normed", lambda self, cut: cut.flatten(2).transpose(1, 2)),
    "patches column after column": (PatchEmbedding, "cut", lambda self, x: self.patches(x).transpose(2, 3)),
    "no positions": (PatchEmbedding, "place", lambda self, *grid: 0 * PLACE(self, *grid)),
    "positions are repeated, not resized": (
        PatchEmbedding, "place", lambda self, *grid: self.positions.repeat(math.prod(grid) // COUNT, 1)
    ),
    "positions before the norm": (
        PatchEmbedding, "forward", lambda self, x: self.project(self.norm(self.cut(x).flatten(2).mT + self.positions))
    ),
    "the last map is missing": (PatchEmbedding, "project", lambda self, x: F.pad(x, (0, 32 - x.shape[-1]))),
    "words in the place of patches": (Eyes, "embedded", lambda self, ids, *_: self.site.module.model.embed_tokens(ids)),
    "patches one place off": (Eyes, "embedded", lambda self, i, x, places: EMBEDDED(self, i, x, places.roll(1, 1))),
    "a causal mask": _opened(lambda sight, same: setattr(sight, "same", torch.zeros_like(same))),
    "all see all": (BothWays, "opened", _sees_all),
    "the mask one place off": _opened(lambda sight, same: setattr(sight, "same", same.roll((1, 1), (2, 3)))),
    "images of a row see each other": (
        Eyes, "same", staticmethod(lambda places, count: (places[:, :, None] & places[:, None])[:, None])
    ),
    "words see the image that follows": (
        Eyes, "same", staticmethod(lambda places, count: TABLE(places, count).any(2, keepdim=True).expand(
            -1, -1, places.shape[1], -1))
    ),
    "the cache is forgotten": _opened(lambda sight, same: setattr(sight, "before", 0)),
    "updates in all blocks": (VoRA, "_depth", lambda self, host, tower: len(host.layers)),
    "a scale of two": (VoRA, "updates", _twice),
    "squared distance": (Pupil, "distance", lambda self, z, t: F.mse_loss(self.auxiliary(z), t)),
    "cosine without one": (Pupil, "distance", lambda self, z, t: -F.cosine_similarity(self.auxiliary(z), t).mean()),
    "the norm before the map has no scale": (
        Pupil, "head", staticmethod(lambda own, width: nn.Sequential(NoScale(own), nn.Linear(own, width, bias=False)))
    ),
    "a sum over blocks": (VoRA, "share", lambda self, blocks: self.distill),
    "no weight of the distillation": (VoRA, "share", lambda self, blocks: 1 / blocks),
    "what goes into a block is compared": (Pupil, "around", _from_the_input),
    "the teacher's blocks one off": (Tower, "states", lambda self, *given: STATES(self, *given)[::-1]),
    "the token of the class is compared": (Tower, "of_patches", lambda self, state, patches: state[:, :patches]),
    "images bear labels": (Eyes, "_check_labels", staticmethod(lambda labels, places: None)),
    "the mask is merged away": (BothWays, "outlives", False),
    "the embedding is merged away": (Eyes, "outlives", False),
}  # fmt: skip


class NoScale(nn.RMSNorm):
    """Divides and does not multiply. (What it divides by is nothing to a cosine.)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, eps=1e-5)


test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_patches_stand_in_the_places_of_their_tokens, images=2),
    test_positions_are_resized_for_images_of_another_shape,
    _masks,
    test_an_image_may_follow_what_is_in_the_cache,
    test_blocks_learn_what_the_blocks_of_the_teacher_return,
    test_the_first_blocks_alone_have_updates_of_scale_one,
    test_the_loss_is_of_words_alone,
    test_merged_it_computes_what_it_computed,
    lines=BROKEN,
)


test_starting_and_saving_fail_when_a_line_is_broken = fails_without(
    test_it_begins_with_the_patches_and_positions_of_the_teacher,
    test_a_run_goes_on_exactly_and_leaves_neither_teacher_nor_maps,
    lines={
        "nothing is taken from the teacher": (PatchEmbedding, "copy_from", lambda self, tower: None),
        "the position of the class is taken": (
            Tower,
            "positions",
            property(lambda self: next(p for n, p in self.model.named_parameters() if "posi" in n)[:4]),
        ),
        "the maps are saved": (VoRA, "scaffold", ()),
    },
)
