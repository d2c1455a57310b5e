"""Restoration by ours and by deepinv 0.5.0: the same model, images, observations and calls of the network.

    python benchmarks/restoration_deepinv.py MODEL IMAGES.npz --out figures.json

MODEL is a folder that stock DiffusionPipeline loads; IMAGES.npz holds held-out `images`, uint8 [N, H, W, C], and
`reference`, images for the Fréchet distance. Its features are the means of the UNet's middle block at t = T/10: a
network of the same images. deepinv gets our operators with their exact proximal steps: only the methods differ. Its
DDRM runs on its own physics where it has an SVD. Methods have their documented defaults. With `--repeats`, figures are
means over seeds, and the deviation of PSNR between seeds is given too. PSNR in dB of images in 0..1, sigma_y for
pixels in [-1, 1].
"""

import argparse
import json
import sys
import time
import types
from pathlib import Path

import diffusers  # noqa: F401  before the stand-ins below
import numpy as np
import torch
import transformers  # noqa: F401

from ddpm_hf import OPERATORS, DDPMRestorationPipeline, load
from ddpm_hf.restoration.figures import psnr, ssim

TASKS = {
    "random inpainting": ("random-pixels", {"hidden": 0.7}),
    "box inpainting": ("box", {"hidden": 0.5}),
    "super-resolution x2": ("bicubic", {"factor": 2}),
    "super-resolution x4": ("bicubic", {"factor": 4}),
    "Gaussian deblurring": ("anisotropic-blur", {"along": 1.0, "across": 1.0}),
    "colorizing": ("gray", {}),
}
OURS = ("ddnm", "diffpir", "pigdm", "mmps", "dps")
SLOW = ("mmps", "MomentMatching")  # several gradients a step: with the smallest number of steps only
THEIRS = ("DDRM", "DiffPIR", "PiGDM", "DPS", "MomentMatching")
STUBS = {
    "torchvision": (), "torchvision.transforms": ("InterpolationMode", "ToTensor", "Compose", "CenterCrop", "Resize"),
    "torchvision.transforms.functional": ("rotate", "crop", "resize"), "torchvision.datasets": (),
    "torchvision.transforms.v2": (),
    "torchvision.datasets.folder": ("IMG_EXTENSIONS",), "torchvision.utils": ("make_grid", "save_image"),
    "torchvision.datasets.utils": ("download_and_extract_archive",), "natsort": ("natsorted",), "h5py": (),
    "einops": ("rearrange",), "torchmetrics": (),
}  # fmt: skip


def import_deepinv():
    """deepinv, with stand-ins for what it imports and these methods do not use, where it is not installed."""
    for name, members in STUBS.items():
        try:
            __import__(name)
        except ImportError:
            module = types.ModuleType(name)
            module.__path__ = []
            for member in members:
                setattr(module, member, type(member, (), {"BILINEAR": 0, "NEAREST": 0, "BICUBIC": 0}))
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
    import deepinv

    return deepinv


def physics_of(deepinv, operator, sigma):
    """Our operator as a physics of deepinv, for images in [0, 1]."""

    class Physics(deepinv.physics.LinearPhysics):
        def A(self, x, **_):
            return operator.forward(x.float())

        def A_adjoint(self, y, **_):
            return operator.adjoint(y.float())

        def A_dagger(self, y, **_):
            return operator.pseudo_inverse(y.float())

        def prox_l2(self, z, y, gamma, **_):
            error = operator.observed(y - operator.forward(z))
            return z + operator.regularized_inverse(error, 1 / float(gamma))

    return Physics(noise_model=deepinv.physics.GaussianNoise(sigma / 2))


def theirs(deepinv, denoiser, method, name, options, operator, y, sigma, steps, device):
    """Solutions [N, C, H, W] in [0, 1] by deepinv; None where the method cannot run."""
    physics, y01 = physics_of(deepinv, operator, sigma), operator.observed((y + 1) / 2)
    sampling = deepinv.sampling
    if method == "DDRM":
        noise = deepinv.physics.GaussianNoise(sigma / 2)
        if name in ("random-pixels", "box"):
            mask = operator.mask.float().to(device)
            physics = deepinv.physics.Inpainting(operator.shape, mask=mask, noise_model=noise, device=device)
        elif name == "anisotropic-blur":
            from ddpm_hf.portable.operators_ddpm_hf import anisotropic_kernel

            kernel = anisotropic_kernel(1.0, 1.0, 0.0).float()[None, None].to(device)
            physics = deepinv.physics.BlurFFT(operator.shape, filter=kernel, noise_model=noise, device=device)
        else:
            return None
        return sampling.DDRM(denoiser, sigmas=np.linspace(1, 0, steps))(y01, physics)
    if method == "DiffPIR":
        fidelity = deepinv.optim.data_fidelity.L2()
        start = physics.A_dagger(y01)
        return sampling.DiffPIR(denoiser, fidelity, sigma=sigma / 2, max_iter=steps, device=device)(
            y01, physics, x_init=start
        )
    times = torch.linspace(1, 0, steps + 1, device=device, dtype=torch.float64)  # one call less than times
    if method == "DPS":
        return sampling.DPS(denoiser, num_steps=steps + 1, device=device)(y01, physics)
    fidelity = {"PiGDM": "PiGDMDataFidelity", "MomentMatching": "MomentMatchingDataFidelity"}[method]
    sde = sampling.VariancePreservingDiffusion(device=device, dtype=torch.float64)
    solver = sampling.DDPMSolver(timesteps=times)
    model = sampling.PosteriorDiffusion(
        data_fidelity=getattr(sampling, fidelity)(denoiser=denoiser, clip=[-1.0, 1.0]), denoiser=denoiser, sde=sde,
        solver=solver, device=device,
    )  # fmt: skip
    return model(y01, physics)


