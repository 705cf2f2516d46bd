"""RandLoRA: its card (methods/hf_peft_methods.md) by numbers, dense float64 references, peft as an oracle."""

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning_peft_plugins.reparameterized.rand_lora import RandLoRA, Scaled
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import hf, hosts
from tests import in_peft, test_hf
from tests.nets import llama
from tests.test_lora import F64, HOSTS, One, adapter_of, close, inputs, same_as_dense
from tests.test_vera import Two, fill

MORE = {"Linear, square": lambda: nn.Linear(8, 8)}
KINDS = ["Linear", "Linear, no bias", "Conv1D", *MORE]  # 6 -> 10, 10 -> 6, 6 -> 10, 8 -> 8
RANKS = [1, 4, 12]  # six to eight products, two, of which the last goes beyond the rank, and one


def layer_of(kind: str) -> Any:
    return (HOSTS | MORE)[kind]()


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, filled: bool = True, **options: Any) -> Any:
    """``layer`` with RandLoRA of rank 4, scaled by 2; diagonals away from their start if ``filled``."""
    model = One(layer)
    method = RandLoRA(**{"r": 4, "alpha": 2.0 * options.get("r", 4), "targets": ("layer",)} | options)
    lp.inject(model, method, dtype=dtype)
    if filled:
        fill(model)
    return model


def change(a: Any, like: Tensor, deal: bool = True) -> Tensor:
    """The card's definition by products; ``deal`` gives basis j the columns j, n + j, ... of B, else r in a row."""
    (r, n), sides = a.lam.shape, sorted(like.shape)
    A = a.shared.drawn["A"].to(like)[:, : sides[0]]
    B = a.shared.drawn["B"].to(like)[: n * r, : sides[1]].T
    S = torch.zeros(sides[1], sides[0], dtype=like.dtype)
    for j in range(n):
        B_j = torch.stack([B[:, k * n + j] if deal else B[:, j * r + k] for k in range(r)], 1)
        S = S + B_j @ torch.diag(a.lam[:, j]) @ A @ torch.diag(a.gamma[j])
    return 2.0 * (S if like.shape[1] <= like.shape[0] else S.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_base_bit_for_bit_and_lam_moves_first(kind: str, dtype: torch.dtype) -> None:
    layer = layer_of(kind).to(dtype)
    x = inputs(layer, dtype)
    want = layer(x)
    model = one(layer, filled=False)
    assert torch.equal(model(x), want)
    a = adapter_of(model)
    assert a.gamma.unique().tolist() == [pytest.approx(1 / max(a.gamma.shape))]
    model(x).float().pow(2).sum().backward()
    assert a.gamma.grad.abs().max() == 0 and a.lam.grad.abs().min() > 0
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None} == {"lam", "gamma"}


def test_by_hand() -> None:
    layer = nn.Linear(2, 3)
    model = one(layer, r=1)
    a = adapter_of(model)
    with torch.no_grad():
        a.shared.drawn["A"].copy_(torch.tensor([[1.0, 2.0]]))
        a.shared.drawn["B"].copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
        a.lam.copy_(torch.tensor([[0.5, -1.0]]))
        a.gamma.copy_(torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
    want = torch.tensor([[1.0, 2.0], [-4.0, 0.0], [-3.0, 2.0]])  # twice [[.5, 1], [-2, 0], [.5 - 2, 1]]
    close(a.weight(torch.zeros(3, 2)), want, atol=1e-6)
    x = torch.tensor([[1.0, 10.0]])
    close(model(x) - layer.unadapted(x), x @ want.T, atol=1e-5)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_weight_and_merge_are_the_dense_map(kind: str, r: int) -> None:
    layer = layer_of(kind).double()
    x, reference = inputs(layer), copy.deepcopy(layer)
    model = one(layer, F64, r=r)
    a = adapter_of(model)
    with torch.no_grad():
        W = hosts.read(reference)
        hosts.write(reference, W + change(a, W))
    same_as_dense(model, layer, a, reference, x)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_map(kind: str, r: int) -> None:
    layer = layer_of(kind).double()
    x = inputs(layer).requires_grad_(True)
    model = one(layer, F64, r=r)
    a = adapter_of(model)
    W = hosts.read(layer)
    fast = torch.autograd.grad(model(x).sin().sum(), (a.lam, a.gamma, x))
    slow = torch.autograd.grad(F.linear(x, W + change(a, W), layer.bias).sin().sum(), (a.lam, a.gamma, x))
    for f, s in zip(fast, slow, strict=True):
        assert s.abs().max() > 0.01
        torch.testing.assert_close(f, s, atol=1e-9, rtol=1e-9)


def test_the_product_of_its_own_against_finite_differences() -> None:
    A = torch.randn(3, 4, dtype=F64)
    lam, gamma = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((3, 2), (2, 4)))
    assert torch.autograd.gradcheck(Scaled.apply, (A, lam, gamma))
    assert torch.autograd.gradgradcheck(Scaled.apply, (A, lam, gamma))


