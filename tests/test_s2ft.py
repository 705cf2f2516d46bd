"""S2FT by the numbers of its card (methods/s2ft.md): dense float64 references, what backward keeps, units of GQA."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_peft_plugins.reparameterized.lora import LoRA
from lightning_peft_plugins.selective.s2ft import S2FT, put, read
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import PEFT, hf, hosts, parts
from lightning_peft.slices import Change, difference, extract, fuse
from tests import nets
from tests.selective import moved_by_training, trainable
from tests.zoo import bases as zoo

ALL = {"d_ratio": 0.1, "o_ratio": 0.5, "u_ratio": 0.2, "v_ratio": 0.5}
BASES = {"llama": (zoo.llama, zoo.text), "bert": (zoo.bert, zoo.sentences), "gpt2": (zoo.gpt2, zoo.text)}
BASES |= {"t5": (zoo.t5, zoo.text), "vit": (zoo.vit, zoo.images)}


def slices_of(model: nn.Module, name: str = "s2ft") -> dict[str, Any]:
    return {n: a for n, _, a in lp.adapters(model, name)}


def randomize(model: nn.Module, seed: int = 0, name: str = "s2ft") -> None:
    g = torch.Generator().manual_seed(seed)
    for a in slices_of(model, name).values():
        a.delta.data = torch.randn(a.delta.shape, generator=g, dtype=torch.float64).to(a.delta) * 0.2


def dense(a: Any) -> Tensor:
    """The (out, in) change that a slice stands for, entry by entry."""
    out = torch.zeros(a.shape, dtype=a.delta.dtype)
    for k, i in enumerate(a.index.tolist()):
        if a.axis == 0:
            out[i] = a.delta[k]
        else:
            out[:, i] = a.delta[:, k]
    return out.detach()


def reference(base: nn.Module, held: dict[str, Any]) -> Any:
    """A plain copy of the base with the changes written into its weights, all of which train."""
    model = copy.deepcopy(base).requires_grad_(True)
    for name, a in held.items():
        host = model.get_submodule(name)
        hosts.write(host, hosts.read(host).detach() + dense(a))
    return model


def matrix_grad(model: nn.Module, name: str) -> Tensor:
    host: Any = model.get_submodule(name)
    return hosts.as_matrix(host, host.weight.grad)


# ---- definition: forward, gradient, merge against a dense float64 reference ----------------------------------------


@pytest.mark.parametrize("which", BASES)
def test_4_forward_and_gradients_are_those_of_the_full_weight_at_the_slice(which: str) -> None:
    make, data = BASES[which]
    base, batch = make().double(), data()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    model = copy.deepcopy(base)
    lp.inject(model, S2FT(**ALL), dtype=torch.float64)
    randomize(model)
    held = slices_of(model)
    assert {a.axis for a in held.values()} == {0, 1}
    want = reference(base, held)
    y, loss = (o := model(**batch)).logits, o.loss
    loss.backward()
    want_out = want(**batch)
    want_out.loss.backward()
    assert (y - base(**batch).logits).abs().max() > 1e-4
    torch.testing.assert_close(y, want_out.logits, atol=1e-12, rtol=1e-10)
    for name, a in held.items():
        torch.testing.assert_close(a.delta.grad, matrix_grad(want, name).index_select(a.axis, a.index))
    assert trainable(model) == {f"{n}.adapters.s2ft.delta" for n in held}
    before = {k: v.clone() for k, v in base.state_dict().items()}
    lp.merge(model)
    for key, old in before.items():
        a, new = held.get(key.removesuffix(".weight")), model.state_dict()[key]
        assert torch.equal(new, old) if a is None else torch.equal(new, want.state_dict()[key])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_5_steps_are_those_of_in_place_training_of_the_slice(optimizer: Any) -> None:
    base, batch = zoo.llama().double(), zoo.text()
    model, want = copy.deepcopy(base), copy.deepcopy(base).requires_grad_(True)
    lp.inject(model, S2FT(**ALL), dtype=torch.float64)
    held = slices_of(model)
    ours = optimizer([a.delta for a in held.values()], 1e-2)
    weights = {n: want.get_submodule(n).weight for n in held}
    theirs = optimizer(weights.values(), 1e-2)
    for _ in range(5):
        for m, o in ((model, ours), (want, theirs)):
            o.zero_grad()
            m(**batch).loss.backward()
            for name, w in weights.items() if m is want else ():
                mask = torch.zeros_like(w).index_fill(held[name].axis, held[name].index, 1.0)
                w.grad *= mask
            o.step()
    torch.testing.assert_close(model(**batch).logits, want(**batch).logits, atol=1e-9, rtol=1e-7)
    found = difference(base, want)  # what in-place training changed is the adapter, in the base's own order
    assert found.keys() == held.keys()
    for name, change in found.items():
        assert torch.equal(change.index, held[name].index) and change.axis == held[name].axis
        torch.testing.assert_close(change.delta, held[name].delta.detach(), atol=1e-9, rtol=1e-6)


def test_base_weights_never_move_and_removing_restores() -> None:
    model, batch = zoo.llama(), zoo.text()
    before, y = copy.deepcopy(model.state_dict()), model(**batch).logits
    lp.inject(model, S2FT(**ALL))
    assert torch.equal(model(**batch).logits, y)
    assert moved_by_training(model, batch) == [] and not torch.equal(model(**batch).logits, y)
    lp.remove(model)
    assert torch.equal(model(**batch).logits, y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and before.keys() == set(
        model.state_dict()
    )


# ---- units: heads with their group, both sides of a coupling ---------------------------------------------------------


def test_2_units_are_whole_groups_and_both_sides_take_the_same() -> None:
    model = zoo.llama()  # 4 query heads, 2 key-value heads of 8
    lp.inject(model, S2FT(d_ratio=0.1, u_ratio=0.2, o_ratio=0.5, v_ratio=0.5, scope="layer"))
    held, groups = slices_of(model), set()
    for i in range(2):
        v, o = (held[f"model.layers.{i}.self_attn.{n}"].index.tolist() for n in ("v_proj", "o_proj"))
        group = v[0] // 8
        groups.add(group)
        assert v == list(range(8 * group, 8 * group + 8))
        assert o == list(range(16 * group, 16 * group + 16))  # the columns of both query heads of that group
        up, down = (set(held[f"model.layers.{i}.mlp.{n}"].index.tolist()) for n in ("up_proj", "down_proj"))
        assert len(down) == 4 and len(up) == 9 and down < up
    assert not any(n.endswith(("q_proj", "k_proj", "gate_proj")) for n in held)


@pytest.mark.parametrize("which", BASES)
def test_1_both_sides_of_a_coupling_are_the_same_units(which: str) -> None:
    """A unit whose rows give zero adds what it adds with zeroed columns: nothing."""
    make, data = BASES[which]
    base = make().double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in data().items()}
    sides = parts.sides(base)
    for kinds in (("v", "o"), ("up", "down")):
        outputs = []
        for kind in kinds:
            model = copy.deepcopy(base)
            for s in (s for s in sides if s.kind == kind):
                host: Any = model.get_submodule(s.layer)
                index = s.index(torch.tensor([0, s.units - 1]))
                hosts.as_matrix(host, host.weight.data).index_fill_(s.axis, index, 0.0)
                if s.axis == 0 and host.bias is not None:
                    host.bias.data.index_fill_(0, index, 0.0)
            outputs.append(model(**batch).logits)
        torch.testing.assert_close(*outputs, atol=1e-12, rtol=1e-10)
        assert (outputs[0] - base(**batch).logits).abs().max() > 1e-7


def test_3_in_a_fused_layer_only_the_values_rows_train() -> None:
    model = zoo.gpt2()
    lp.inject(model, S2FT(d_ratio=0, o_ratio=0, v_ratio=1.0))
    a = slices_of(model)["transformer.h.0.attn.c_attn"]
    assert a.index.tolist() == list(range(64, 96)) and a.delta.shape == (32, 32)


@pytest.mark.parametrize(
    ("heads", "kv", "layers", "width", "options", "units", "parameters"),
    [
        (32, 32, 32, 11008, {}, (53, 7045), 56_643_584),  # LLaMA-2-7B
        (32, 8, 32, 14336, {"d_ratio": 0.03, "o_ratio": 0.0}, (0, 13762), 56_369_152),  # LLaMA-3-8B
    ],
)
def test_7_counts_of_the_published_runs(
    heads: int, kv: int, layers: int, width: int, options: Any, units: tuple[int, int], parameters: int
) -> None:
    method = S2FT(**options)
    common: dict[str, Any] = {"axis": 1, "start": 0, "last": ""}
    sides = []
    for i in range(layers):
        sides.append(parts.Side(layer=f"o{i}", kind="o", units=kv, width=4096 // kv, **common))
        sides.append(parts.Side(layer=f"d{i}", kind="down", units=width, width=1, **common))
    sides = [s for s in sides if s.kind == "down" or method.o_ratio]
    g = torch.Generator().manual_seed(0)
    chosen = method._choose(sides, {s.layer: torch.rand(s.units, generator=g) for s in sides})
    columns = {k: sum(len(c) for n, c in chosen.items() if n[0] == k) for k in "od"}
    assert (columns["o"] // (4096 // kv), columns["d"]) == units
    assert 4096 * sum(columns.values()) == parameters
    per_layer = {len(c) for n, c in chosen.items() if n[0] == "d"}
    assert len(per_layer) > 1  # one pool over all layers
    even = S2FT(**options, scope="layer")._choose(sides, {s.layer: torch.rand(s.units, generator=g) for s in sides})
    assert {len(c) for n, c in even.items() if n[0] == "d"} == {int(method.d_ratio * width)}


def test_7_a_layer_without_a_chosen_unit_keeps_nothing_and_saves_nothing() -> None:
    model = zoo.llama()
    lp.inject(model, S2FT(d_ratio=0.011, o_ratio=0.0))  # one channel of 96
    ((name, a),) = slices_of(model).items()
    assert name.endswith("down_proj") and a.index.shape == (1,) and a.delta.shape == (32, 1)
    model(**zoo.text()).loss.backward()
    assert (a.delta.grad != 0).any()


def test_the_seed_decides_and_places_left_out_do_not_move_the_others() -> None:
    def chosen(**options: Any) -> dict[str, list[int]]:
        model = zoo.llama()
        lp.inject(model, S2FT(d_ratio=0.2, o_ratio=0.0, scope="layer", **options))
        return {n: a.index.tolist() for n, a in slices_of(model).items()}

    first = chosen()
    assert first == chosen() and first != chosen(seed=1)
    assert chosen(layers="1") == {n: i for n, i in first.items() if ".1." in n}


# ---- partial back-propagation: what is kept for backward -------------------------------------------------------------


def kept(run: Any, own: Any) -> int:
    """Bytes of storages that the graph of ``run()`` holds, weights left out."""
    mine, held = {t.untyped_storage().data_ptr() for t in own}, {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in mine:
            held[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    size = sum(t.untyped_storage().nbytes() for t in held.values())
    del y
    return size


@pytest.mark.parametrize("quantity", ["columns", "rows", "none"])
def test_8_bytes_kept_by_one_layer(quantity: str) -> None:
    layer: Any = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(4, 5, 64, requires_grad=True)
    if quantity != "none":
        axis = int(quantity == "columns")
        lp.attach(layer, "s2ft", lp.slices.Slice(layer, axis, torch.tensor([3, 9, 10])))
    held = kept(lambda: layer(x * 1.0), [*layer.parameters(), *layer.buffers()])
    assert held == {"columns": 4 * 5 * 3 * 4, "rows": 4 * 5 * 64 * 4, "none": 0}[quantity]


@pytest.mark.parametrize("bottom", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_8_the_maps_have_the_gradients_of_plain_ones(axis: int, bottom: bool) -> None:
    torch.manual_seed(0)
    x, W, b = (torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 6), (5, 6), (5,)))
    index, delta = torch.tensor([4, 1]), torch.randn((2, 6) if axis == 0 else (5, 2), dtype=torch.float64)
    run = (lp.slices.rows, lp.slices.columns)[axis]
    for t in (x, b, delta):
        t.requires_grad_(True)
    inputs = (x, b, delta) if bottom else (x, delta)

    def ours(x: Tensor, *rest: Tensor) -> Tensor:
        return run(x, W if bottom else None, rest[0] if bottom else None, index, rest[-1], (5, 6))

    assert torch.autograd.gradcheck(ours, inputs)
    full = (W if bottom else 0 * W).index_add(axis, index, delta)
    torch.testing.assert_close(ours(*inputs), x @ full.T + (b if bottom else 0))


def test_8_a_model_keeps_less_than_lora_and_full_fine_tuning() -> None:
    torch.manual_seed(0)
    base, batch, bytes_of = nets.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), zoo.sentences(), {}
    for name, method in {"s2ft": S2FT(), "lora": LoRA(r=1), "full": None}.items():
        model = copy.deepcopy(base)
        if method:
            lp.inject(model, method)
        own = [*model.parameters(), *model.buffers()]
        bytes_of[name] = kept(lambda m=model: m(**batch).loss, own)
    assert bytes_of["s2ft"] < 0.6 * bytes_of["full"] and bytes_of["s2ft"] < bytes_of["lora"] < bytes_of["full"]


def test_beside_what_trains_below_and_in_autocast() -> None:
    torch.manual_seed(0)
    base, batch = zoo.llama(), zoo.text()
    model = copy.deepcopy(base)
    lp.inject(model, [LoRA(targets=("down_proj", "v_proj")), S2FT(**ALL)], train=("model.layers.0.mlp.up_proj",))
    for p in model.parameters():
        if p.requires_grad and p.dim() == 2:
            nn.init.normal_(p, std=0.1)
    y = model(**batch)
    y.loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if p.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**batch)
        half.loss.backward()
    assert (half.logits.float() - y.logits).abs().max() < 0.1
    lp.merge(model)
    torch.testing.assert_close(model(**batch).logits, y.logits, atol=1e-5, rtol=1e-4)


# ---- selection by weights and data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefer", ["smallest", "largest"])
@pytest.mark.parametrize("selection", ["weight", "activation", "product", "gradient"])
def test_selection_takes_the_units_that_an_own_count_finds(selection: str, prefer: str) -> None:
    model, batches = zoo.llama().requires_grad_(False), [zoo.text(), {k: v[:2].flip(1) for k, v in zoo.text().items()}]
    method = S2FT(d_ratio=0.1, o_ratio=0.5, selection=selection, prefer=prefer)
    before = copy.deepcopy(model.state_dict())
    stats = method.calibrate(model, batches, lambda b: model(**b).loss) if method.calibrates else None
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    lp.inject(model, method, stats={"s2ft": stats} if stats else None)
    held = slices_of(model)
    plain = zoo.llama()
    plain.load_state_dict(before)
    seen: dict[str, list[Tensor]] = {}
    for name, layer in plain.named_modules():
        layer.register_forward_hook(lambda m, a, o, name=name: seen.setdefault(name, []).append(a[0]) if a else None)
    grads: dict[str, Any] = {}
    for batch in batches:
        plain.zero_grad()
        plain(**batch).loss.backward()
        grads = {n: grads.get(n, 0) + m.weight.grad / 2 for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
    for tail, width, k in (("self_attn.o_proj", 16, 2), ("mlp.down_proj", 1, 9)):
        scores = []
        for i in range(2):
            name = f"model.layers.{i}.{tail}"
            x = torch.cat([a.flatten(0, 1) for a in seen[name]])
            W, g = plain.get_submodule(name).weight, grads[name]
            for u in range(W.shape[1] // width):
                at = slice(u * width, (u + 1) * width)
                norms = {"weight": W[:, at].norm(), "activation": x[:, at].norm(), "gradient": g[:, at].norm()}
                norms["product"] = norms["weight"] * norms["activation"]
                scores.append((float(norms[selection].detach()), name, u))
        scores.sort(reverse=prefer == "largest")
        best = {(name, u * width) for _, name, u in scores[:k]}
        mine = {(n, c) for n, a in held.items() if n.endswith(tail) for c in a.index.tolist()[::width]}
        assert mine == best


def test_activations_of_padding_do_not_count() -> None:
    model, batch = zoo.bert().requires_grad_(False), zoo.sentences()
    method, kinds = S2FT(selection="activation"), {n: type(m) for n, m in model.named_modules()}
    found = method.scores(model, method._sides(model), [batch], lambda b: model(**b).loss)
    seen: dict[str, Tensor] = {}
    for name in found:
        model.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: seen.update({name: a[0]}))
    model(**batch)
    for name, scores in found.items():
        x = seen[name][batch["attention_mask"].bool()]
        torch.testing.assert_close(scores, x.view(len(x), len(scores), -1).square().sum((0, 2)).sqrt())
    assert kinds == {n: type(m) for n, m in model.named_modules()}


def test_gradients_are_not_asked_of_quantised_layers_and_activations_are() -> None:
    pytest.importorskip("bitsandbytes")
    model, batch = zoo.nf4_llama().requires_grad_(False), zoo.text()
    with pytest.raises(ValueError, match="selection by gradient: 'model.layers.0.self_attn.o_proj', stored quantised"):
        S2FT(selection="gradient").calibrate(model, [batch], lambda b: model(**b).loss)
    assert S2FT(selection="product").calibrate(model, [batch], lambda b: model(**b).loss)


# ---- extraction, fusing, switching, export ---------------------------------------------------------------------------


def two(base: nn.Module, folder: Path, seeds: tuple[int, int] = (0, 1)) -> list[dict[str, Change]]:
    """Two adapters of one base in folders, read back."""
    found = []
    for i, seed in enumerate(seeds):
        model = copy.deepcopy(base)
        lp.inject(model, S2FT(**ALL, seed=seed))
        randomize(model, i)
        lp.save(model, folder / str(i))
        found.append(read(base, folder / str(i)))
        held = slices_of(model)
        assert found[-1].keys() == held.keys()
        assert all(torch.equal(c.delta, held[n].delta) for n, c in found[-1].items())
    return found


@pytest.mark.parametrize(
    ("weights", "overlap"), [((), "sum"), ((0.25, 2.0), "sum"), ((), "mean"), ((1.0, 3.0), "mean")]
)
def test_fused_adapters_are_their_dense_sum(tmp_path: Path, weights: tuple[float, ...], overlap: str) -> None:
    base, batch = zoo.llama(), zoo.text()
    several = two(base, tmp_path)
    both, shared = fuse(several, weights, overlap), 0
    model = copy.deepcopy(base)
    method = put(model, both)
    want = copy.deepcopy(base)
    factor = weights or (1.0, 1.0)
    for name in {n for one in several for n in one}:
        host: Any = want.get_submodule(name)
        changes, hits = torch.zeros(hosts.shape(host)), torch.zeros(hosts.shape(host))
        for w, one in zip(factor, several, strict=True):
            if name in one:
                axis, index, delta = one[name]
                line = torch.zeros(hosts.shape(host)).index_fill(axis, index, 1.0)
                hits += line
                changes[line.bool()] += w * delta.flatten()
        shared += int((hits > 1).sum())
        host.weight.data += changes / hits.clamp(min=1) if overlap == "mean" else changes
    assert shared
    torch.testing.assert_close(model(**batch).logits, want(**batch).logits, atol=1e-5, rtol=1e-5)
    lp.save(model, tmp_path / "both")
    again = lp.load(copy.deepcopy(base), tmp_path / "both")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert method.selection == "given" and trainable(model) == {f"{n}.adapters.s2ft.delta" for n in both}


def test_adapters_are_switched_and_the_base_is_never_written(tmp_path: Path) -> None:
    base, batch = zoo.bert(), zoo.sentences()
    several, outputs = two(base, tmp_path), []
    for i in range(2):
        loaded = lp.load(copy.deepcopy(base), tmp_path / str(i))
        outputs.append(loaded(**batch).logits)
    before, y = copy.deepcopy(base.state_dict()), base(**batch).logits
    for i in (0, 1, 0):
        put(base, several[i])
        assert torch.equal(base(**batch).logits, outputs[i])
    lp.remove(base)
    assert torch.equal(base(**batch).logits, y) and not torch.equal(outputs[0], outputs[1])
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_two_on_one_model_add_and_are_taken_out_by_name() -> None:
    model, batch = zoo.llama(), zoo.text()
    base = copy.deepcopy(model)
    lp.inject(model, [S2FT(name="a", **ALL), S2FT(name="b", seed=1, **ALL)])
    randomize(model, 1, "a")
    randomize(model, 2, "b")
    y = model(**batch).logits
    put(base, fuse([extract(model, "a"), extract(model, "b")]), "both")
    torch.testing.assert_close(base(**batch).logits, y, atol=1e-5, rtol=1e-5)
    lp.merge(model)
    torch.testing.assert_close(model(**batch).logits, y, atol=1e-5, rtol=1e-5)


def test_fusing_and_switching_refuse_what_cannot_be(tmp_path: Path) -> None:
    model = zoo.llama()
    same = copy.deepcopy(model)
    one = {"layer": Change(0, torch.tensor([1]), torch.ones(1, 4))}
    other = {"layer": Change(1, torch.tensor([1]), torch.ones(4, 1))}
    for several, options, told in (
        ([], {}, "got 0"), ([one], {"weights": (1.0, 2.0)}, r"got 1, weights \[1.0, 2.0\]"),
        ([one], {"overlap": "max"}, "'max'"), ([one, other], {}, "layer: one adapter changes rows, another columns"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            fuse(several, **options)
    with pytest.raises(ValueError, match="'layer' is no layer it trains; nearest"):
        put(
            model,
            {"layer": one["layer"], "model.layers.0.mlp.down_proj": Change(1, torch.tensor([0]), torch.ones(32, 1))},
        )
    lp.inject(model, LoRA())
    with pytest.raises(ValueError, match=r"put would take off \['lora'\]"):
        put(model, one)
    with pytest.raises(ValueError, match="'lora' on .* is a LoRALinear"):
        extract(model, "lora")
    with pytest.raises(ValueError, match=r"under 'b'; here: \['lora'\]"):
        extract(model, "b")
    lp.save(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="is a LoRALinear"):
        read(same, tmp_path / "lora")
    with pytest.raises(ValueError, match="the same"):
        difference(same, copy.deepcopy(same))
    moved = copy.deepcopy(same)
    moved.get_parameter("model.norm.weight").data += 1
    with pytest.raises(ValueError, match=r"'model.norm.weight' \(1 such\) differs too"):
        difference(same, moved)


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_the_export_is_an_exact_lora_that_peft_reads(which: str, tmp_path: Path) -> None:
    make, data = BASES[which]
    base, batch = make(), data()
    model = copy.deepcopy(base)
    method = S2FT(**ALL | {"d_ratio": 0.05, "u_ratio": 0.05})
    lp.inject(model, method)
    randomize(model)
    y = model(**batch).logits
    lora = method.to_lora(model)
    assert isinstance(lora, LoRA)
    torch.testing.assert_close(model(**batch).logits, y, atol=1e-5, rtol=1e-5)
    hf.save(model, tmp_path / "peft")
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "peft"))
    torch.testing.assert_close(theirs.eval()(**batch).logits, y, atol=1e-5, rtol=1e-5)


# ---- refusals, and in a fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_ratio": 1.5}, r"s2ft: ratios are shares in \[0, 1\].*'d_ratio': 1.5"),
        ({"d_ratio": 0.0, "o_ratio": 0.0}, "at least one above 0"),
        ({"selection": "norm"}, "selection is one of .* got 'norm'"),
        ({"prefer": "best", "selection": "weight"}, "prefer is one of .* got 'best'"),
        ({"scope": "block"}, r"scope is one of \('global', 'layer'\), got 'block'"),
        ({"prefer": "largest"}, "prefer='largest' has no effect on selection='random'"),
        ({"exclude": ("lm_head",)}, "exclude 'lm_head' leaves out nothing"),
        ({"layers": "7"}, "layers '7' choose no block"),
    ],
)
def test_bad_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.inject(zoo.llama(), S2FT(**options))


def test_a_model_without_heads_or_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found no layer of kind \['o', 'down'\] in this Sequential"):
        lp.inject(nets.mlp(), S2FT())


def test_training_without_units_is_refused_and_a_wrong_shape_of_a_file_too() -> None:
    model = zoo.llama()
    lp.inject(model, S2FT(selection="activation"))
    with pytest.raises(ValueError, match="no rows or columns to train were chosen"):
        model.train()(**zoo.text())
    a = slices_of(model)["model.layers.0.mlp.down_proj"]
    with pytest.raises(
        ValueError, match=r"a slice of 2 along axis 1 of this \(32, 48\) weight is \[32, 2\].*\[2, 48\]"
    ):
        a.load_state_dict({"index": torch.tensor([1, 2]), "delta": torch.zeros(2, 48)})


def test_cutting_under_it_is_refused() -> None:
    model = zoo.llama()
    lp.inject(model, S2FT())
    mlp = next(m for m in parts.mlps(model) if m.down in slices_of(model))
    assert "adapter 's2ft'" in lp.surgery.obstacle(model, mlp)


class Manual(nets.HFNet):
    """Steps its optimizer itself: no method could look at data by its training step."""

    def __init__(self) -> None:
        super().__init__(zoo.bert)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_only_a_selection_by_data_looks_at_data(tmp_path: Path) -> None:
    peft = PEFT(S2FT(d_ratio=0.1), model="net", folder=None)
    module = Manual()
    nets.trainer(tmp_path, peft, max_steps=2).fit(module, nets.tokens())
    assert any(a.delta.any() for a in slices_of(module.net).values())
    peft = PEFT(S2FT(selection="activation"), model="net", folder=None)
    with pytest.raises(ValueError, match="look at data before the fit"):
        nets.trainer(tmp_path, peft, max_steps=2).fit(Manual(), nets.tokens())


def test_a_fit_chooses_by_its_batches_and_a_resume_keeps_the_choice(tmp_path: Path) -> None:
    method = S2FT(selection="activation", d_ratio=0.1, o_ratio=0.3)

    def fit(**options: Any) -> nets.HFNet:
        module = nets.HFNet(zoo.bert)
        peft = PEFT(method, model="net", train=("net.classifier",), folder=None, calibration_batches=2)
        every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        nets.trainer(tmp_path, peft, every, max_steps=4).fit(module, nets.tokens(shuffle=False), **options)
        return module

    module, base = fit(), nets.HFNet(zoo.bert)
    base.net.requires_grad_(False)
    want = method.calibrate(base.net, list(nets.tokens(shuffle=False))[:2], lambda b: base.net(**b).loss)
    assert {n: a.index.tolist() for n, a in slices_of(module.net).items()} == {n: i.tolist() for n, i in want.items()}
    state = fit(ckpt_path=tmp_path / "step=2.ckpt").state_dict()
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
