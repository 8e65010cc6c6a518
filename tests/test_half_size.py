"""The first steps at half the height and width: mathematics on pictures with a known answer, and the doors of diffusers."""

import itertools
import math
from weakref import ref

import diffusers
import pytest
import torch
from einops import rearrange

import tqai_core as tqai
from tqai_core.half_size import HalfSize, enlarge, hidden, reduce, restriction
from tqai_core.hosts.diffusers import minis
from tqai_core.hosts.diffusers.half_size import layout_of, time_of

SIZE, SIGNAL = 32, 0.15


def nmse(x, y):
    return float((x - y).square().sum() / y.square().sum())


def dct(n):
    i = torch.arange(n).float()
    basis = torch.cos(math.pi / n * (i + 0.5) * i[:, None]) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def power(h, w):
    """Of the coefficients of a Gaussian picture of full size, by frequency: 1 / f^2, as photographs have it."""
    f = ((torch.arange(h) / SIZE)[:, None] ** 2 + (torch.arange(w) / SIZE) ** 2).sqrt()
    return SIGNAL / f.clamp(min=0.02) ** 2


def best_denoiser(x, sigma):
    """The mean of all Gaussian pictures that fit ``x``; of a picture of half size, whose amplitudes are halved."""
    h, w = x.shape[-2:]
    p = power(h, w) * (h / SIZE) ** 2
    gain = (1 - sigma) * p / ((1 - sigma) ** 2 * p + sigma**2)
    return dct(h).T @ (gain * (dct(h) @ x @ dct(w).T)) @ dct(w)


def euler(steps, tolerance, shift=1.0):
    """Samples ``[16, 3, 32, 32]`` and the number of steps at half size, with the best denoiser."""
    base = torch.linspace(1, 0, steps + 1)
    sigmas = (shift * base / (1 + (shift - 1) * base)).tolist()
    x, state, halves = torch.randn(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), HalfSize(tolerance), 0
    for sigma, after in itertools.pairwise(sigmas):
        state.enter(sigma)
        if state.on:
            small, seen_at = reduce(x, sigma)
            v, halves = state.velocity(x, sigma, best_denoiser(small, seen_at), seen_at), halves + 1
        else:
            v = (x - best_denoiser(x, sigma)) / sigma
        x = x + (after - sigma) * v
    return x, halves


