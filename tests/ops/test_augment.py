"""The augment operator: operations against PIL, boxes, layouts, dtypes, threads, and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scan_fast.ops import native
from scan_fast.ops.augment import RECIPE_HEADER, RECIPE_STEP, Operation, augment

# A machine that tests only the kernels may lack these.
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
ImageEnhance = pytest.importorskip("PIL.ImageEnhance")
ImageOps = pytest.importorskip("PIL.ImageOps")
tv = pytest.importorskip("torchvision.transforms.functional")

pytestmark = pytest.mark.skipif(not native.has_kernel("augment", "cpu"), reason="the compiled module is not built")

DEVICES = [
    pytest.param(
        device,
        marks=pytest.mark.skipif(
            device == "cuda" and not (torch.cuda.is_available() and native.has_kernel("augment", "cuda")),
            reason="no CUDA device or kernel",
        ),
    )
    for device in ("cpu", "cuda")
]
SCALE, SHIFT = (0.01, 0.02, 0.03), (-0.5, 0.25, -1.5)


def images_of(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return noise, a narrow range, two values, greys, a constant and a smooth ramp."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, height, width, 3), generator=g)
    images[1::6] = 90 + images[1::6] // 9
    images[2::6] = images[2::6] // 128 * 255
    images[3::6] = images[3::6, ..., :1]
    images[4::6] = images[4::6, :1, :1]
    ramp = torch.arange(height * width).view(1, height, width, 1) * 255 // (height * width)
    images[5::6] = (ramp + images[5::6] // 40).clamp(max=255)
    return images.to(torch.uint8)


def bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def recipe(box: tuple[int, int, int, int], *steps: tuple[int, ...], flip: bool = False) -> list[int]:
    """Return a recipe without cutout. A step is an operation and the bits of its first argument, or all six words."""
    padded = [[*step, *[0] * (RECIPE_STEP - len(step))] for step in steps]
    return [*box, int(flip), 0, 0, 0, 0, *(word for step in padded for word in step)]


def render(images: torch.Tensor, recipes: list[list[int]], size: int, **options: torch.Tensor) -> torch.Tensor:
    return augment(images, torch.tensor(recipes, dtype=torch.int32), size, SCALE, SHIFT, torch.uint8, **options).cpu()


def pil_results(images: torch.Tensor, operation: object, values: list[float]) -> torch.Tensor:
    pairs = zip(images, values, strict=True)
    return torch.from_numpy(np.stack([np.array(operation(Image.fromarray(i.numpy()), v)) for i, v in pairs]))  # type: ignore[operator]


AMOUNTS = {"shift": (-0.5, 0.5), "threshold": (0.0, 256.0), "factor": (0.05, 1.95), "bits": (0.0, 8.0)}
AGAINST_PIL = {
    Operation.BRIGHTNESS: ("factor", lambda im, f: ImageEnhance.Brightness(im).enhance(f)),
    Operation.CONTRAST: ("factor", lambda im, f: ImageEnhance.Contrast(im).enhance(f)),
    Operation.SATURATION: ("factor", lambda im, f: ImageEnhance.Color(im).enhance(f)),
    Operation.SHARPNESS: ("factor", lambda im, f: ImageEnhance.Sharpness(im).enhance(f)),
    Operation.HUE: ("shift", lambda im, f: tv.adjust_hue(im, f)),
    Operation.GRAYSCALE: ("factor", lambda im, f: tv.to_grayscale(im, num_output_channels=3)),
    Operation.AUTOCONTRAST: ("factor", lambda im, f: ImageOps.autocontrast(im)),
    Operation.EQUALIZE: ("factor", lambda im, f: ImageOps.equalize(im)),
    Operation.SOLARIZE: ("threshold", lambda im, f: ImageOps.solarize(im, f)),
    Operation.POSTERIZE: ("bits", lambda im, f: ImageOps.posterize(im, int(f))),
    Operation.IDENTITY: ("factor", lambda im, f: im),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [32, 17, 8, 2, 1])
@pytest.mark.parametrize("operation", AGAINST_PIL, ids=lambda o: o.name.lower())
def test_operation_equals_pil(operation: Operation, side: int, device: str) -> None:
    n = 60
    kind, pil = AGAINST_PIL[operation]
    low, high = AMOUNTS[kind]
    values = np.linspace(low, high, n).astype(np.float32)
    if kind == "bits":
        values = np.floor(values)
        values[values == 0] = 8  # PIL's posterize keeps at least one bit
    images = images_of(n, side, side)
    recipes = [recipe((0, 0, side, side), (operation, bits(v))) for v in values]
    assert torch.equal(render(images.to(device), recipes, side), pil_results(images, pil, values.tolist()))


@pytest.mark.parametrize("device", DEVICES)
def test_hue_of_every_kind_of_colour_equals_torchvision(device: str) -> None:
    # Every triple of a lattice that holds the multiples of 5 and 17, at which PIL truncates exact integers.
    steps = torch.tensor(sorted({*range(0, 256, 17), *range(0, 256, 15), 1, 2, 127, 128, 254}))
    cube = torch.cartesian_prod(steps, steps, steps).to(torch.uint8)
    side = int(np.ceil(np.sqrt(len(cube))))
    image = torch.zeros((1, side * side, 3), dtype=torch.uint8)
    image[0, : len(cube)] = cube
    image = image.view(1, side, side, 3)
    for shift in (-0.5, -0.0312, 0.1, 0.37):
        got = render(image.to(device), [recipe((0, 0, side, side), (Operation.HUE, bits(shift)))], side)
        assert torch.equal(got, pil_results(image, tv.adjust_hue, [shift]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("source", "side"), [((32, 32), 32), ((96, 80), 64), ((40, 57), 24), ((8, 8), 31), ((200, 150), 9), ((5, 300), 3)]
)
def test_crop_and_resize_equal_pil(source: tuple[int, int], side: int, device: str) -> None:
    height, width = source
    g = torch.Generator().manual_seed(1)
    images = images_of(40, height, width)
    recipes, expected = [], []
    for i in range(40):
        h, w = (int(torch.randint(1, m + 1, (1,), generator=g)) for m in source)
        if i % 8 == 0:
            h, w = min(side, height), min(side, width)
        top, left = (int(torch.randint(0, m - e + 1, (1,), generator=g)) for m, e in ((height, h), (width, w)))
        recipes.append(recipe((top, left, h, w), flip=i % 2 == 0))
        # Horizontally first: two calls, because some Pillow versions shrink tall crops vertically first.
        image = tv.crop(Image.fromarray(images[i].numpy()), top, left, h, w)
        for size in ((side, h), (side, side)):
            image = image.resize(size, Image.Resampling.BILINEAR)
        expected.append(np.array(tv.hflip(image) if i % 2 == 0 else image))
    assert torch.equal(render(images.to(device), recipes, side), torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [32, 19, 8, 1])
def test_affine_maps_equal_a_float64_sum_over_pixels(side: int, device: str) -> None:
    n = 12
    images = images_of(n, side, side)
    g = torch.Generator().manual_seed(side)
    maps = torch.eye(2, 3).flatten() + 0.3 * torch.randn((n, 6), generator=g)
    maps[:, [2, 5]] += torch.randn((n, 2), generator=g) * side / 4
    steps = [(Operation.BILINEAR, *(bits(v) for v in row)) for row in maps.numpy()]
    got = render(images.to(device), [recipe((0, 0, side, side), step) for step in steps], side)
    a, b, c, d, e, f = (v.view(n, 1, 1) for v in maps.double().unbind(1))
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    px, py = (a * x + b * y + c - 0.5).flatten(1), (d * x + e * y + f - 0.5).flatten(1)
    grid = torch.arange(side).double()
    # The weight of pixel (row, column) is a product of two triangles; pixels outside the image are black.
    wx = (1 - (px.unsqueeze(2) - grid).abs()).clamp(min=0)
    wy = (1 - (py.unsqueeze(2) - grid).abs()).clamp(min=0)
    exact = torch.einsum("npi,npj,nijc->npc", wy, wx, images.double()).view(n, side, side, 3)
    assert float((got - exact).abs().max()) <= 0.5 + 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_operations_run_in_sequence(device: str) -> None:
    side, n = 24, 30
    images = images_of(n, side, side)
    chain = [Operation.SHARPNESS, Operation.EQUALIZE, Operation.CONTRAST, Operation.AUTOCONTRAST, Operation.HUE]
    values = [0.4, 0.0, 0.6, 0.0, 0.2]
    steps = [(operation, bits(value)) for operation, value in zip(chain, values, strict=True)]
    expected = images
    for operation, value in zip(chain, values, strict=True):
        expected = pil_results(expected, AGAINST_PIL[operation][1], [value] * n)
    assert torch.equal(render(images.to(device), [recipe((0, 0, side, side), *steps)] * n, side), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_normalisation_cutout_and_bfloat16(device: str) -> None:
    images = images_of(12, 20, 20)
    recipes = torch.tensor([recipe((2, 3, 16, 16))] * 12, dtype=torch.int32)
    recipes[:, 5:9] = torch.tensor([[i % 5, i % 3, i % 5 + i, 16 - i % 4] for i in range(12)]).clamp(max=16)
    given_images = images.to(device)
    pixels = augment(given_images, recipes, 16, SCALE, SHIFT, torch.uint8)
    assert torch.equal(pixels.cpu(), images[:, 2:18, 3:19])
    expected = images[:, 2:18, 3:19].float() * torch.tensor(SCALE) + torch.tensor(SHIFT)
    for i in range(12):
        top, left, bottom, right = recipes[i, 5:9].tolist()
        expected[i, top:bottom, left:right] = 0
    single = augment(given_images, recipes, 16, SCALE, SHIFT, torch.float32)
    assert single.is_contiguous(memory_format=torch.channels_last) and single.shape == (12, 3, 16, 16)
    assert torch.equal(single.cpu().permute(0, 2, 3, 1), expected)
    half = augment(given_images, recipes, 16, SCALE, SHIFT, torch.bfloat16)
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(half, single.to(torch.bfloat16))


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_pixels_do_not_depend_on_batch_gather_or_threads(data: st.DataObject) -> None:
    n, height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    size = data.draw(st.integers(1, 40))
    images = images_of(n, height, width)
    recipes = []
    for _ in range(n):
        h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        box = (data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w)
        steps = []
        for _ in range(3):
            operation = data.draw(st.sampled_from(list(Operation)))
            if operation == Operation.NEAREST:
                words = [data.draw(st.integers(-(1 << 21), 1 << 21)) for _ in range(6)]
            elif operation == Operation.POSTERIZE:
                words = [bits(data.draw(st.integers(0, 8)))]
            elif operation == Operation.BILINEAR:
                words = [bits(data.draw(st.floats(-50, 50, width=32))) for _ in range(6)]
            else:
                words = [bits(data.draw(st.floats(0, 300 if operation == Operation.SOLARIZE else 2, width=32)))]
            steps.append((operation, *words))
        recipes.append(recipe(box, *steps, flip=data.draw(st.booleans())))
    together = render(images, recipes, size)
    order = data.draw(st.permutations(range(n)))
    gathered = render(images, [recipes[i] for i in order], size, indices=torch.tensor(order))
    assert torch.equal(gathered, together[order])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(render(images, recipes, size), together)
    finally:
        torch.set_num_threads(threads)
    for i in range(n):
        assert torch.equal(render(images[i : i + 1], recipes[i : i + 1], size), together[i : i + 1])


def test_strided_images_and_empty_batches() -> None:
    images = images_of(10, 12, 14)
    strided = images[::2, :, 1:13]
    recipes = [recipe((0, 0, 12, 12), (Operation.EQUALIZE,))] * 5
    assert torch.equal(render(strided, recipes, 12), render(strided.contiguous(), recipes, 12))
    empty = torch.zeros((0, RECIPE_HEADER + RECIPE_STEP), dtype=torch.int32)
    out = augment(images[:0], empty, 7, SCALE, SHIFT, torch.float32)
    assert out.shape == (0, 3, 7, 7)
    none = augment(images, empty, 7, SCALE, SHIFT, torch.uint8, indices=torch.zeros(0, dtype=torch.int64))
    assert none.shape == (0, 7, 7, 3)


def test_operator_passes_opcheck() -> None:
    images = images_of(2, 8, 8)
    recipes = torch.tensor([recipe((0, 0, 8, 8))] * 2, dtype=torch.int32)
    for dtype in (torch.uint8, torch.bfloat16):
        arguments = (images, None, recipes, 8, SCALE, SHIFT, dtype)
        torch.library.opcheck(torch.ops.scan_fast.augment.default, arguments)


def test_wrong_input_raises() -> None:
    images = images_of(2, 8, 8)
    good = torch.tensor([recipe((0, 0, 8, 8), (Operation.IDENTITY,))] * 2, dtype=torch.int32)

    def call(images: torch.Tensor = images, recipes: torch.Tensor = good, size: int = 8, **options: object) -> None:
        augment(images, recipes, size, SCALE, SHIFT, options.pop("dtype", torch.uint8), **options)  # type: ignore[arg-type]

    def changed(word: int, value: int) -> torch.Tensor:
        recipes = good.clone()
        recipes[1, word] = value
        return recipes

    call()
    with pytest.raises(ValueError, match=r"images must be \(N, H, W, 3\) uint8"):
        call(images.float())
    with pytest.raises(ValueError, match=r"images must be \(N, H, W, 3\) uint8"):
        call(images.permute(0, 3, 1, 2))
    for recipes in (good.long(), good[:, :-1], good[0]):
        with pytest.raises(ValueError, match="recipes must be"):
            call(recipes=recipes)
    with pytest.raises(ValueError, match="a row for each of the 2 images, got 1"):
        call(recipes=good[:1])
    for word, value in ((0, -1), (0, 1), (1, 3), (2, 9), (2, 0), (3, -5)):
        with pytest.raises(ValueError, match=r"the box of image 1 .* must lie within 8 x 8"):
            call(recipes=changed(word, value))
    for word, value in ((5, -1), (8, 9)):
        with pytest.raises(ValueError, match="the cutout of image 1"):
            call(recipes=changed(word, value))
    with pytest.raises(ValueError, match="operation 13, which does not exist"):
        call(recipes=changed(RECIPE_HEADER, 13))
    posterize = changed(RECIPE_HEADER, int(Operation.POSTERIZE))
    for bad in (-1.0, 9.0, float("nan")):
        posterize[1, RECIPE_HEADER + 1] = bits(bad)
        with pytest.raises(ValueError, match="0 to 8 are possible"):
            call(recipes=posterize)
    with pytest.raises(ValueError, match="size and the images' sides"):
        call(size=0)
    with pytest.raises(ValueError, match="dtype must be uint8, float32 or bfloat16"):
        call(dtype=torch.float16)
    with pytest.raises(ValueError, match="indices must be from 0 to 1, got 2"):
        call(indices=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"indices must be \(2,\) int64"):
        call(indices=torch.tensor([0, 1, 1]))
