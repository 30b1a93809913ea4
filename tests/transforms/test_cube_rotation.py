# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.layers import GaussianFilter

from monai_ssl.transforms import RandCubeRotation, RandCubeRotationd, rotation_matrix, rotation_table

from .index_images import AFFINE, index_image

# (k, plane) of numpy.rot90 for each class
AXIS10 = [
    *((k, (0, 1)) for k in (0, 1, 2, 3)),
    *((k, (1, 2)) for k in (3, 2, 1)),
    *((k, (0, 2)) for k in (3, 2, 1)),
]
HALF4 = [(0, (0, 1)), (2, (0, 1)), (2, (1, 2)), (2, (0, 2))]
AXIS10_TABLE = "012/000 102/100 012/110 102/010 021/001 012/011 021/010 210/001 012/101 210/100"
CUBE24_REST = (
    "021/100 021/111 102/001 102/111 120/000 120/110 120/101 120/011 201/000 201/110 201/101 201/011 210/010 210/111"
)
# group, shape that it takes, the classes that turn about one axis
GROUPS: list[tuple[str, tuple[int, ...], tuple[int, int], Any]] = [
    ("axis10", (5, 5, 5), (0, 1), AXIS10),
    ("cube24", (5, 5, 5), (0, 1), AXIS10),
    ("half4", (5, 6, 7), (0, 1), HALF4),
    ("plane4", (5, 5, 7), (0, 1), [(k, (0, 1)) for k in range(4)]),
    ("plane4", (5, 6, 5), (2, 0), [(k, (2, 0)) for k in range(4)]),
    ("plane4", (6, 6), (0, 1), [(k, (0, 1)) for k in range(4)]),
]
every_group = pytest.mark.parametrize("group, shape, plane, turns", GROUPS)


def written(group: str, spatial_dims: int = 3) -> str:
    axes, flips = rotation_table(group, spatial_dims)
    assert (axes.dtype, flips.dtype) == (torch.int64, torch.bool)
    rows = zip(axes.tolist(), flips.int().tolist())
    return " ".join("".join(map(str, a)) + "/" + "".join(map(str, f)) for a, f in rows)


# ---- the table


@pytest.mark.parametrize("group", ["axis10", "cube24", "half4", "plane4"])
def test_constant_volume_gives_equal_inputs_for_every_label(group: str) -> None:
    """Nothing but the content can tell the class, not the shape, the padding or the memory's order."""
    transform, image = RandCubeRotation(group), torch.full((2, 7, 7, 7), 3.5)
    turned = [transform.apply(image, label) for label in range(len(rotation_table(group)[0]))]
    assert all(torch.equal(t, image) and t.stride() == image.stride() for t in turned)


def test_tables() -> None:
    assert written("axis10") == AXIS10_TABLE
    assert written("cube24") == f"{AXIS10_TABLE} {CUBE24_REST}"
    assert written("half4") == "012/000 012/110 012/011 012/101"
    assert written("plane4") == "012/000 102/100 012/110 102/010"
    assert written("plane4", 2) == "01/00 10/10 01/11 10/01"


@every_group
def test_classes_are_the_turns_of_rot90(group: str, shape: Any, plane: Any, turns: Any) -> None:
    img = index_image(shape, 3)
    transform = RandCubeRotation(group, plane)
    for label, (k, (a, b)) in enumerate(turns):
        assert torch.equal(transform.apply(img, label), torch.rot90(img, k, (a + 1, b + 1)))
        assert np.array_equal(transform.apply(img.numpy(), label)[1], np.rot90(img[1].numpy(), k, (a, b)))


@every_group
def test_classes_are_distinct_and_class_0_is_the_image(group: str, shape: Any, plane: Any, turns: Any) -> None:
    img = index_image(shape)
    axes, flips = rotation_table(group, len(shape), plane)
    transform = RandCubeRotation(group, plane)
    results = []
    for label in range(len(axes)):
        out = transform.apply(img, torch.tensor(label))
        dims = [i + 1 for i, flip in enumerate(flips[label]) if flip]
        assert torch.equal(out, img.permute(0, *(axes[label] + 1).tolist()).flip(dims))
        assert out.is_contiguous()
        results.append(out.as_tensor().numpy().tobytes())
    assert len(set(results)) == len(results)
    assert results[0] == img.numpy().tobytes()


