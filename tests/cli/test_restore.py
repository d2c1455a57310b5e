"""`ddpm-hf restore`: what it writes, and what it refuses."""

import json

import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from ddpm_hf.portable.restoration_ddpm_hf import METHODS
from tests.support.fixtures_cli import assert_one_line
from tests.support.fixtures_pipeline import tiny_unet, tiny_vae
from tests.support.pictures import random_pixels, write_images


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Models of gray and colour images, pictures, and masks."""
    root = tmp_path_factory.mktemp("shop")
    scheduler = DDPMScheduler(20, beta_schedule="cosine")
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(root / "gray")
    DDPMPipeline(tiny_unet(3), scheduler).save_pretrained(root / "rgb")
    DDPMPipeline(tiny_unet(4), scheduler, tiny_vae()).save_pretrained(root / "latent")
    ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=2), scheduler, {0: "cat", 1: "dog"}).save_pretrained(
        root / "by-class"
    )
    pixels = random_pixels(3, 8, 8)
    write_images(root / "colour", pixels)
    write_images(root / "shades", pixels[..., 0])
    write_images(root / "large", random_pixels(1, 12, 16)[..., 0])
    write_images(root / "small", random_pixels(1, 4, 4)[..., 0])
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 5:] = 255
    write_images(root / "masks", np.stack([mask] * 2))
    write_images(root / "wide", np.stack([np.full((8, 9), 255, dtype=np.uint8)]))
    write_images(root / "none", np.stack([np.zeros((8, 8), dtype=np.uint8)]))
    write_images(root / "odd", pixels[:1, ..., 0])
    Image.fromarray(pixels[1, ..., 0]).save(root / "odd/...png", "PNG")  # its stem is ".."
    write_images(root / "twice", pixels[:1, ..., 0])
    Image.fromarray(pixels[1, ..., 0]).save(root / "twice/0.bmp")
    Image.fromarray(np.repeat(pixels[2, ..., :1], 3, axis=2)).save(root / "gray.png")  # three equal channels
    Image.fromarray(pixels[0]).convert("RGBA").save(root / "opaque.png")
    palette = Image.fromarray(np.where(mask > 0, 1, 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(root / "palette.png", transparency=1)
    DDPMPipeline(tiny_unet(4), scheduler).save_pretrained(root / "rgba")
    (root / "notes.txt").write_text("mine")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def restore(shop, tmp_path, run, monkeypatch):
    """Runs the command with few steps; its exit code, output and folder."""

    def call(words, out="out"):
        monkeypatch.chdir(shop)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it is asked again and again
        return run("restore", *words.split(), "--steps", 2, "--out", tmp_path / out), tmp_path / out

    return call


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_inpainting_keeps_what_is_known(restore, shop):
    """Else the picture that comes back is not the one that was given."""
    result, out = restore("gray --task inpaint --image shades/0.png --mask masks/0.png --sigma-y 0 --num-solutions 3")
    assert result[0] == 0, result[2]
    given = pixels(shop / "shades/0.png")
    for index in range(3):
        assert (pixels(out / f"000{index}.png")[:, :5] == given[:, :5]).all()
    assert (pixels(out / "deviation.png")[:, :5] == 0).all()
    assert (pixels(out / "low.png") <= pixels(out / "high.png")).all()
    report = json.loads((out / "restored.json").read_text())
    assert report["images"][0]["residual"] < 1e-5
    assert report["settings"]["task"] == "inpaint"


def test_what_is_transparent_in_a_palette_is_painted(restore, shop):
    """Else the mask is black, and the image comes back as it was."""
    result, out = restore("gray --task inpaint --image shades/0.png --mask palette.png --sigma-y 0 --num-solutions 1")
    assert result[0] == 0, result[2]
    made, given = pixels(out / "0000.png"), pixels(shop / "shades/0.png")
    assert (made[:, :5] == given[:, :5]).all()
    assert (made[:, 5:] != given[:, 5:]).any()


def test_a_folder_is_restored_with_a_table_and_truths(restore, shop):
    """Else several images need several calls, and nobody sees how good they are."""
    words = "gray --task super-resolution --factor 2 --image shades --degrade --num-solutions 2"
    result, out = restore(words)
    assert result[0] == 0, result[2]
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"0", "1", "2"}
    rows = json.loads((out / "restored.json").read_text())["images"]
    assert [row["image"] for row in rows] == ["0", "1", "2"]
    assert max(row["residual"] for row in rows) < 1e-5
    truth = pixels(shop / "shades/0.png")
    expected = [-10 * np.log10(np.mean((pixels(out / f"0/000{i}.png") / 255 - truth / 255) ** 2)) for i in range(2)]
    assert rows[0]["psnr"] == pytest.approx(np.mean(expected), abs=0.05)
    assert all(name in result[1] for name in ("psnr", "ssim", "coverage", "mean"))
    again, _ = restore(words.replace("--image shades", "--image shades/1.png"))
    assert again[0] == 0, again[2]
    assert not (out / "0").exists()  # of the earlier call
    assert (out / "0000.png").exists()


def test_a_solution_depends_on_its_index_alone(restore):
    """Else a batch size changes the pictures."""
    words = "gray --task denoise --sigma-y 0.3 --image shades --num-solutions 3"
    _, together = restore(words)
    _, apart = restore(f"{words} --batch-size 2", "apart")
    for index in range(3):
        difference = pixels(together / f"1/000{index}.png") - pixels(apart / f"1/000{index}.png")
        assert abs(difference).max() <= 1


@pytest.mark.parametrize(
    "words",
    [
        "rgb --task colorize --image shades/0.png --sigma-y 0",
        "gray --task super-resolution --image small/0.png",
        "gray --task deblur --blur motion --blur-size 3 --blur-angle 90 --image shades/0.png --method pigdm",
        "gray --task inpaint --mask random --hidden 0.8 --image large/0.png",
        "gray --task inpaint --mask box --image large/0.png --fit --degrade",
        "by-class --task denoise --class dog --image shades/0.png",
        "by-class --task denoise --class 1 --image shades/0.png",
        "rgb --task denoise --image gray.png",
        "gray --task denoise --image gray.png",
        "rgba --task denoise --image opaque.png",
        "rgb --task denoise --image opaque.png",
        "latent --task inpaint --mask box --image colour/0.png --method dps --fit --degrade --sigma-y 0.1",
        "gray --task inpaint --mask masks --image shades/1.png --truth shades/1.png --start 0.5",
        "gray --task inpaint --mask top --image shades/1.png --time-travel 1 2 --method repaint",
    ],
)
def test_each_task_runs(words, restore):
    """Else a line of the documentation ends in an error."""
    (code, said, err), out = restore(f"{words} --num-solutions 2")
    assert code == 0, err
    names = {path.name for path in out.iterdir()}
    assert {"0000.png", "0001.png", "mean.png", "deviation.png", "low.png", "high.png", "comparison.png"} <= names
    assert ("psnr" in said) == ("--degrade" in words or "--truth" in words)
    assert ("--sigma-y is estimated" in err) == ("--sigma-y" not in words and "--degrade" not in words)


def test_a_picture_and_its_mask_are_turned_together(restore, shop, tmp_path):
    """Else a phone's picture is painted elsewhere than its mask shows."""
    upright, hidden = pixels(shop / "shades/0.png").astype(np.uint8), pixels(shop / "masks/0.png").astype(np.uint8)
    for name, array in (("turned", upright), ("turned-mask", hidden)):
        image = Image.fromarray(array).transpose(Image.Transpose.ROTATE_90)
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(shop / f"{name}.png", exif=exif)
    words = "gray --task inpaint --sigma-y 0 --num-solutions 1"
    _, plain = restore(f"{words} --image shades/0.png --mask masks/0.png", "plain")
    result, turned = restore(f"{words} --image turned.png --mask turned-mask.png", "turned")
    assert result[0] == 0, result[2]
    assert (pixels(turned / "0000.png") == pixels(plain / "0000.png")).all()