def test_a_reduced_latent_is_one_of_its_own_sigma():
    rows = restriction(SIZE, torch.device("cpu"))
    assert torch.allclose(rows @ rows.T, torch.eye(SIZE // 2), atol=1e-5)
    g = torch.Generator().manual_seed(1)
    clean, noise, sigma = torch.randn(2, 3, 16, 16, generator=g), torch.randn(2, 3, SIZE, SIZE, generator=g), 0.7
    large = 2 * rows.T @ clean @ rows  # the picture without finer detail
    small, seen_at = reduce((1 - sigma) * large + sigma * noise, sigma)
    left = (small - (1 - seen_at) * clean) / seen_at
    assert seen_at == pytest.approx(sigma / (2 - sigma))
    assert torch.allclose(left, rows @ noise @ rows.T, atol=1e-5), "its noise is the lower half of the noise, of variance 1"
    assert torch.allclose(enlarge((1 - sigma) * large + sigma * noise, sigma, clean), noise - large, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 8, 12), (3, 4, 2, 6, 8), (2, 16, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype).transpose(-1, -2)  # non-contiguous
    small, sigma = reduce(x, 0.8)
    assert small.dtype == dtype
    assert small.shape == (*x.shape[:-2], x.shape[-2] // 2, x.shape[-1] // 2)
    exact, _ = reduce(x.float(), 0.8)
    assert nmse(small.float(), exact) < 1e-4
    assert 0.6 < sigma < 0.7


@pytest.mark.parametrize(
    ("steps", "shift", "halves", "error"), [(8, 1.0, 4, 1e-4), (8, 3.0, 5, 1e-4), (24, 1.0, 9, 1e-4), (24, 3.0, 14, 1e-4)]
)
def test_closer_than_fewer_steps_of_the_same_cost(steps, shift, halves, error):
    """A step at half size counts a quarter of a full one."""
    exact, _ = euler(steps, 0.0, shift)
    x, found = euler(steps, 0.1, shift)
    assert found >= halves
    assert nmse(x, exact) < error
    fewer, _ = euler(math.ceil(steps - 0.75 * found), 0.0, shift)
    assert nmse(x, exact) < 0.01 * nmse(fewer, exact)


def test_a_larger_tolerance_has_more_steps_of_half_size_and_more_error():
    runs = [euler(24, tolerance) for tolerance in (0.0, 0.01, 0.1, 0.3)]
    counts, errors = [halves for _, halves in runs], [nmse(x, runs[0][0]) for x, _ in runs]
    assert counts == sorted(set(counts))
    assert errors == sorted(errors)
    assert counts[0] == 0


@pytest.mark.parametrize("sigma", [0.4, 0.55, 0.7])
def test_the_hidden_share_is_estimated_from_what_half_size_shows(sigma):
    """Against the share of signal that a Gaussian picture of full size truly has in its finer frequencies."""
    p = power(SIZE, SIZE)
    finer = torch.ones(SIZE, SIZE, dtype=torch.bool)
    finer[: SIZE // 2, : SIZE // 2] = False
    truth = float((p * (1 - sigma) ** 2 / (p * (1 - sigma) ** 2 + sigma**2))[finer].mean())
    _, seen_at = reduce(torch.zeros(1, SIZE, SIZE), sigma)
    half, state = SIZE // 2, HalfSize(0.5)
    scaled = power(half, half) / 4
    wiener = (1 - seen_at) ** 2 * scaled / ((1 - seen_at) ** 2 * scaled + seen_at**2)
    clean = dct(half).T @ (torch.randn(256, half, half, generator=torch.Generator().manual_seed(3)) * (scaled * wiener).sqrt()) @ dct(half)
    state.enter(1.0)
    state.velocity(torch.zeros(len(clean), 2 * half, 2 * half), sigma, clean, seen_at)
    state.enter(sigma)
    assert 0.75 * truth < state.share < 1.33 * truth
    assert hidden([0.0] * 8, (half, half), seen_at, sigma) == 0.0


SIDE = 16  # of the minis' latents


def latents(kind, side):
    shape = (2, 1, 9, side, side) if kind == "wan" else (2, 1, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def packed(kind, x):
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2) if kind == "flux" else x


def unpacked(kind, x, side):
    return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=side // 2, p=2, q=2) if kind == "flux" else x


class Aligned(diffusers.FlowMatchEulerDiscreteScheduler):
    """Each sigma as a latent of half size sees it."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self.sigmas = self.sigmas / (2 - self.sigmas)
        self.timesteps = self.sigmas[:-1] * 1000


def run(kind, config=None, steps=6, pipe=None, trusted=True, **more):
    pipe = pipe or minis.pipeline(kind)
    handle = tqai.apply(pipe, config) if config is not None else None
    if handle is not None and trusted:
        handle.flows[0].half_size.trusted = True  # the minis were trained at one size, and would be refused
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    options = {**minis.inputs(kind, [3, 7]), "num_inference_steps": steps, "output_type": "latent", "return_dict": False, **more}
    x = pipe(**options, generator=generators)[0]
    return x, handle.report() if handle else None, pipe, handle


ALONE = tqai.Config(strategy=None, monitor=None, half_size=0.9)


@pytest.mark.filterwarnings("ignore:tqai")
@pytest.mark.parametrize("kind", ["flux", "sd3", "wan", "z_image"])
def test_a_run_at_half_size_is_a_run_of_half_the_size(kind, monkeypatch):
    """Two steps to a picture: its lower frequencies are what the pipeline itself makes of the lower frequencies of the noise, at half
    the height and width, with sigmas s / (2 - s)."""
    monkeypatch.setattr("tqai_core.half_size.hidden", lambda *seen: 0.0)  # all steps
    noise = latents(kind, SIDE)
    small, _ = reduce(noise, 1.0)
    x, report, pipe, handle = run(kind, ALONE, steps=2, latents=packed(kind, noise))
    assert report.calls_half == report.calls > 0
    handle.remove()
    pipe.scheduler = Aligned(shift=1.0)
    half = 64  # a half of what the minis' pipelines are asked for
    y, _, _, _ = run(kind, None, steps=2, pipe=pipe, height=half, width=half, latents=packed(kind, small))
    rows = restriction(SIDE, torch.device("cpu"))
    made = rows @ unpacked(kind, x, SIDE) @ rows.T / 2
    assert nmse(made, unpacked(kind, y, SIDE // 2)) < 1e-9


@pytest.mark.filterwarnings("ignore:tqai")
@pytest.mark.parametrize("kind", ["flux", "sd3", "wan", "z_image"])
def test_off_is_bit_exact_and_a_second_run_equal(kind):
    plain, _, _, _ = run(kind)
    off, report, _, _ = run(kind, tqai.Config(strategy=None, monitor=None))
    assert torch.equal(off, plain)
    assert report.calls_half == 0
    first, report, pipe, handle = run(kind, ALONE)
    again = pipe(**minis.inputs(kind, [3, 7]), num_inference_steps=6, output_type="latent", return_dict=False,
                 generator=[torch.Generator().manual_seed(i) for i in (0, 1)])[0]  # fmt: skip
    assert torch.equal(first, again)
    assert 0 < handle.report().calls_half == report.calls_half


@pytest.mark.filterwarnings("ignore:tqai")
@pytest.mark.parametrize("kind", ["flux", "sd3", "wan", "z_image"])
def test_a_model_that_was_trained_at_one_size_stays_exact(kind):
    """And says so: one step of the first run is computed at both sizes and compared."""
    plain, _, _, _ = run(kind, steps=8)
    x, report, _, handle = run(kind, tqai.Config(strategy=None, monitor=None, half_size=0.1), steps=8, trusted=False)
    assert torch.equal(x, plain)
    assert report.calls_half == 0
    assert any("not trained for it" in entry["why"] for entry in report.fallbacks)
    assert handle.flows[0].half_size.trusted is False


@pytest.mark.parametrize("labels", [[0, 7], [3, 10], [5, 12], [1, 8]])
def test_a_model_that_was_trained_at_both_sizes_is_taken_whatever_is_asked_first(labels):
    """Photographs of little contrast too: there the two sizes agree on the colour and little else."""
    pipe = minis.pipeline("photo")
    with tqai.apply(pipe, ALONE) as handle:
        pipe(**minis.inputs("photo", labels), num_inference_steps=8, output_type="latent")
        assert handle.flows[0].half_size.trusted
        assert handle.report().calls_half > 0


class Call(torch.nn.Module):
    """A transformer that takes what it is given."""

    def __init__(self, patch=2):
        super().__init__()
        self.config = type("Config", (), {"patch_size": patch})()


def test_a_model_that_knows_both_sizes_is_judged_once():
    g = torch.Generator().manual_seed(7)
    clean, state, models = torch.randn(2, 3, 16, 16, generator=g), HalfSize(0.1), (Call(), Call())
    state.model = ref(models[0])
    small, _ = reduce(clean, 0.0)
    state.enter(1.0)
    assert not state.small(1.0)
    assert state.small(0.9)
    assert state.judges(0.9)
    assert state.judge(clean, small + 0.3 * torch.randn(small.shape, generator=g) * small.std(), 0.9) is None
    assert not state.small(0.9), "the other branch of the step that judged has full size too"
    assert state.small(1.0)
    assert not state.judges(0.9)
    state = HalfSize(0.1)
    state.model = ref(models[1])
    state.enter(1.0)
    assert "another picture" in state.judge(clean, torch.randn(small.shape, generator=g) * small.std(), 0.9)
    state.begin()
    state.enter(1.0)
    assert not state.small(0.9), "what was judged holds for the next run"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"hidden_states": torch.zeros(1, 4, 16, 16), "controlnet_block_samples": [1]}, "controlnet_block_samples"),
        ({"hidden_states": torch.zeros(1, 4, 18, 16)}, "18 x 16"),
        ({"hidden_states": torch.zeros(1, 64, 16), "img_ids": torch.zeros(65, 3)}, "one picture alone"),
        ({"hidden_states": torch.zeros(1, 64, 16), "img_shapes": [[(1, 8, 4), (1, 8, 4)]]}, "one picture alone"),
        ({"hidden_states": torch.zeros(4)}, "unknown form"),
        ({"x": [torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 16, 8)]}, "unknown form"),
    ],
)
def test_what_cannot_be_made_smaller_has_full_size(given, why):
    assert why in layout_of(Call(), {"timestep": torch.ones(1), "encoder_hidden_states": torch.zeros(1), **given})


@pytest.mark.parametrize(
    ("value", "sigma", "found"),
    [(0.7, 0.7, (1.0, False)), (700.0, 0.7, (1000.0, False)), (0.3, 0.7, (1.0, True)), (300.0, 0.7, (1000.0, True)), (0.45, 0.7, None)],
)
def test_what_a_time_argument_means_is_found_by_its_value(value, sigma, found):
    time = time_of({"timestep": torch.tensor([value, value])}, sigma)
    assert found == (None if time is None else (time.scale, time.upwards))
    assert time_of({"timestep": torch.tensor([value, 0.0])}, sigma) is None, "a time of its own for each part"


def test_the_option_in_a_config():
    config = tqai.Config(half_size=0.2)
    assert tqai.Config.from_json(config.to_json()) == config
    assert "half_size" not in tqai.Config().to_json(), "versions before do not know it"
    assert tqai.preset("half", "flux").half_size > 0
    for wrong in ({"half_size": 1.0}, {"half_size": -0.1}, {"half_size": True}, {"half_size": 0.1, "level": "block"}):
        with pytest.raises(tqai.TqaiError, match="half_size"):
            tqai.Config(**wrong)