def test_inverses() -> None:
    img = index_image((5, 5, 5), 2)
    for group in ("axis10", "cube24"):
        transform = RandCubeRotation(group)
        classes = range(len(rotation_table(group)[0]))
        inverse = {}
        for a in classes:
            back = [b for b in classes if torch.equal(transform.apply(transform.apply(img, a), b), img)]
            assert len(back) == 1
            inverse[a] = back[0]
        assert [inverse[a] for a in range(10)] == [0, 3, 2, 1, 6, 5, 4, 9, 8, 7]


# ---- affine


@every_group
def test_matrix_maps_output_to_input(group: str, shape: Any, plane: Any, turns: Any) -> None:
    img, d = index_image(shape), len(shape)
    for label, (axes, flips) in enumerate(zip(*rotation_table(group, d, plane))):
        matrix = rotation_matrix(axes, flips, shape)
        assert (matrix.dtype, tuple(matrix.shape)) == (torch.float64, (d + 1, d + 1))
        assert torch.linalg.det(matrix) == pytest.approx(1)
        out = RandCubeRotation(group, plane).apply(img, label)
        for index in np.ndindex(*out.shape[1:]):
            source = (matrix @ torch.tensor([*index, 1.0], dtype=torch.float64)).long().tolist()
            assert out[(0, *index)] == img[(0, *source[:d])]


def test_matrix_of_unequal_axes() -> None:
    matrix = rotation_matrix((1, 0, 2), (True, False, False), (5, 6, 7))
    assert matrix.tolist() == [[0, 1, 0, 0], [-1, 0, 0, 5], [0, 0, 1, 0], [0, 0, 0, 1]]