def test_a_mask_and_a_truth_are_fitted_with_the_image(restore, shop):
    """Else --fit, which an error advises, ends in another error."""
    mask = np.zeros((12, 16), dtype=np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(shop / "large-mask.png")
    result, out = restore(
        "gray --task inpaint --image large/0.png --mask large-mask.png --truth large/0.png --fit --sigma-y 0"
    )
    assert result[0] == 0, result[2]
    (row,) = json.loads((out / "restored.json").read_text())["images"]
    assert row["calibrated"] == pytest.approx(0.54)  # of four solutions
    assert (pixels(out / "deviation.png")[:, :4] == 0).all()  # the left half is shown
    assert (pixels(out / "deviation.png")[:, 4:] > 0).any()


def test_a_fitted_mask_hides_all_that_was_mixed_with_hidden_pixels(restore, shop):
    """Else thin scratches are enlarged into the image as if they were known."""
    scratched = np.full((32, 32), 100, dtype=np.uint8)
    mask = np.zeros((32, 32), dtype=np.uint8)
    scratched[:, 13], mask[:, 13] = 255, 255
    Image.fromarray(scratched).save(shop / "scratched.png")
    Image.fromarray(mask).save(shop / "scratch.png")
    result, out = restore("gray --task inpaint --image scratched.png --mask scratch.png --fit --sigma-y 0")
    assert result[0] == 0, result[2]
    known = pixels(out / "deviation.png") == 0
    assert not known.all()
    wide, corner = np.full((8, 32), 100, dtype=np.uint8), np.zeros((8, 32), dtype=np.uint8)
    corner[:, :2] = 255  # which the crop cuts off
    Image.fromarray(wide).save(shop / "wide.png")
    Image.fromarray(corner).save(shop / "corner.png")
    words = "gray --task inpaint --image wide.png --mask corner.png --sigma-y 0"
    assert_one_line(restore(f"{words} --fit", "none")[0], "hides nothing that --fit keeps", "leave --fit out")
    assert restore(words, "tiles")[0][0] == 0  # the way out
    assert (abs(pixels(out / "0000.png")[known] - 100) <= 1).all()


def test_solutions_of_later_images_depend_on_no_number(restore):
    """Else more solutions of a folder's images are other ones."""
    words = "gray --task denoise --sigma-y 0.3 --image shades"
    _, few = restore(f"{words} --num-solutions 1", "few")
    _, more = restore(f"{words} --num-solutions 2", "more")
    assert abs(pixels(few / "2/0000.png") - pixels(more / "2/0000.png")).max() <= 1


def test_a_network_that_cannot_read_the_images_is_found_before_the_sampling(restore, monkeypatch):
    """Else the solutions are lost."""
    monkeypatch.setattr("ddpm_hf.cli.restore.restore_pictures", lambda *_: pytest.fail("sampled"))
    words = "rgba --task denoise --image opaque.png --degrade --sigma-y 0.1 --features efficientnet-lite0"
    result, _ = restore(words)
    assert_one_line(result, "--features efficientnet-lite0", "1x4x8x8")


REFUSED = [
    ("gray --task inpaint --image shades/0.png", ("--task inpaint", "--mask")),
    ("gray --task inpaint --image shades/0.png --mask wide/0.png", ("mask of shape (8, 9)", "8x8")),
    ("gray --task inpaint --image shades/0.png --mask nowhere.png", ("--mask nowhere.png",)),
    ("gray --task inpaint --image shades/0.png --mask notes.txt", ("--mask notes.txt",)),
    ("gray --task inpaint --image shades/2.png --mask masks", ("--mask masks", "2.png")),
    ("gray --task denoise --image colour/0.png", ("colour/0.png", "3 channels", "convert the image to gray")),
    ("rgb --task denoise --image shades/0.png", ("shades/0.png", "1 channels", "--task colorize")),
    ("gray --task colorize --image shades/0.png", ("--task colorize", "1 channels", "colour")),
    ("gray --task denoise --image shades/0.png --sigma-y -0.1", ("--sigma-y -0.1", "0 or more")),
    ("gray --task denoise --image small/0.png", ("small/0.png", "4x4", "8x8")),
    ("gray --task denoise --image notes.txt", ("notes.txt",)),
    ("gray --task denoise --image nowhere", ("--image nowhere",)),
    ("gray --task denoise --image empty", ("--image empty",)),
    ("gray --task super-resolution --image shades/0.png --factor 3 --degrade", ("factor=3", "8x8")),
    ("gray --task super-resolution --image shades/0.png --factor 1", ("--factor 1", "2 or more")),
    ("gray --task denoise --image shades/0.png --factor 2", ("--factor 2", "super-resolution")),
    ("gray --task inpaint --image shades/0.png --mask left --hidden 0.2", ("--hidden 0.2", "--mask box")),
    ("gray --task inpaint --image shades/0.png --mask box --hidden 1.5", ("--hidden 1.5", "below 1")),
    ("gray --task deblur --image shades/0.png --blur-size 0", ("--blur-size 0", "above 0")),
    ("gray --task denoise --image shades/0.png --truth shades --degrade", ("--truth", "--degrade")),
    ("gray --task denoise --image shades/0.png --truth large/0.png", ("12x16", "8x8")),
    ("gray --task denoise --image shades/0.png --features pixels", ("--features", "--truth")),
    ("gray --task denoise --image shades/0.png --class dog", ("--class dog", "no classes")),
    ("by-class --task denoise --image shades/0.png", ("--class", "cat, dog")),
    ("by-class --task denoise --image shades/0.png --class fox", ("--class", "fox")),
    ("gray --task inpaint --image shades/0.png --mask none/0.png", ("--mask none/0.png", "hides nothing")),
    ("gray --task denoise --image shades/0.png --sigma-y 25", ("--sigma-y 25", "at most 2", "127.5")),
    ("gray --task denoise --image shades/0.png --weight 2", ("weight=2", "diffpir")),
    ("rgb --task denoise --image shades/0.png --degrade", ("shades/0.png", "1 channels", "convert it to colour")),
    ("rgb --task colorize --image colour/0.png", ("colour/0.png", "3 channels", "--degrade")),
    ("gray --task denoise --image twice", ("twice/0.png", "0.bmp", "rename")),
    ("gray --task denoise --image odd", ("odd/...png", "rename")),
    ("gray --task denoise --image shades/0.png --truth twice", ("--truth twice", "0.bmp", "0.png")),
    ("gray --task denoise --image shades/0.png --start 0", ("start=0",)),
    ("gray --task denoise --image shades/0.png --time-travel 0 2", ("time_travel=0",)),
    ("latent --task inpaint --mask box --image colour/0.png --fit", ("latents", "dps")),
    ("nowhere --task denoise --image shades/0.png", ("nowhere",)),
]


@pytest.mark.parametrize(("words", "named"), REFUSED, ids=[words for words, _ in REFUSED])
def test_bad_input_is_one_line(words, named, restore):
    """Else a user's slip ends in a traceback, or in pictures of something else."""
    result, out = restore(words)
    assert_one_line(result, *named)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        ("gray --image shades/0.png", "--task denoise"),
        ("gray --task inpaint --image shades/0.png", "--mask box"),
        ("gray --task denoise --image shades/0.png --factor 2", None),
        ("gray --task inpaint --image shades/0.png --mask left --hidden 0.2", None),
        ("rgb --task denoise --image shades/0.png", "--task colorize"),
        ("gray --task denoise --image shades/0.png --truth shades --degrade", None),
        ("rgb --task colorize --image colour/0.png", "--degrade"),
    ],
)
def test_the_ways_out_work(words, instead, restore):
    """Else the advice of an error is another error."""
    assert restore(words)[0][0] == 2
    shorter = words.rpartition(" --")[0] if instead is None else f"{words} {instead}"
    assert restore(shorter)[0][0] == 0


