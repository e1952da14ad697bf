"""Folders, the toy set, and batches."""

import collections
import errno
import filecmp
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import kernels


def test_a_flat_folder_is_split_by_class(tmp_path, write_tree):
    write_tree(tmp_path, {"b": 3, "a": 2, "group/d": 4, "group/c": 2})
    (tmp_path / "a" / "._0.png").write_bytes(b"junk")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    train, test = data.load("folder", str(tmp_path))
    assert train.classes == ["a", "b"] and test.classes == ["group/c", "group/d"]
    assert train.labels == [0, 0, 1, 1, 1] and test.labels == [0, 0, 1, 1, 1, 1]
    assert [pathlib.Path(p).relative_to(tmp_path).as_posix() for p in train.paths[:3]] == ["a/0.png", "a/1.png", "b/0.png"]


def test_queries_without_a_partner_are_counted(tmp_path, write_tree):
    write_tree(tmp_path, {"train/a": 2, "train/b": 2, "test/c": 1, "test/d": 3, "test/e": 1})
    assert data.lone_queries(data.load("folder", str(tmp_path))) == 2
    query, gallery = data.make_split([("1", 1), ("2", 2)], [1, 2]), data.make_split([("3", 2)], [1, 2])
    assert data.lone_queries(data.RetrievalSplits(None, query, gallery)) == 1


def test_train_and_test_directories_win_over_halves(tmp_path, write_tree):
    write_tree(tmp_path, {"train/a": 2, "train/b": 2, "train/c": 2, "test/d": 2, "test/e": 2})
    train, test = data.load("folder", str(tmp_path))
    assert train.classes == ["a", "b", "c"] and test.classes == ["d", "e"]


def test_unusable_folders_are_named(tmp_path, write_tree):
    for name, classes, message in [
        ("none", {}, "no images in it"),
        ("one", {"a": 3}, "1 class.*, at least 4 are needed"),
        ("half", {"train/a": 3, "train/b": 3, "val/a": 3, "val/b": 3}, "only one of train/ and test/"),
        ("few", {"train/a": 3, "test/b": 3, "test/c": 3}, "1 class.* in the train split"),
        ("shared", {"train/a": 2, "train/b": 2, "test/b": 2, "test/c": 2}, "1 classes are there to train and to test on .b, "),
        ("lone", {"a": 2, "b": 2, "c": 1, "d": 1}, "no query has another image of its class"),
    ]:
        (tmp_path / name).mkdir()
        write_tree(tmp_path / name, classes)
        with pytest.raises(ValueError, match=message) as error:
            data.load("folder", str(tmp_path / name))
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)
    with pytest.raises(OSError, match="no such directory"):
        data.load("folder", str(tmp_path / "missing"))


def test_hidden_directories_and_links_in_a_circle_are_passed_over(tmp_path, write_tree):
    write_tree(tmp_path, {"a": 2, "b": 2, "c": 2, "d": 2, ".thumbnails": 2, "a/.ipynb_checkpoints": 2})
    (tmp_path / "b" / "back").symlink_to(tmp_path)
    train, test = data.load("folder", str(tmp_path))
    assert train.classes == ["a", "b"] and test.classes == ["c", "d"] and len(train) == len(test) == 4


def test_sixteen_bit_images_keep_their_shades(tmp_path):
    shades = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(shades).save(tmp_path / "deep.png")
    seen = np.asarray(data.open_image(str(tmp_path / "deep.png")))
    np.testing.assert_allclose(seen[..., 0], shades / 257, atol=1)


