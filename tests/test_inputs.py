"""Files of any content: the documented errors in one line, or a result, and never anything else. No list leads out."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import scipy.io
import torch

import data
import eval
import metrix
import model as models
from test_benchmarks import WRITE

CASES = 1000  # of each kind
LISTS = {
    "cub": ["CUB_200_2011/images.txt", "CUB_200_2011/image_class_labels.txt"],
    "cars": ["cars196/cars_annos.mat"],
    "sop": ["Stanford_Online_Products/Ebay_train.txt", "Stanford_Online_Products/Ebay_test.txt"],
    "inshop": ["InShop_Clothes/list_eval_partition.txt"],
}
WORDS = [b"..", b"/", b"\0", b"\xff", b" ", b"\n", b"-1", b"0", b"1e9", b"9" * 400, b"nan", "é".encode(), b"\xef\xbb\xbf", b"\r", b"\t", b"../../x", b"~"]


def mutated(content, rng):
    """The content after one to five changes: a byte, a span lost or repeated, a word put in, the end cut off."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        at, length = rng.integers(len(content) + 1), rng.integers(1, 40)
        change = rng.integers(5)
        if change == 0 and at < len(content):
            content[at] = rng.integers(256)
        elif change == 1:
            del content[at : at + length]
        elif change == 2:
            content[at:at] = content[at : at + length]
        elif change == 3:
            content[at:at] = WORDS[rng.integers(len(WORDS))]
        elif rng.integers(4) == 0:
            del content[at:]
    return bytes(content)


def cut(content, rng):
    return content[: rng.integers(len(content))]


def told_well(error):
    assert "\n" not in str(error) and len(str(error)) > 10, repr(error)


@pytest.mark.parametrize("dataset", LISTS)
def test_any_list_is_read_or_refused(dataset, tmp_path):
    rng, refused = np.random.default_rng(0), 0
    WRITE[dataset](tmp_path)
    originals = {tmp_path / name: (tmp_path / name).read_bytes() for name in LISTS[dataset]}
    for case in range(CASES):
        file = list(originals)[case % len(originals)]
        change = cut if dataset == "cars" else mutated  # scipy's reader itself may crash on other damage to a .mat file
        file.write_bytes(rng.bytes(rng.integers(200)) if case % 50 == 0 else change(originals[file], rng))
        try:
            splits = data.load(dataset, str(tmp_path))
            data.check_images(splits)
            assert all(pathlib.Path(path).resolve().is_relative_to(tmp_path) for split in splits for path in split.paths)
        except (ValueError, OSError) as error:
            told_well(error)
            refused += 1
        file.write_bytes(originals[file])
    assert CASES / 10 < refused