def test_backward_keeps_one_tensor_of_the_weight_s_size() -> None:
    layer = nn.Linear(40, 50)
    model, kept = one(layer, r=5), set()
    shared = {t.untyped_storage().data_ptr() for t in (*adapter_of(model).shared.drawn.values(), layer.weight)}

    def keep(t: Tensor) -> Tensor:
        if t.numel() >= 40 * 40 and t.untyped_storage().data_ptr() not in shared:
            kept.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(torch.randn(2, 40, requires_grad=True))
    assert len(kept) == 1 and y.requires_grad


def test_dropout_is_on_the_update_alone() -> None:
    layer = nn.Linear(6, 10)
    model = one(layer, dropout=0.5).train()
    a, x = adapter_of(model), torch.randn(3, 6)
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    want = layer.unadapted(x) + F.linear(F.dropout(x, 0.5), change(a, layer.weight))
    close(got, want, atol=1e-4)
    close(model.eval()(x), layer.unadapted(x) + F.linear(x, change(a, layer.weight)), atol=1e-4)


@pytest.mark.parametrize(("shape", "r", "count"), [((24, 16), 4, 80), ((16, 24), 4, 80), ((24, 16), 5, 84)])
def test_counts_and_the_rank_of_the_sum(shape: tuple[int, int], r: int, count: int) -> None:
    model = one(nn.Linear(*shape), r=r)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    a = adapter_of(model)
    assert int(torch.linalg.matrix_rank(a.weight(torch.zeros(shape[::-1])))) == 16
    assert {k for k in a.state_dict()} == {"lam", "gamma", "checksum"} and len(list(a.parameters())) == 2


# ---- the shared matrices -------------------------------------------------------------------------------------------


def two(**options: Any) -> Any:
    model = Two()  # 64 -> 128 and 128 -> 32
    lp.inject(model, RandLoRA(**{"r": 10, "alpha": 20.0, "targets": ("up", "down")} | options))
    return model


@pytest.mark.parametrize("basis", ["uniform", "sparse", "very_sparse"])
def test_one_pair_for_layers_of_unlike_sizes(basis: str) -> None:
    model = two(basis=basis)
    fill(model)
    up, down = model.up.adapters["rand_lora"], model.down.adapters["rand_lora"]
    assert up.shared is down.shared
    A, B = up.shared.drawn["A"], up.shared.drawn["B"]
    assert A.shape == (10, 128) and B.shape == (130, 128)  # largest in and out are 128: 13 products
    assert up.lam.shape == (10, 7) and up.gamma.shape == (7, 64) and down.gamma.shape == (4, 32)
    for a, large in ((up, 128), (down, 128)):
        columns = a.factors(a.lam)[a is up]  # of the shared B, on the larger side; the first factor where in > out
        assert columns.untyped_storage().data_ptr() == B.untyped_storage().data_ptr() and large in columns.shape
    for t in (A, B):
        assert float(t.std()) == pytest.approx(1.0, abs=5e-3)
        share = {"uniform": 1.0, "sparse": 1 / 3, "very_sparse": 128**-0.5}[basis]
        assert float((t != 0).float().mean()) == pytest.approx(share, abs=0.04)
        assert basis == "uniform" or len(t.unique()) == 3
    x = torch.randn(3, 64)
    want = model(x)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    first, second = (m.adapters["rand_lora"].shared for m in (twin.up, twin.down))
    assert first is second and torch.equal(twin(x), want)
    half = twin.to(torch.bfloat16)(x.bfloat16())
    assert twin.up.adapters["rand_lora"].lam.dtype == torch.float32
    assert float((half.float() - want).norm() / want.norm()) < 0.05
    lp.merge(model)
    torch.testing.assert_close(model(x), want, atol=1e-3, rtol=1e-4)