def test_training_images_are_cropped_and_flipped(tmp_path):
    """A picture dark on the left: with whole crops, some come out dark on the right, and the rest as they were."""
    shade = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
    Image.fromarray(shade).save(tmp_path / "shade.png")
    split = data.make_split([(str(tmp_path / "shade.png"), n // 8) for n in range(16)])
    (batch,) = [images for images, _ in data.train_loader(split, data.TrainBatches(split.labels, 16, 0, 0), 32, 0.999, 0)]
    flipped = [bool((image[0, :, 0] > image[0, :, -1]).all()) for image in batch]
    assert 2 < sum(flipped) < 14
    (small,) = [images for images, _ in data.train_loader(split, data.TrainBatches(split.labels, 16, 0, 0), 32, 0.1, 0)]
    contrast = (small[:, 0].amax((1, 2)) - small[:, 0].amin((1, 2))) / (batch[:, 0].amax((1, 2)) - batch[:, 0].amin((1, 2)))
    assert contrast.min() < 0.7  # a crop shows a part of the shades only


def test_the_toy_set_is_written_once_and_always_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOY_CLASSES", 6)
    monkeypatch.setattr(data, "TOY_IMAGES", 2)
    train, test = data.load("toy", str(tmp_path / "one"))
    data.load("toy", str(tmp_path / "other"))
    assert (len(train), len(test)) == (6, 6) and not set(train.classes) & set(test.classes)
    for path in train.paths + test.paths:
        assert filecmp.cmp(path, path.replace("one", "other"), shallow=False)
    monkeypatch.setattr(data, "write_toy", None)
    assert data.load("toy", str(tmp_path / "one")).train == train


LABELS = [0] * 7 + [1] * 2 + [2] * 9 + [3] * 3 + [4] * 6


def test_shuffled_batches_take_each_image_once_at_most():
    batches = data.TrainBatches(LABELS, batch_size=4, images_per_class=0, seed=0)
    taken = [index for batch in batches for index, _ in batch]
    assert len(batches) == 6 and len(taken) == len(set(taken)) == 24


def test_balanced_batches_repeat_images_of_small_classes_only():
    batches = data.TrainBatches(LABELS, batch_size=8, images_per_class=4, seed=0)
    met = collections.Counter()
    for epoch in range(20):
        batches.epoch = epoch
        assert len(list(batches)) == len(batches) == 3
        for batch in batches:
            images = [index for index, _ in batch]
            classes = collections.Counter(LABELS[index] for index in images)
            assert sorted(classes.values()) == [4, 4]
            met.update(classes.keys())
            for c in classes:
                if LABELS.count(c) >= 4:
                    assert len({i for i in images if LABELS[i] == c}) == 4
    assert max(met.values()) - min(met.values()) <= 10  # classes come round evenly: 120 turns, 24 each on average


def test_an_epoch_follows_from_seed_and_number():
    def drawn(seed, epoch):
        batches = data.TrainBatches(LABELS, 8, 4, seed)
        batches.epoch = epoch
        return list(batches)

    assert drawn(1, 3) == drawn(1, 3) != drawn(1, 4) != drawn(2, 4)


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="--batch-size 28 is more than the 27 training images"):
        data.TrainBatches(LABELS, 28, 0, 0)
    with pytest.raises(ValueError, match="needs 6 classes; there are 5"):
        data.TrainBatches(LABELS, 24, 4, 0)


def test_augmentation_does_not_depend_on_workers(tmp_path, write_tree):
    write_tree(tmp_path, {"a": 4, "b": 4, "c": 4, "d": 4})
    split = data.load("folder", str(tmp_path)).train
    loaded = []
    for num_workers in (0, 2):
        batches = data.TrainBatches(split.labels, 4, 2, seed=0)
        loaded.append([images for images, _ in data.train_loader(split, batches, 32, 0.2, num_workers)])
    assert torch.equal(torch.stack(loaded[0]), torch.stack(loaded[1]))
    assert loaded[0][0].shape == (4, 3, 32, 32) and not torch.equal(loaded[0][0][0], loaded[0][0][1])


def test_the_test_images_come_in_order_and_whole(tmp_path, write_tree):
    write_tree(tmp_path, {"a": 2, "b": 2, "c": 3, "d": 2}, size=37)
    split = data.load("folder", str(tmp_path)).test
    images, labels = zip(*data.test_loader(split, 2, 32, 0))
    assert torch.cat(labels).tolist() == [0, 0, 0, 1, 1]
    pixels = np.asarray(data.open_image(split.paths[0]))[2:34, 2:34] / 255  # 37 = round(32 * 256 / 224): a crop, no resize
    expected = (pixels - data.IMAGENET_MEAN) / data.IMAGENET_STD
    np.testing.assert_allclose(images[0][0].permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_line(tmp_path, write_tree, num_workers):
    write_tree(tmp_path, {"a": 2, "b": 2, "c": 2, "d": 2})
    broken = tmp_path / "c" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    split = data.load("folder", str(tmp_path)).test
    with pytest.raises(data.UnreadableImage) as error:
        list(data.test_loader(split, 2, 32, num_workers))
    assert str(error.value).startswith(f"{broken}: cannot be read") and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------- cache


@pytest.fixture
def photos(tmp_path):
    """A folder of smooth pictures of many shapes and modes, the first eight of which a limit of 48 leaves as they are."""
    rng = np.random.default_rng(0)
    shapes = [(48, 48), (40, 60), (90, 48), (31, 37), (1, 1), (48, 70), (20, 80), (45, 33), (64, 96), (100, 72), (49, 49), (61, 200)]
    for n, (height, width) in enumerate(shapes):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        directory = tmp_path / "photos" / f"class{n // 2}"
        directory.mkdir(parents=True, exist_ok=True)
        coarse.resize((width, height), Image.BICUBIC).convert("L" if n % 3 == 0 else "RGB").save(directory / f"{n:02}.png")
    return tmp_path / "photos"


def cached(root, limit=48, **options):
    return data.with_cache(data.load("folder", str(root)), "folder", str(root), limit, 0, **options)


def cache_file(root, limit=48):
    return root / ".metrix-cache" / f"folder-{limit}"


def test_a_cache_holds_the_pixels(photos):
    for split in cached(photos):
        cache = split.cache
        for n, path in enumerate(split.paths):
            image = np.asarray(data.open_image(path))
            height, width = cache.sizes[n]
            assert tuple(cache.originals[n]) == image.shape[:2]
            stored = cache.pixels[cache.offsets[n] :][: 3 * height * width].view(width, 3, height).permute(2, 0, 1).numpy()
            if min(image.shape[:2]) <= 48:
                np.testing.assert_array_equal(stored, image)
            else:
                assert min(height, width) == 48
                shrunk = np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC))
                np.testing.assert_allclose(stored, shrunk.astype(int), atol=2)  # both round twice


@pytest.mark.parametrize("limit, largest, mean", [(200, 1.01, 0.35), (48, 24, 1.0)])
def test_cached_batches_are_the_decoded_ones_up_to_rounding_and_the_limit(photos, limit, largest, mean):
    """The same boxes and flips: without shrinking, Pillow's rounding to whole shades, twice, is all that differs."""
    plain, fast = data.load("folder", str(photos)), cached(photos, limit)
    for loaders in (
        [data.train_loader(s.train, data.TrainBatches(s.train.labels, 6, 0, seed=3), 32, 0.1, 0) for s in (plain, fast)],
        [data.test_loader(s.test, 4, 32, 0) for s in (plain, fast)],
    ):
        for (decoded, y), (cached_images, cached_y) in zip(*loaders, strict=True):
            assert torch.equal(y, cached_y) and decoded.shape == cached_images.shape
            error = 255 * torch.tensor(data.IMAGENET_STD)[:, None, None] * (decoded - cached_images).abs()
            assert error.max() < largest and error.mean() < mean


def test_cached_batches_do_not_depend_on_workers(photos):
    loaded = []
    for num_workers in (0, 2):
        split = cached(photos).train
        batches = data.TrainBatches(split.labels, 3, 0, seed=0)
        batches.epoch = 1
        loaded.append([images for images, _ in data.train_loader(split, batches, 32, 0.2, num_workers)])
    assert len(loaded[0]) == 2 and torch.equal(torch.stack(loaded[0]), torch.stack(loaded[1]))


def test_pixels_on_a_cpu_are_cropped_by_triton_only_where_it_is_interpreted(photos, triton_device, monkeypatch):
    split = cached(photos).test

    def cropped():
        return torch.cat([images for images, _ in data.test_loader(split, 4, 32, num_workers=2)])

    interpreted = cropped()
    monkeypatch.setattr(kernels, "choice", "torch")
    plain = cropped()
    assert (interpreted - plain).abs().max() < 1e-4
    monkeypatch.setattr(kernels, "choice", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert torch.equal(cropped(), plain)  # what a GPU cannot hold


def test_boxes_follow_torchvisions_distribution():
    """Area uniform in min_crop .. 1 and log-ratio in log 3/4 .. log 4/3 on a square, where few tries fail; half flipped."""
    transform = data.transforms.RandomResizedCrop(224, scale=(0.08, 0.5)), data.transforms.RandomHorizontalFlip()
    boxes, flips = data.RandomBoxes(*transform)(np.array([[1000, 1000]] * 4000), range(4000))
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = (height * width / 1e6 - 0.08) / 0.42
    ratio = (np.log(width / height) / np.log(4 / 3) + 1) / 2
    top, left = (boxes[:, :2] + 0.5).T / (1001 - np.stack([height, width]))
    for sample in (area, ratio, top, left):
        expected = (np.arange(4000) + 0.5) / 4000
        assert np.abs(np.sort(sample) - expected).max() < 1.63 / np.sqrt(4000) + 2e-3  # Kolmogorov-Smirnov at 1 %, rounding
    assert 0.47 < flips.mean() < 0.53
    long, _ = data.RandomBoxes(*transform)(np.array([[10, 1000], [1000, 10]]), [0, 1])  # nothing fits: the centre
    np.testing.assert_array_equal(long, [[0, 493, 10, 506], [493, 0, 506, 10]])


def test_a_cache_is_built_once_and_again_when_stale(photos, capsys):
    def times_built(limit=48):
        built = []
        cached(photos, limit, watch=lambda chunks: built.append(1) or chunks)
        return len(built)

    assert times_built() == 1 and times_built() == 0 and times_built(limit=40) == 1
    assert capsys.readouterr().out == ""
    stale = f"{cache_file(photos)}: of other images or settings, or not whole; building it again\n"
    whole = cache_file(photos).read_bytes()
    (photos / "class0" / "more.png").write_bytes((photos / "class0" / "00.png").read_bytes())
    assert times_built() == 1 and capsys.readouterr().out == stale
    (photos / "class0" / "more.png").unlink()
    for broken in (whole[:-1], whole[: len(whole) // 2], whole + b"x", b"x" + whole, b"", whole[:-40] + b"\x01" * 8 + whole[-32:]):
        cache_file(photos).write_bytes(broken)
        assert times_built() == 1 and capsys.readouterr().out == stale
        assert cache_file(photos).read_bytes() == whole
    changed = photos / "class0" / "00.png"
    changed.touch()
    assert times_built() == 1 and times_built() == 0


def test_a_cache_of_another_version_is_built_again(photos, monkeypatch, capsys):
    cached(photos)
    monkeypatch.setattr(data, "CACHE_VERSION", data.CACHE_VERSION + 1)
    cached(photos)
    assert "building it again" in capsys.readouterr().out


def test_an_interrupted_build_leaves_nothing(photos):
    def stop(chunks):
        yield next(iter(chunks))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(photos, watch=stop)
    assert list(cache_file(photos).parent.iterdir()) == []


def test_builds_at_one_time_do_not_meet(photos):
    built = []

    def watch(chunks):
        yield next(chunks)
        data.with_cache(data.load("folder", str(photos)), "folder", str(photos), 48, num_workers=2)
        built.append(cache_file(photos).read_bytes())
        yield from chunks

    cached(photos, watch=watch)
    assert cache_file(photos).read_bytes() == built[0]
    assert list(cache_file(photos).parent.iterdir()) == [cache_file(photos)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named_while_a_cache_is_built(photos, num_workers):
    broken = photos / "class1" / "02.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(data.UnreadableImage) as error:
        data.with_cache(data.load("folder", str(photos)), "folder", str(photos), 48, num_workers)
    assert str(error.value).startswith(f"{broken}: cannot be read") and "\n" not in str(error.value)
    assert list(cache_file(photos).parent.iterdir()) == []


def test_a_data_set_that_cannot_be_written_to_is_cached_elsewhere(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (photos / ".metrix-cache").write_text("no directory")
    file = cached(photos).train.cache.file
    assert file.startswith("data/cache/") and capsys.readouterr().out.endswith(f"; using {file}\n")
    cached(photos, watch=None)  # found there
    pathlib.Path(file).unlink()
    pathlib.Path(file).parent.rmdir()
    pathlib.Path(file).parent.write_text("no directory either")
    with pytest.raises(OSError, match=f"^{file}: cannot be written .*; --data-path decode"):
        cached(photos)


def test_a_full_disk_is_told_with_the_file(photos):
    def fill(chunks):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as error:
        cached(photos, watch=fill)
    assert str(error.value).startswith(f"{cache_file(photos)}: cannot be written")
    assert list(cache_file(photos).parent.iterdir()) == []