def test_any_annotation_is_read_or_refused(tmp_path):
    """Whole .mat files of strange values, as a mutated one seldom gets past its reader."""
    rng = np.random.default_rng(0)
    strange = ["", "a.jpg", "../a.jpg", "/a.jpg", "a\0b", 1, -1, 0, 1.5, np.nan, np.inf, 2**63, 99, np.array([]), np.array([1, 2]), np.zeros((2, 2)), True, 1j]
    (tmp_path / "car_ims").mkdir()
    for _ in range(CASES // 2):
        names = [name for name in ("relative_im_path", "fname", "class", "test") if rng.random() < 0.8] or ["class"]
        table = np.zeros((1, rng.integers(4)), dtype=[(name, object) for name in names])
        for row in range(table.shape[1]):
            table[0, row] = tuple(strange[rng.integers(len(strange))] for _ in names)
        scipy.io.savemat(tmp_path / "cars_annos.mat", {"annotations" if rng.random() < 0.9 else "other": table})
        try:
            data.load("cars", str(tmp_path))
        except (ValueError, OSError) as error:
            told_well(error)


def test_any_checkpoint_is_read_or_refused(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "weights.pt"
    torch.save({"model": {"a.weight": torch.ones(3), "b": torch.zeros(2, 2)}, "epoch": 1, "log": [{"recall": {"1": 0.5}}]}, file)
    original = file.read_bytes()
    net = models.ResNet(blocks=(1,), width=2, embedding_size=2)
    for case in range(2 * CASES):
        file.write_bytes(rng.bytes(rng.integers(200)) if case % 50 == 0 else mutated(original, rng))
        with pytest.raises((ValueError, OSError)) as error:
            models.load_weights(net, str(file))
        told_well(error.value)


def strange_value(rng, depth=0):
    leaves = [None, True, -1, 0, 2**70, 1e400, -0.5, "", "tiny", "stats", "toy", "é\n", [], {}]
    if depth < 2 and rng.random() < 0.3:
        return [strange_value(rng, depth + 1) for _ in range(rng.integers(3))]
    return leaves[rng.integers(len(leaves))]


def test_any_settings_are_read_or_refused(tmp_path, capsys):
    """As text, and as JSON with strange values: `eval` of such a run ends with exit code 2 and one line."""
    rng = np.random.default_rng(0)
    root = tmp_path / "none"  # a data set that is not there: what is well is refused too, but for that
    good = vars(metrix.parse(["folder", "--data-root", str(root), "--weights", "none", "--device", "cpu"]))
    written = json.dumps(good).encode()
    for case in range(CASES):
        settings = dict(good)
        for name in rng.choice(list(good), rng.integers(1, 4)):
            settings[name] = strange_value(rng)
        text = mutated(written, rng) if case % 2 else json.dumps(settings).encode()
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(SystemExit) as end:
            metrix.main(["eval", str(tmp_path), "--device", "cpu"])
        told = capsys.readouterr().err
        assert end.value.code == 2 and told.startswith("metrix: ") and told.count("\n") == 1, (text, told)


def test_any_archive_of_embeddings_is_read_or_refused(tmp_path, capsys):
    rng, file = np.random.default_rng(0), tmp_path / "z.npz"
    np.savez(file, embeddings=rng.normal(size=(6, 3)), labels=np.array([0, 0, 1, 1, 2, 2]))
    original = file.read_bytes()
    for case in range(CASES):
        file.write_bytes(rng.bytes(rng.integers(200)) if case % 50 == 0 else mutated(original, rng))
        try:
            eval.main(["--embeddings", str(file)])
        except SystemExit as end:
            told = capsys.readouterr().err
            assert end.code == 2 and told.startswith("eval: ") and told.count("\n") == 1, told


def test_any_cache_is_used_as_it_was_made_or_built_again(tmp_path, write_tree):
    """A changed pixel is not seen; a changed table, length or seal is."""
    root = str(write_tree(tmp_path / "images", {f"class{c}": 3 for c in range(4)}, size=9))
    cached = data.with_cache(data.load("folder", root), "folder", root, 64, 0)
    file = pathlib.Path(cached.train.cache.file)
    read = []

    def spy(path, source, count, read_table=data.read_cache_table):
        read.append((source, count))
        return read_table(path, source, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_cache_table", spy)
        data.with_cache(data.load("folder", root), "folder", root, 64, 0)
    (arguments,) = read
    rng, refused, content, expected = np.random.default_rng(0), 0, file.read_bytes(), data.read_cache_table(file, *arguments)
    for case in range(CASES):
        file.write_bytes(mutated(content, rng) if case % 2 else cut(content, rng))
        table = data.read_cache_table(file, *arguments)
        refused += table is None
        assert table is None or (table == expected).all() and file.stat().st_size == len(content)
    assert refused > 0.9 * CASES


def test_no_pickle_is_loaded_from_an_archive(tmp_path, capsys):
    np.savez(tmp_path / "z.npz", embeddings=np.array([{"any": "object"}], dtype=object), labels=np.zeros(1, int))
    with pytest.raises(SystemExit) as end:
        eval.main(["--embeddings", str(tmp_path / "z.npz")])
    assert end.value.code == 2 and "allow_pickle=False" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["absolute", "parent", "linked file", "linked directory"])
def test_no_list_leads_out_of_its_root(way, tmp_path):
    """A link of the data set itself, to another disk say, is no such way out."""
    WRITE["sop"](tmp_path / "disk")
    (tmp_path / "linked").symlink_to(tmp_path / "disk")
    assert len(data.load("sop", str(tmp_path / "linked")).train) == 24
    base, secret = tmp_path / "disk" / "Stanford_Online_Products", tmp_path / "secret"
    secret.mkdir()
    shutil.copy(next(base.glob("*/*.JPG")), secret / "a.jpg")
    (base / "file.jpg").symlink_to(secret / "a.jpg")
    (base / "directory").symlink_to(secret)
    name = {"absolute": f"{secret}/a.jpg", "parent": "../../secret/a.jpg", "linked file": "file.jpg", "linked directory": "directory/a.jpg"}[way]
    lines = (base / "Ebay_train.txt").read_text().splitlines()
    lines[2] = " ".join([*lines[2].split()[:3], name])
    (base / "Ebay_train.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="Ebay_train.txt, line 3: .* leads out of"):
        data.load("sop", str(tmp_path / "disk"))


def test_weights_of_another_content_than_their_name_says_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(models, "IMAGENET_URL", "http://127.0.0.1:9/resnet50-0676ba61.pth")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/resnet50-0676ba61.pth").write_bytes(b"of someone else")
    with pytest.raises(ValueError, match="SHA-256 is another"):
        models.load_weights(models.ResNet(blocks=(1,), width=2, embedding_size=2), "imagenet")