def test_foreign_files_stay(restore, tmp_path):
    """Else a folder of pictures is overwritten."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/comparison.png").write_text("mine")
    result, _ = restore("gray --task denoise --image shades/0.png")
    assert_one_line(result, "comparison.png")
    assert (tmp_path / "out/comparison.png").read_text() == "mine"
    for words, name in (("--image shades/0.png", "low.png"), ("--image shades", "1/0001.png")):
        folder = tmp_path / name[0]
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        result, _ = restore(f"gray --task denoise {words}", out=name[0])
        assert_one_line(result, name)
        assert (folder / name).read_text() == "mine"


def test_the_same_command_again_replaces_its_own_files(restore, tmp_path):
    """Else a second try needs another folder each time."""
    for words in ("--image shades/0.png", "--image shades"):
        for number in (3, 2):
            result, out = restore(f"gray --task denoise --sigma-y 0.1 {words} --num-solutions {number}")
            assert result[0] == 0, result[2]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["0", "1", "2"]
    assert not (out / "0/0002.png").exists()


def test_the_commands_methods_are_those_of_the_pipeline():
    """Else a method cannot be chosen, or --help offers one that does not exist."""
    from ddpm_hf.cli.restore import METHODS as OFFERED

    assert tuple(METHODS) == OFFERED