def outside(operator, name, y, sigma):
    """What needs no model, [N, C, H, W] in [0, 1] by name: Wiener's filter, bicubic enlargement, OpenCV's Telea."""
    found = {"Wiener": operator.regularized_inverse(y, max(sigma, 0.005) ** 2 / 0.3) / 2 + 0.5}
    if name == "bicubic":
        found["bicubic"] = torch.nn.functional.interpolate(y, operator.shape[1:], mode="bicubic") / 2 + 0.5
    if name in ("random-pixels", "box"):
        try:
            import cv2
        except ImportError:
            return found
        hidden = (~operator.mask[0]).numpy().astype(np.uint8)
        images = ((y / 2 + 0.5).clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()
        filled = [cv2.inpaint(np.ascontiguousarray(one), hidden, 3, cv2.INPAINT_TELEA) for one in images]
        found["Telea"] = torch.from_numpy(np.stack(filled).reshape(images.shape)).movedim(-1, 1).to(y) / 255
    return found


def features_of(pipeline, images):
    """Means of the UNet's middle block for noised images [N, C, H, W] in [0, 1]; [N, D]."""
    t, kept = pipeline.scheduler.config.num_train_timesteps // 10, []
    handle = pipeline.unet.mid_block.register_forward_hook(lambda _, __, output: kept.append(output.mean((2, 3))))
    with torch.no_grad():
        for part in images.split(256):
            noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(0)).to(part.device)
            pipeline.unet(pipeline.scheduler.add_noise(part * 2 - 1, noise, t), t)
    handle.remove()
    return torch.cat(kept).double().cpu().numpy()


def frechet(a, b):
    """The Fréchet distance of features [N, D] and [M, D]."""
    from ddpm_hf.evaluation.metrics import frechet_distance

    return float(frechet_distance(a, b))


def main():
    """Restore, measure, and write the figures as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--out", default="restoration.json")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="solutions of each image, each from other noise")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--ours", nargs="*", default=list(OURS), help='with settings: "diffpir:weight=4:eta=0.5"')
    parser.add_argument("--theirs", nargs="*", default=list(THEIRS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing new after so long")
    args = parser.parse_args()
    begun, device = time.time(), args.device

    arrays = np.load(args.images)
    truth = torch.from_numpy(arrays["images"][: args.count]).movedim(-1, 1).float().to(device) / 255
    reference = torch.from_numpy(arrays["reference"]).movedim(-1, 1).float().to(device) / 255
    loaded = load(args.model).to(device)
    pipeline = DDPMRestorationPipeline.from_pipe(loaded)
    pipeline.set_progress_bar_config(disable=True)
    known = features_of(pipeline, reference)
    deepinv = import_deepinv() if args.theirs else None
    denoiser = deepinv.models.DiffusersDenoiserWrapper(mode_id=args.model, device=device) if deepinv else None
    rows = []

    def record(task, sigma, steps, library, method, solutions, seconds):
        solutions = [x.float().clamp(0, 1) for x in solutions]
        decibels = [float(psnr(x, truth).mean()) for x in solutions]
        rows.append({
            "task": task, "sigma_y": sigma, "calls": steps, "library": library, "method": method,
            "psnr": float(np.mean(decibels)),
            "psnr_deviation": float(np.std(decibels, ddof=1)) if len(decibels) > 1 else None,
            "ssim": float(np.mean([float(ssim(x, truth).mean()) for x in solutions])),
            "frechet": float(np.mean([frechet(known, features_of(pipeline, x)) for x in solutions])),
            "seconds": round(seconds, 2),
        })  # fmt: skip
        print(rows[-1], flush=True)
        Path(args.out).write_text(json.dumps(rows, indent=1))

    def solve(library, method, name, options, operator, y, sigma, steps, seed):
        torch.manual_seed(seed)
        if library == "deepinv":
            x = theirs(deepinv, denoiser, method, name, options, operator, y, sigma, steps, device)
            return x if x is None else x.detach()
        generator = torch.Generator(device).manual_seed(seed)
        row, *given = method.split(":")
        settings = {key: float(value) for key, value in (one.split("=") for one in given)}
        settings |= {"generator": generator, "output_type": "pt"}
        return pipeline(y, operator, sigma, row, steps, **settings).images

    for task in args.tasks:
        name, options = TASKS[task]
        operator = OPERATORS[name](tuple(truth.shape[1:]), **options)
        for sigma in args.sigmas:
            y = operator.observe(truth * 2 - 1, sigma, torch.Generator().manual_seed(1))
            for method, x in outside(operator, name, y, sigma).items():
                record(task, sigma, 0, "none", method, [x], 0.0)
            for steps in args.steps:
                for library, methods in (("ddpm_hf", args.ours), ("deepinv", args.theirs)):
                    for method in methods:
                        if time.time() - begun > args.seconds:
                            return
                        if method in SLOW and steps > min(args.steps):
                            continue
                        start = time.time()
                        try:
                            found = [solve(library, method, name, options, operator, y, sigma, steps, seed)
                                     for seed in range(args.repeats)]  # fmt: skip
                        except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
                            print(
                                task, sigma, steps, library, method, type(error).__name__, str(error)[:300], flush=True
                            )
                            continue
                        if found[0] is not None:
                            seconds = (time.time() - start) / args.repeats
                            record(task, sigma, steps, library, method, found, seconds)


if __name__ == "__main__":
    main()