def test_the_draw_hangs_on_the_seed_alone() -> None:
    method = RandLoRA(r=10)
    hosts_ = [nn.Linear(64, 128, device="meta"), nn.Linear(128, 32, device="meta")]
    state = torch.get_rng_state()
    first = method.draw(hosts_)
    with torch.device("meta"):
        again = method.draw(reversed(hosts_))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.checksum == again.checksum and torch.equal(first.drawn["B"], again.drawn["B"])
    for other in (RandLoRA(r=10, seed=1), RandLoRA(r=10, basis="sparse"), RandLoRA(r=9)):
        assert other.draw(hosts_).checksum != first.checksum
    assert method.draw(hosts_[:1]).checksum != first.checksum


def test_files_from_another_draw_are_refused(tmp_path: Path) -> None:
    model = two(seed=5, targets=("up",))
    fill(model)
    base = copy.deepcopy(model)
    lp.remove(base)
    lp.save(model, tmp_path / "a")
    saved = load_file(tmp_path / "a" / "adapter.safetensors")
    assert sum(t.numel() for t in saved.values()) == 7 * (10 + 64) + 1
    x = torch.randn(3, 64)
    assert torch.equal(lp.load(copy.deepcopy(base), tmp_path / "a")(x), model(x))
    for wrong in ({"seed": 6}, {"basis": "sparse"}, {"targets": ("up", "down")}):
        method = RandLoRA(**{"r": 10, "alpha": 20.0, "seed": 5, "targets": ("up",)} | wrong)
        with pytest.raises(ValueError, match="vectors of RandLoRA were trained beside other random matrices"):
            lp.load(base, tmp_path / "a", methods=[method])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = One(nn.Linear(64, 64))
    lp.quantize(model, kind, **({"compute_dtype": torch.float32} if kind == "nf4" else {}))
    x = torch.randn(3, 64)
    want = model(x)
    lp.inject(model, RandLoRA(r=8, alpha=16.0, targets=("layer",)))
    assert torch.equal(model(x), want)
    a = adapter_of(model)
    nn.init.normal_(a.lam)
    torch.testing.assert_close(model(x), want + x @ change(a, torch.empty(64, 64)).T, atol=1e-3, rtol=1e-3)


def test_options() -> None:
    with pytest.raises(ValueError, match="RandLoRA needs a rank of at least 1, got r=0"):
        RandLoRA(r=0)
    with pytest.raises(ValueError, match="RandLoRA's alpha must be positive, got 0.0"):
        RandLoRA(alpha=0.0)
    with pytest.raises(ValueError, match="basis must be one of .*'very_sparse'.*, got 'dense'"):
        RandLoRA(basis="dense")
    with pytest.raises(ValueError, match="RandLoRA's dropout must lie in"):
        RandLoRA(dropout=-0.1)
    with pytest.raises(ValueError, match="no linear or conv1d matches 'q_pro'; nearest: 'q_proj'"):
        lp.inject(llama(), RandLoRA(targets=("q_pro",)))
    with pytest.raises(ValueError, match=r"\(1, 1\) random matrix has equal entries alone"):
        one(nn.Linear(1, 5), r=1, basis="very_sparse")


# ---- against peft --------------------------------------------------------------------------------------------------

