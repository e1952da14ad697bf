"""CUB, Cars196, SOP and In-Shop from miniature trees in the formats that people have on disk, and their 48 cells."""

import hashlib
import itertools
import json
import time

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

import data
import eval
import metrix
import model as models

SMALL = "--net tiny --weights none --image-size 32 --embedding-size 8 --batch-size 8 --images-per-class 2 --num-workers 0 --epochs 1"


def picture(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (36, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_cub(root, lists=True, junk=True, ends="\n"):
    base = root / "CUB_200_2011"
    names, labels = [], []
    for label in (1, 2, 3, 4, 101, 102, 150, 200):
        for n, mode in zip(range(3), ("RGB", "L", "CMYK")):
            name = f"{label:03d}.Bird_{label}/Bird_{n}.jpg"
            picture(base / "images" / name, mode)
            names.append(f"{len(names) + 1} {name}")
            labels.append(f"{len(names)} {label}")
    if junk:
        (base / "images" / "001.Bird_1" / "._Bird_0.jpg").write_bytes(b"junk")
    if lists:
        (base / "images.txt").write_bytes(ends.join(names + [""]).encode())
        (base / "image_class_labels.txt").write_bytes(ends.join(labels + [""]).encode())
    return root


def save_annotations(file, rows, fields):
    table = np.zeros((1, len(rows)), dtype=[(name, object) for name in fields])
    for k, row in enumerate(rows):
        table[0, k] = row
    file.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(file, {"annotations": table})


def write_cars(root, layout="cars_annos"):
    classes = [c for c in (1, 2, 97, 98, 99, 100, 195, 196) for _ in range(4)]
    if layout == "cars_annos":
        rows = []
        for n, label in enumerate(classes, 1):
            name = f"car_ims/{n:06d}.jpg"
            picture(root / "cars196" / name)
            rows.append((name, 1, 2, 30, 31, label, n % 2))
        save_annotations(
            root / "cars196" / "cars_annos.mat", rows,
            ["relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test"],
        )  # fmt: skip
        return root
    lists = {"cars_train": ("cars_train_annos.mat", []), "cars_test": ("cars_test_annos_withlabels.mat", [])}
    for n, label in enumerate(classes):
        half = ("cars_train", "cars_test")[n % 2]
        name = f"{n // 2 + 1:05d}.jpg"  # both halves count from 1
        picture(root / "cars196" / half / name, "L" if n == 3 else "RGB")
        lists[half][1].append((1, 2, 30, 31, label, name))
    for half, (file, rows) in lists.items():
        folder = root / "cars196" / ("devkit" if layout == "devkit folder" else "")
        fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
        if layout == "unlabelled" and half == "cars_test":
            file, fields, rows = "cars_test_annos.mat", fields[:4] + fields[5:], [row[:4] + row[5:] for row in rows]
        save_annotations(folder / file, rows, fields)
    return root


def write_sop(root, ends="\n", pictures=True, classes=8):
    base = root / "Stanford_Online_Products"
    base.mkdir(parents=True)
    number = 0
    for name, first in (("train", 1), ("test", 11319)):
        lines = ["image_id class_id super_class_id path"]
        for label in range(first, first + classes):
            for n in range(3):
                number += 1
                path = f"bicycle_final/{110000 + label}_{n}.JPG"
                lines.append(f"{number} {label} 1 {path}")
                if pictures:
                    picture((base / path).with_suffix(".png"), "RGBA")  # what is in a file decides, not its name
                    (base / path).with_suffix(".png").rename(base / path)
        (base / f"Ebay_{name}.txt").write_bytes(ends.join(lines + [""]).encode())
    return root


def write_inshop(root, top="InShop_Clothes", list_at="", images_at="Img", ends="\n"):
    base, lines = root / top, []
    for item in range(1, 9):
        for n in range(4):
            part = "train" if item <= 5 else ("query" if n < 2 else "gallery")
            name = f"img/WOMEN/Dresses/id_{item:08d}/0{n}_1_front.jpg"
            picture(base / images_at / name, "L" if n == 0 else "RGB")
            lines.append(f"{name}{' ' * (3 + n)}id_{item:08d}   {part}  ")
    lines = [str(len(lines)), "image_name                  item_id evaluation_status", *lines]
    (base / list_at).mkdir(exist_ok=True)
    (base / list_at / "list_eval_partition.txt").write_bytes(ends.join(lines + [""]).encode())
    return root


WRITE = {"cub": write_cub, "cars": write_cars, "sop": write_sop, "inshop": write_inshop}
EXPECTED = {  # images and classes of each split
    "cub": [(12, 4), (12, 4)],
    "cars": [(16, 4), (16, 4)],
    "sop": [(24, 8), (24, 8)],
    "inshop": [(20, 5), (6, 3), (6, 3)],
}
LAYOUTS = [
    ("cub", {}),
    ("cub", dict(lists=False)),
    ("cub", dict(ends="\r\n")),
    ("cars", {}),
    ("cars", dict(layout="newer devkit")),
    ("cars", dict(layout="devkit folder")),
    ("sop", {}),
    ("sop", dict(ends="\r\n")),
    ("inshop", {}),
    ("inshop", dict(top="Inshop_Clothes", list_at="Eval", images_at="")),
    ("inshop", dict(ends="\r\n", list_at="Eval")),
]


@pytest.mark.parametrize("dataset, layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("inner", [False, True], ids=["from its parent", "from inside"])
def test_every_layout_is_found_and_split(dataset, layout, inner, tmp_path):
    WRITE[dataset](tmp_path, **layout)
    (base,) = tmp_path.iterdir()
    splits = data.load(dataset, str(base if inner else tmp_path))
    assert [(len(split), len(split.classes)) for split in splits] == EXPECTED[dataset]
    train, query, gallery = splits[0], splits[1], splits[-1]
    assert not set(train.classes) & set(query.classes) and query.classes == gallery.classes
    for split in splits:
        assert len(split.paths) == len(set(split.paths)) == len(split.labels)
        assert set(split.labels) == set(range(len(split.classes)))
        for path in split.paths:
            assert data.open_image(path).mode == "RGB"


def test_labels_belong_to_their_paths(tmp_path):
    """The class is written in the file's own name or place in every format but the cars', whose order tells."""
    for dataset, class_of in {
        "cub": lambda path: str(int(path.split("/")[-2][:3])),
        "sop": lambda path: str(int(path.split("/")[-1].split("_")[0]) - 110000),
        "inshop": lambda path: path.split("/")[-2],
    }.items():
        for split in data.load(dataset, str(WRITE[dataset](tmp_path / dataset))):
            assert [split.classes[label] for label in split.labels] == [class_of(path) for path in split.paths]
    train, test = data.load("cars", str(write_cars(tmp_path / "cars")))
    assert [train.classes[label] for label in train.labels[::4]] == ["1", "2", "97", "98"]
    assert [path[-10:] for path in train.paths[:4]] == ["000001.jpg", "000002.jpg", "000003.jpg", "000004.jpg"]
    assert [test.classes[label] for label in test.labels[::4]] == ["99", "100", "195", "196"]
    train, _ = data.load("cars", str(write_cars(tmp_path / "devkit", "newer devkit")))
    assert [path[-20:] for path in train.paths[:2]] == ["cars_train/00001.jpg", "cars_train/00002.jpg"]
    assert train.labels[:2] == [0, 0] and train.paths[8].endswith("cars_test/00001.jpg") and train.labels[8] == 0


def spoil(file, old, new):
    file.write_text(file.read_text().replace(old, new, 1))


def one_annotation(base, row):
    save_annotations(base / "cars_annos.mat", [row], ["relative_im_path", "class"])


@pytest.mark.parametrize(
    "dataset, layout, damage, message",
    [
        ("cub", {}, lambda b: (b / "images").rename(b / "pictures"), "no CUB_200_2011/images in it; unpack CUB"),
        ("cub", {}, lambda b: (b / "image_class_labels.txt").unlink(), "image_class_labels.txt: no such file"),
        ("cub", {}, lambda b: spoil(b / "images.txt", "3 001", "33 001"), "image_class_labels.txt: image 3 is only in one of this list and"),
        ("cub", {}, lambda b: spoil(b / "images.txt", "2 001", "2"), "images.txt, line 2: expected image_id image_name"),
        ("cub", {}, lambda b: spoil(b / "images.txt", "001.", "../001."), "leads out of"),
        ("cub", {}, lambda b: spoil(b / "images.txt", "\n3 ", "\n2 "), "images.txt, line 3: image 2 is listed twice"),
        ("cub", {}, lambda b: spoil(b / "image_class_labels.txt", "\n24 200", "\n24 201"), "of class 201, beyond 1 .. 200"),
        ("cub", {}, lambda b: (b / "images.txt").write_text(""), "images.txt: lists no images"),
        ("cars", {}, lambda b: (b / "cars_annos.mat").unlink(), "cars_annos.mat: no such file"),
        ("cars", {}, lambda b: (b / "cars_annos.mat").write_bytes(b"MATLAB"), "cars_annos.mat: not a list of Cars196"),
        ("cars", dict(layout="unlabelled"), lambda b: None, "cars_test_annos_withlabels.mat: no such file.*classes"),
        (
            "cars",
            dict(layout="unlabelled"),
            lambda b: (b / "cars_test_annos.mat").rename(b / "cars_test_annos_withlabels.mat"),
            "has no 'class', only bbox_x1.*use the list with labels",
        ),
        ("cars", {}, lambda b: one_annotation(b, ("car_ims/1.jpg", "Audi")), "image 1: expected a file name and a class number"),
        ("cars", {}, lambda b: one_annotation(b, ("car_ims/1.jpg", [1, 2])), "image 1: expected a file name and a class number"),
        ("cars", {}, lambda b: one_annotation(b, ("", 3)), "image 1: expected a file name and a class number"),
        ("cars", {}, lambda b: one_annotation(b, ("car_ims/1.jpg", 3.5)), "image 1: expected a file name and a class number"),
        ("sop", {}, lambda b: spoil(b / "Ebay_train.txt", "image_id", "1"), "Ebay_train.txt, line 1: expected the header image_id"),
        ("inshop", {}, lambda b: spoil(b / "list_eval_partition.txt", "32", "33"), "line 1 announces 33 images, 32 follow"),
        ("sop", {}, lambda b: (b / "Ebay_test.txt").unlink(), "Ebay_test.txt: no such file"),
        ("sop", {}, lambda b: spoil(b / "Ebay_train.txt", "2 1 1 ", "2 1 "), "Ebay_train.txt, line 3: expected image_id"),
        ("sop", {}, lambda b: spoil(b / "Ebay_train.txt", "2 1 1 ", "2 one 1 "), "line 3: 'one' is not a class number"),
        ("sop", {}, lambda b: spoil(b / "Ebay_test.txt", " 11319 ", " 1 "), "classes are there to train and to test on .1, "),
        ("inshop", {}, lambda b: (b / "list_eval_partition.txt").unlink(), "no InShop_Clothes/list_eval_partition.txt or "),
        ("inshop", {}, lambda b: spoil(b / "list_eval_partition.txt", " query", " val"), "line 23: evaluation_status is 'val'"),
        ("inshop", {}, lambda b: spoil(b / "list_eval_partition.txt", " train ", " "), "line 3: expected image_name item_id"),
    ],
)
def test_what_is_missing_or_malformed_is_named(dataset, layout, damage, message, tmp_path, capsys):
    WRITE[dataset](tmp_path / "data", **layout)
    (base,) = (tmp_path / "data").iterdir()
    damage(base)
    with pytest.raises((ValueError, OSError), match=message):
        data.load(dataset, str(tmp_path / "data"))
    with pytest.raises(SystemExit) as end:
        metrix.main(f"{dataset} contrastive feature --data-root {tmp_path}/data --out {tmp_path}/run {SMALL}".split())
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.startswith("metrix: ") and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_listed_image_that_is_missing_is_named(tmp_path, capsys):
    write_sop(tmp_path / "data")
    missing = tmp_path / "data/Stanford_Online_Products/bicycle_final/121321_1.JPG"
    missing.unlink()
    with pytest.raises(SystemExit) as end:
        metrix.main(f"sop contrastive feature --data-root {tmp_path}/data --out {tmp_path}/run {SMALL}".split())
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.startswith(f"metrix: {missing}: no such file") and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_full_lists_load_within_two_seconds(tmp_path):
    """120,053 lines of SOP and 52,712 of In-Shop, as many as the real ones."""
    sop = tmp_path / "Stanford_Online_Products"
    sop.mkdir()
    for name, count, first, classes in (("train", 59551, 1, 11318), ("test", 60502, 11319, 11316)):
        rows = [f"{n} {first + n % classes} 1 chair_final/{n}.JPG" for n in range(count)]
        (sop / f"Ebay_{name}.txt").write_text("\n".join(["image_id class_id super_class_id path", *rows]))
    inshop = tmp_path / "InShop_Clothes"
    inshop.mkdir()
    parts = [("train", 25882, 0, 3997), ("query", 14218, 4000, 3985), ("gallery", 12612, 4000, 3985)]
    rows = [f"img/{part}/{n}.jpg  id_{first + n % k:08d}  {part}" for part, count, first, k in parts for n in range(count)]
    (inshop / "list_eval_partition.txt").write_text("\n".join(["52712", "image_name item_id evaluation_status", *rows]))
    for dataset in ("sop", "inshop"):
        start = time.perf_counter()
        splits = data.load(dataset, str(tmp_path))
        assert time.perf_counter() - start < 2
        assert data.sizes(splits) == data.FULL[dataset]


@pytest.mark.parametrize("dataset", WRITE)
def test_all_twelve_cells_run_and_end_in_a_table(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    WRITE[dataset](tmp_path / "data")
    metrix.main(f"all {dataset} {SMALL}".split())
    out = capsys.readouterr().out
    assert out.count("is not the full") == 12 and "(the full data set)" not in out
    cells = json.loads(out.splitlines()[-1])["cells"]
    for loss, mode in itertools.product(metrix.LOSSES, metrix.MODES):
        config = json.loads((tmp_path / f"runs/{dataset}-{loss}-{mode}-seed0/config.json").read_text())
        assert config["train_images"] == EXPECTED[dataset][0][0]
        log = json.loads((tmp_path / f"runs/{dataset}-{loss}-{mode}-seed0/log.jsonl").read_text())
        assert list(log["recall"]) == [str(k) for k in metrix.RECALL_AT[dataset]]
        assert cells[loss][mode]["recall_at_1"]["values"] == [100 * log["recall"]["1"]]
    published = [line.split()[1:] for line in out.splitlines() if line.startswith("  published*")]
    assert published == [list(map(str, shares)) for (of, _), shares in metrix.PUBLISHED.items() if of == dataset]

    monkeypatch.setattr(metrix, "train_epoch", None)  # a second time nothing is left to train
    metrix.main(f"all {dataset} {SMALL}".split())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cells"] == cells


def test_halves_of_the_training_classes_are_not_called_an_incomplete_data_set(tmp_path, capsys):
    write_inshop(tmp_path / "data")
    metrix.main(f"inshop contrastive baseline --validation --data-root {tmp_path}/data --out {tmp_path}/run {SMALL} --batch-size 4".split())
    assert "WARNING" not in capsys.readouterr().out


def test_inshop_queries_search_the_gallery_without_leaving_anything_out(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(eval, "ranking", lambda *given, ranking=eval.ranking, **more: calls.append(given) or ranking(*given, **more))
    write_inshop(tmp_path / "data")
    metrix.main(f"inshop contrastive baseline --data-root {tmp_path}/data --out {tmp_path}/run {SMALL}".split())
    ((query, query_labels, gallery, gallery_labels),) = calls
    assert (len(query), len(gallery)) == (6, 6) and query_labels.tolist() == gallery_labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_recipes_are_those_of_the_paper():
    for cell, lr in {
        "cub contrastive feature": 1e-4,
        "sop contrastive baseline": 3e-5,
        "inshop contrastive baseline": 3e-5,
        "inshop contrastive embed": 1e-4,
        "inshop proxyanchor input": 6e-4,
    }.items():
        config = metrix.parse(cell.split())
        assert config.lr == lr and config.weights == "imagenet"
        assert (config.epochs, config.batch_size, config.embedding_size, config.weight_decay) == (60, 100, 512, 1e-4)
        assert config.min_crop == 0.08 and config.image_size == 224 and config.clip == 10


def test_a_run_starts_from_downloaded_imagenet_weights(tmp_path, monkeypatch, capsys):
    """The default of the benchmarks, through the command line; the download comes from a file:// address."""
    torch.manual_seed(1)
    state = {k: v for k, v in torchvision.models.resnet50().state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:8]
    served = (tmp_path / "weights.pth").rename(tmp_path / f"resnet50-{digest}.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(models, "IMAGENET_URL", served.as_uri())
    write_cub(tmp_path / "data")
    small = "--image-size 32 --batch-size 8 --num-workers 0 --epochs 1 --warmup-epochs 1"
    metrix.main(f"cub contrastive feature --data-root {tmp_path}/data --out {tmp_path}/run {small}".split())
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    for name, value in state.items():  # warm-up leaves the trunk, and "stats" its statistics, as they came
        assert name.startswith("fc.") or torch.equal(trained[name], value), name