@every_group
@pytest.mark.parametrize("rank", [None, 3])
def test_marked_voxel_stays_where_it_is(group: str, shape: Any, plane: Any, turns: Any, rank: int | None) -> None:
    rank = rank or len(shape)  # MONAI gives 2D images an affine of either size
    affine = AFFINE if rank == 3 else AFFINE[[0, 1, 3]][:, [0, 1, 3]]
    img = MetaTensor(index_image(shape), affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    marked = (1, 3, 2)[: len(shape)]
    pad = (0,) * (rank - len(shape))
    world = affine @ torch.tensor([*marked, *pad, 1.0], dtype=torch.float64)
    transform = RandCubeRotation(group, plane, max_anisotropy=None)
    for label in range(len(rotation_table(group, len(shape), plane)[0])):
        out = transform.apply(img, label)
        index = (out.as_tensor()[0] == img.as_tensor()[(0, *marked)]).nonzero()[0]
        torch.testing.assert_close(out.affine @ torch.tensor([*index, *pad, 1.0], dtype=torch.float64), world)
        assert out.meta["filename_or_obj"] == "a.nii.gz"
        assert torch.equal(img.affine, affine)


@pytest.mark.parametrize("kind", ["numpy", "tensor", "meta"])
def test_no_class_shares_memory_with_the_input(kind: str) -> None:
    img: Any = index_image((5, 5, 5))
    img = img.numpy() if kind == "numpy" else MetaTensor(img) if kind == "meta" else img
    transform = RandCubeRotation("cube24")
    for label in range(24):
        out = transform.apply(img, label)
        out.zero_()
        if kind == "meta":
            out.affine.zero_()
            assert torch.equal(img.affine, torch.eye(4, dtype=torch.float64))
        assert torch.equal(torch.as_tensor(img), index_image((5, 5, 5)))


# ---- draws and repeats


@pytest.mark.parametrize("group, classes", [("axis10", 10), ("cube24", 24), ("plane4", 4), ("half4", 4)])
def test_draws(group: str, classes: int) -> None:
    img = index_image((5, 5, 5))
    array = RandCubeRotation(group).set_random_state(seed=3)
    dictionary = RandCubeRotationd(["image", "pet"], group, label_key="turn").set_random_state(seed=3)
    state, labels = np.random.RandomState(3), set()
    for _ in range(100):
        out, alone = dictionary({"image": img, "pet": 2 * img, "name": "a"}), array(img)
        label = int(state.randint(classes))
        labels.add(label)
        assert array.label == label
        assert torch.equal(alone, array.apply(img, label))
        assert set(out) == {"image", "pet", "name", "turn"}
        assert (type(out["turn"]), out["turn"].dtype, out["turn"].shape) == (torch.Tensor, torch.int64, ())
        assert out["turn"] == label
        assert torch.equal(out["image"], alone)
        assert torch.equal(out["pet"], 2 * alone)
    assert labels == set(range(classes))
    assert array.R.randint(1000) == state.randint(1000)


def test_randomize_false_repeats_the_last_draw() -> None:
    img = index_image((5, 5, 5))
    array = RandCubeRotation("cube24").set_random_state(seed=0)
    dictionary = RandCubeRotationd("image", "cube24").set_random_state(seed=0)
    for call in (lambda: array(img, randomize=False), lambda: dictionary({"image": img}, randomize=False)):
        with pytest.raises(RuntimeError, match="nothing has been drawn"):
            call()
    first, out = array(img), dictionary({"image": img})
    assert torch.equal(array(img, randomize=False), first)
    out["label"].fill_(0)
    assert torch.equal(dictionary({"image": img}, randomize=False)["image"], out["image"])
    assert any(not torch.equal(array(img), first) for _ in range(3))


# ---- leaks


def energies(volumes: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of neighbours along each axis, (N, 3), as shares of their sum."""
    parts = torch.stack([volumes.diff(dim=a).square().flatten(1).mean(1) for a in (2, 3, 4)], 1)
    return parts / parts.sum(1, keepdim=True)


@pytest.mark.parametrize("anisotropic", [False, True])
def test_gradient_energies_tell_the_class_of_anisotropic_noise_only(anisotropic: bool) -> None:
    generator, transform = torch.Generator().manual_seed(0), RandCubeRotation().set_random_state(seed=0)
    noise = torch.randn(1200, 1, 8, 8, 8, generator=generator)
    smooth = GaussianFilter(3, [0.4, 0.8, 1.2] if anisotropic else [0.8] * 3)(noise)
    rotated, labels = [], []
    for volume in smooth:
        rotated.append(transform(volume))
        labels.append(int(transform.label))
    x, y = energies(torch.stack(rotated).as_tensor()), torch.tensor(labels)
    means = torch.stack([x[:600][y[:600] == c].mean(0) for c in range(10)])
    hits = (torch.cdist(x[600:], means).argmin(1) == y[600:]).double().mean()
    sigma = (0.1 * 0.9 / 600) ** 0.5
    assert (hits > 0.2) if anisotropic else (abs(hits - 0.1) < 3 * sigma)


@pytest.mark.parametrize(
    "group, plane, shape, exchanged",
    [
        ("axis10", (0, 1), (5, 5, 6), [0, 1, 2]),
        ("cube24", (0, 1), (6, 5, 5), [0, 1, 2]),
        ("plane4", (0, 2), (5, 5, 6), [0, 2]),
        ("plane4", (0, 1), (5, 6), [0, 1]),
    ],
)
def test_unequal_sizes_are_refused_without_a_draw(group: str, plane: Any, shape: Any, exchanged: Any) -> None:
    transform = RandCubeRotation(group, plane).set_random_state(seed=0)
    for call in (transform, lambda img: transform.apply(img, 0)):
        with pytest.raises(ValueError) as error:
            call(torch.zeros(1, *shape))
        for part in ("crop a cube first, or use half4", str(shape), str(exchanged), "'img'"):
            assert part in str(error.value)
    assert transform.label is None
    with pytest.raises(ValueError, match="'image' has spatial shape"):
        RandCubeRotationd("image", group, plane)({"image": torch.zeros(1, *shape)})


@pytest.mark.parametrize(
    "group, plane, spacing, limit, refused",
    [
        ("axis10", (0, 1), (1, 1, 1.2), 1.1, True),
        ("axis10", (0, 1), (1, 1, 1.05), 1.1, False),
        ("axis10", (0, 1), (1, 1, 1.2), 1.3, False),
        ("axis10", (0, 1), (1, 1, 5), None, False),
        ("cube24", (0, 1), (2, 1, 1), 1.1, True),
        ("plane4", (0, 1), (1, 1, 5), 1.1, False),
        ("plane4", (0, 2), (1, 1, 5), 1.1, True),
        ("half4", (0, 1), (1, 2, 5), 1.1, False),
    ],
)
def test_unequal_spacing(group: str, plane: Any, spacing: Any, limit: Any, refused: bool) -> None:
    img = MetaTensor(index_image((5, 5, 5)), affine=torch.diag(torch.tensor([*spacing, 1.0]).double()))
    array = RandCubeRotation(group, plane, limit)
    dictionary = RandCubeRotationd(["a", "b"], group, plane, limit)
    array(img.as_tensor()), array(img.numpy())  # without an affine there is nothing to check
    if not refused:
        assert dictionary({"a": img, "b": img})["a"].shape == array(img).shape
        return
    with pytest.raises(ValueError, match=rf"'img' has voxels of \[.*max_anisotropy {limit}"):
        array(img)
    with pytest.raises(ValueError, match="'b' has voxels of"):
        dictionary({"a": img.as_tensor(), "b": img})


def test_spacing_of_a_2d_image_with_a_3d_affine() -> None:
    for spacing, refused in (((1, 1, 5), False), ((1, 2, 1), True)):
        img = MetaTensor(index_image((6, 6)), affine=torch.diag(torch.tensor([*spacing, 1.0]).double()))
        if refused:
            with pytest.raises(ValueError, match="max_anisotropy"):
                RandCubeRotation("plane4")(img)
        else:
            assert RandCubeRotation("plane4")(img).shape == (1, 6, 6)


# ---- errors


@pytest.mark.parametrize(
    "args, message",
    [
        ({"group": "axis9"}, "unknown group 'axis9'.*axis10.*cube24"),
        ({"plane": (1, 1)}, "two different axes"),
        ({"plane": (0, 3)}, "two different axes"),
        ({"plane": (0, 1, 2)}, "two different axes"),
        ({"plane": (-1, 0)}, "two different axes"),
        ({"max_anisotropy": 0.9}, "max_anisotropy must be at least 1"),
    ],
)
def test_constructor_errors(args: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandCubeRotation(**args)
    with pytest.raises(ValueError, match=message):
        RandCubeRotationd("image", **args)
    if "max_anisotropy" not in args:
        with pytest.raises(ValueError, match=message):
            rotation_table(args.get("group", "plane4"), plane=args.get("plane", (0, 1)))


@pytest.mark.parametrize("group", ["axis10", "cube24", "half4"])
def test_2d_images_take_plane4_only(group: str) -> None:
    with pytest.raises(ValueError, match=f"'{group}' does not suit 2 spatial axes; in 2D use plane4"):
        RandCubeRotation(group)(torch.zeros(1, 6, 6))
    with pytest.raises(ValueError, match="plane4"):
        rotation_table(group, spatial_dims=2)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"plane \(0, 2\)"):
        RandCubeRotation("plane4", (0, 2))(torch.zeros(1, 6, 6))
    with pytest.raises(ValueError, match="4 spatial axes"):
        RandCubeRotation("plane4")(torch.zeros(1, 5, 5, 5, 5))
    for label in (10, -1):
        with pytest.raises(ValueError, match="label must be between 0 and 9"):
            RandCubeRotation().apply(torch.zeros(1, 5, 5, 5), label)
    with pytest.raises(ValueError, match=r"\(5, 5, 5\) and 'b' \(6, 6, 6\)"):
        RandCubeRotationd(["a", "b"])({"a": torch.zeros(1, 5, 5, 5), "b": torch.zeros(1, 6, 6, 6)})
    with pytest.raises(ValueError, match="'image'"):
        RandCubeRotationd("image", label_key="image")
    RandCubeRotationd("image", label_key="image_origin")  # writes no origin