IN_PEFT: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "bert": (test_hf.still_bert, {"r": 5, "alpha": 1.0}, {"target_modules": ["query", "dense"]}),
    "llama": (llama, {"r": 40, "alpha": 3.0, "seed": 9}, {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "gpt2": (test_hf.gpt2, {"r": 8, "alpha": 1.0}, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


def config(case: str, basis: str = "uniform", **options: Any) -> tuple[nn.Module, RandLoRA, peft.RandLoraConfig]:
    """(base, our method, peft's config) of one case."""
    make, own, places = IN_PEFT[case]
    theirs = {"r": own["r"], "randlora_alpha": own["alpha"], "projection_prng_key": own.get("seed", 0)}
    theirs |= {basis: True} if basis != "uniform" else {}
    method = RandLoRA(targets=tuple(places["target_modules"]), basis=basis, **own)
    return make(), method, peft.RandLoraConfig(**theirs, **places, **options)


@pytest.mark.parametrize("basis", ["uniform", "sparse", "very_sparse"])
@pytest.mark.parametrize("case", IN_PEFT)
def test_peft_starts_alike(case: str, basis: str) -> None:
    base, method, theirs = config(case, basis)
    ours = copy.deepcopy(base)
    lp.inject(ours, method)
    model: Any = peft.get_peft_model(copy.deepcopy(base), theirs)  # type: ignore[arg-type]
    tensors = {k.replace(".default", ""): t for k, t in model.state_dict().items() if "randlora_" in k}
    mine = method.to_hf(ours)[1]
    for key, t in mine.items():
        torch.testing.assert_close(t, tensors[key].float(), atol=1e-6, rtol=0)
    assert {k for k in tensors if "lambda" in k} == {k for k in mine if "lambda" in k}


@pytest.mark.parametrize(("case", "basis"), [*((c, "uniform") for c in IN_PEFT), ("bert", "sparse"),
                                             ("gpt2", "very_sparse")])  # fmt: skip
def test_peft_computes_the_same_both_ways(case: str, basis: str, tmp_path: Path) -> None:
    base, method, theirs = config(case, basis)
    x = test_hf.batch(base)
    in_peft.ours_to_peft_and_back(base, method, x, tmp_path / "one")
    back = in_peft.peft_to_ours_and_back(base, theirs, x, tmp_path / "two")
    assert isinstance(back, RandLoRA) and back.save_projection
    assert (back.r, back.alpha, back.seed, back.basis) == (method.r, method.alpha, method.seed, basis)
    mine, other = (load_file(tmp_path / "two" / f / test_hf.TENSORS) for f in ("ours", "theirs"))
    assert [k for k in mine if k.endswith("randlora_A")] == ["base_model.randlora_A"]
    assert sum(k.endswith("randlora_A") for k in other) > 2  # peft repeats what the layers share under each of them


def test_peft_deals_the_columns_of_B_to_the_bases() -> None:
    """A literal reading, basis j = the j-th block of B, is another function of the same file."""
    layer = nn.Linear(12, 16)
    theirs: Any = peft.get_peft_model(One(layer), peft.RandLoraConfig(r=4, randlora_alpha=8, target_modules=["layer"]))  # type: ignore[arg-type]
    test_hf.randomize(theirs)
    wrapped = theirs.base_model.model.layer
    model = one(nn.Linear(12, 16), filled=False)
    a = adapter_of(model)
    a.lam.data, a.gamma.data = wrapped.randlora_lambda["default"].data, wrapped.randlora_gamma["default"].data
    delta = wrapped.get_delta_weight("default")
    close(change(a, layer.weight), delta, atol=1e-4)
    assert (change(a, layer.weight, deal=False) - delta).abs().max() > 0.1


def test_a_peft_folder_without_matrices_is_read_aloud(tmp_path: Path) -> None:
    base, _, theirs = config("bert", save_projection=False)
    with pytest.warns(UserWarning, match="save_projection=False.*its seed 0 are taken.*nothing proves"):
        back: Any = in_peft.peft_to_ours_and_back(base, theirs, test_hf.batch(base), tmp_path)
    assert not back.save_projection
    for folder in ("theirs", "ours"):
        assert not any("randlora_A" in k for k in load_file(tmp_path / folder / test_hf.TENSORS))


def test_a_peft_folder_with_other_matrices_is_refused(tmp_path: Path) -> None:
    base, method, _ = config("bert")
    ours = copy.deepcopy(base)
    lp.inject(ours, method)
    hf.save(ours, tmp_path / "a")
    file = tmp_path / "a" / test_hf.TENSORS
    tensors = load_file(file)
    save_file(tensors | {"base_model.randlora_B": tensors["base_model.randlora_B"].roll(1, 0)}, file)
    with pytest.raises(ValueError, match=r"randlora_B is another one, \(48, 10, 5\); from its seed 0 follows one of"):
        hf.load(base, tmp_path / "a")
    assert math.isclose(float(tensors["base_model.randlora_B"].std()), 1.0, abs_tol=5e-3)
